"""What several exercises of this lesson share."""

import torch
import torch.distributed as dist

from ..exercises.cases import values
from ..exercises.judge import Wrong, plural, same, type_of
from ..exercises.watch import watched
from ..worlds import group_of

F32, F64 = torch.float32, torch.float64


def split(tensor, n, dim=0):
    return tensor.tensor_split(n, dim)


def untouched(seen, about):
    """Raise Wrong where an answer changed what it was given."""
    for rank, one in enumerate(seen):
        if one.kept["changed"]:
            why = f"`{one.kept['changed'][0]}` was changed: += and calls ending in _ write into what was given"
            raise Wrong(why, f"rank {rank}, {about}")


def rows_of_rank(tensor):
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def there_and_back(seen, answer, tensors, g, **options):
    """Call the answer again, with tensors that want gradients, and go back with `g`: seen.kept gets what comes out."""
    leaves = {name: t if t is None else t.clone().requires_grad_() for name, t in tensors.items()}
    given = [t if t is None else t.clone() for t in leaves.values()]  # autograd lets nobody write into a leaf
    y = answer(*given, **options)
    back = watched(lambda: y.backward(g.clone())) if getattr(y, "requires_grad", False) and y.shape == g.shape else None
    grads = {name: t.grad for name, t in leaves.items() if t is not None}
    seen.kept |= {"g": g, "grads": grads, "back": back.calls if back else []}


def judge_gradients(seen, labels, expected, mistakes, sent, about):
    """Raise Wrong where what came back to x, weight and bias is not as `expected`; mistakes: {name: as in `same`}."""
    for name in expected[0]:
        got = [seen[r].kept["grads"][name] for r in labels]
        lost = [r for r, grad, wanted in zip(labels, got, expected, strict=True) if grad is None and wanted[name].any()]
        if len(lost) == len(labels):
            raise Wrong(f"the result is right, but `{name}` gets no gradient: detach(), .data or a copy that autograd "
                        "knows nothing of cuts it off", f"{name}.grad, {about}")  # fmt: skip
        if lost:
            why = f"`{name}` gets a gradient on some ranks only: after one step its copies differ; use it on all alike"
            raise Wrong(f"the result is right, but {why}", f"{plural(lost)}, {name}.grad, {about}")
        wanted = [e[name] for e in expected]
        got = [w if grad is None else grad for grad, w in zip(got, wanted, strict=True)]
        same(got, wanted, f"{name}.grad", about, mistakes.get(name, ()), labels=list(labels))
    for r in labels:
        if seen[r].kept["back"]:
            raise Wrong(sent.format(op=seen[r].kept["back"][0].op), f"rank {r}, {about}")


def changed(before, **now):
    return [name for name, tensor in now.items() if tensor is not None and not torch.equal(tensor, before[name])]


def layer(shape, wide, out, dtype, bias, seed):
    """x, weight, bias, the same on every rank."""
    x, weight, b = (values(s, dtype, 50 + i, seed) for i, s in enumerate([(*shape, wide), (out, wide), (out,)]))
    return x, weight, b if bias else None


ALL, PAIRS = None, ((0, 2), (1, 3))


def members_of(groups, rank):
    n = dist.get_world_size() if dist.is_initialized() else 4
    return tuple(range(n)) if groups is None else next(g for g in groups if rank in g)


def forth_and_back(answer, shape, dtype, seed, groups=None, layout="", direct=False, alike=False, needs_grad=True):
    """On a rank: the answer forward, then backward, watched each by itself; kept: all there is to look at.

    layout: "strided" or "expanded", of the gradient. direct: x is used a second time, beside the answer.
    alike: every rank comes back with the same gradient."""
    rank, options = dist.get_rank(), {}
    members = members_of(groups, rank)
    if groups:
        made = [group_of(g) for g in groups]
        options = {"group": next(g for g, ranks in zip(made, groups, strict=True) if rank in ranks)}
    x = values(shape, dtype, members[0] if not alike else rank, seed)  # f's x is the same on every rank
    before, box = x.clone(), []
    x.requires_grad_(needs_grad)

    def forward():
        box.append(answer(x, **options))
        return box[0]

    seen = watched(forward)
    y = box[0]
    seen.kept = kept = {"x": before, "same": y is x, "tensor": isinstance(y, torch.Tensor), "members": members,
                        "needs": getattr(y, "requires_grad", False), "back": [], "grad": None}  # fmt: skip
    kept["changed"] = changed({"x": before}, x=x.detach())
    if not kept["tensor"] or not kept["needs"]:
        return seen
    g = values(y.shape if layout != "expanded" else (1,), dtype, 20 + (members[0] if alike else rank), seed)
    if layout == "strided":
        g = torch.stack([g, g + 1], -1)[..., 0]
    elif layout == "expanded":
        g = g.expand(y.shape)
    given = g.clone()
    total = y if not direct else torch.cat([y.flatten(), x.flatten()])
    back = watched(total.backward, torch.cat([g.flatten(), given.flatten()]) if direct else g)
    seen.reference, seen.torchs = seen.reference or back.reference, seen.torchs or back.torchs
    seen.hidden += back.hidden
    kept |= {"back": back.calls, "unwaited": back.unwaited, "g": given, "intact": torch.equal(g, given)}
    kept["grad"] = None if x.grad is None else x.grad.clone()
    return seen


def differentiable(seen, about, lost):
    for rank, one in enumerate(seen):
        if one.kept.get("unwaited"):
            raise Wrong("backward's async_op=True was never waited for: until wait() returns, the sum is not there",
                        f"rank {rank}, {about}")  # fmt: skip
        if not one.kept["tensor"]:
            raise Wrong(f"it returns {type_of(one.result)}: a tensor is asked for", f"rank {rank}, {about}")
        if not one.kept["needs"]:
            raise Wrong(f"autograd does not know where the result comes from: {lost}", f"rank {rank}, {about}")
        if one.kept["grad"] is None:
            raise Wrong(f"autograd does not come back to x: {lost}", f"rank {rank}, x.grad, {about}")


def call_answer(answer, shape, dtype, seed, options):
    return forth_and_back(answer, shape, dtype, seed, **options)
