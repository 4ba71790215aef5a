"""A layer with a sharded weight (ZeRO-3). Typical: the weight kept for backward, its gradient not reduced."""

import gc
import time

import torch
import torch.distributed as dist

from pardist_lib.ranks import progress

from ..exercises.cases import F32, F64, values, what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, only_calls, same
from ..exercises.watch import forget, watched
from .shared import NOT_FOUR, counted, moves_at_most

hints = (
    "torch.autograd.Function is a class with two static methods: forward(ctx, x, shard) returns the output, "
    "backward(ctx, gradient) returns one gradient for each argument of forward. ctx.save_for_backward(…) keeps "
    "tensors, ctx.saved_tensors has them again. Call it as Linear.apply(x, shard).",
    "Forward: all_gather the shards, torch.cat them, view as (out_features, -1), and x @ weight.T. Save x and "
    "shard only: the weight is gone when forward returns.",
    "Backward: gather the weight again for gradient @ weight, the gradient of x. The weight's is gradient.T @ x: "
    "reduce_scatter its n chunks and divide by n.",
)
IN_FORWARD = {
    "broadcast": "it broadcasts in forward: one all_gather brings every rank's shard to all",
    "": "it calls {op} in forward: one all_gather is all that is needed",
}
IN_BACKWARD = {
    "all_reduce": "it calls all_reduce, which brings the whole gradient to every rank: a rank keeps its own n-th, and "
    "reduce_scatter brings that for half the bytes",
    "scatter": "its backward calls scatter, as that of torch.distributed.nn's all_gather does, for which autograd "
    "keeps the whole weight: write backward yourself, in a torch.autograd.Function",
    "": "it calls {op}: all_gather and reduce_scatter do it",
}
CHANGED = -3.0  # by which shards are multiplied between forward and backward, in the case that looks at what is kept


def check(run):
    # ranks, features from layer to layer, rows (with one it is looked at what is kept), dtype
    cases = [(4, (6, 8), 3, F32), (4, (5, 4), 2, F64), (3, (4, 6), 3, F64), (2, (3, 2), 2, F32)]
    cases += [(4, (4, 8, 6), 2, F64), (4, (64, 48), 1, F64)]
    for seed, (n, *case) in enumerate(cases):
        sizes, rows, dtype = case
        about = f"{sizes[0]} → {sizes[-1]} features, {rows} rows a rank, {str(dtype)[6:]}, {n} ranks"
        new = NOT_FOUR * (n == 3)
        if len(sizes) > 2:
            about += ", two layers one after the other"
            new = "one layer works, two do not (is something kept outside of ctx?)"
        with what_is_new(new):
            _judge(run(_used, seed, *case, n=n, about=about), [_layers(seed, rank, *case) for rank in range(n)], about)


def _layers(seed, rank, sizes, rows, dtype):
    """(x, [whole weight of each layer], gradient of the output)"""
    weights = [values((b, a), dtype, 50 + i, seed) for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))]
    return values((rows, sizes[0]), dtype, rank, seed), weights, values((rows, sizes[-1]), dtype, 20 + rank, seed)


def _used(answer, seed, sizes, rows, dtype):
    rank, n = dist.get_rank(), dist.get_world_size()
    x, weights, gradient = _layers(seed, rank, sizes, rows, dtype)
    shards = [w.flatten().chunk(n)[rank].clone().requires_grad_() for w in weights]
    x.requires_grad_()
    saved, outputs = [], []  # (what `watched` returns is a copy without a graph)

    def forward():
        y = x
        for shard, weight in zip(shards, weights, strict=True):
            outputs.append(y := answer(y, shard, len(weight)))
        return y

    gc.collect()
    known = _memory(_alive())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        seen = counted(watched(forward), n)
    forget()  # else what the calls filled would be alive still
    known |= _memory(t for t in [*outputs, seen.result, x, *shards] if isinstance(t, torch.Tensor))
    for _ in progress(range(20)):  # gloo's threads may hold on to tensors for a moment; progress is a sign of life
        gc.collect()
        kept = [size for at, size in _memory([*_alive(), *saved]).items() if at not in known]
        if rows > 1 or max(kept, default=0) < shards[0].nbytes:
            break
        time.sleep(0.05)
    y = outputs[-1]
    seen.kept = {"graph": isinstance(y, torch.Tensor) and y.requires_grad, "bytes": sum(kept)}
    seen.kept["copy"] = shards[0].nbytes in kept
    if seen.kept["graph"] and y.shape == gradient.shape:
        if rows == 1:
            for shard in shards:
                shard.data *= CHANGED
        inputs = [("`x`", x, _layers(seed, rank, sizes, rows, dtype)[0])]
        inputs += [("`shard`", shard, shard.detach().clone()) for shard in shards]
        inputs += [("the gradient that backward is given", given := gradient.clone(), gradient)]
        after = counted(watched(lambda: y.backward(given)), n)
        changed = [what for what, now, before in inputs if not torch.equal(now, before)]
        seen.kept |= {"x": x.grad, "shards": [s.grad for s in shards], "backward": after, "changed": changed}
        for name in ("reference", "torchs", "hidden", "unwaited", "early"):
            setattr(seen, name, getattr(seen, name) or getattr(after, name))
    return seen


def _alive():
    return [t for t in gc.get_objects() if type(t) is torch.Tensor]


def _memory(tensors):
    """{address: bytes} of the memory behind tensors."""
    found = {}
    for t in tensors:
        try:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        except (RuntimeError, NotImplementedError):  # a tensor without memory of its own
            pass
    return found


def _plain(x, weights, gradient):
    """(output, x's gradient, each weight's) of layers that are not sharded."""
    y = x = x.clone().requires_grad_()
    for weight in weights:
        y = y @ weight.requires_grad_().T
    y.backward(gradient)
    return y.detach(), x.grad, [weight.grad for weight in weights]


def _judge(seen, given, about):
    n, rows, whole = len(seen), len(given[0][0]), sum(weight.nbytes for weight in given[0][1])
    outputs, of_x, of_weights = zip(*[_plain(*layers) for layers in given], strict=True)
    only_calls(seen, ("all_gather", "send", "recv"), IN_FORWARD)
    why = "the weight is (out_features, in_features): here it was read as (in, out)"
    transposed = [x @ weights[0].detach().reshape(weights[0].shape[::-1]) for x, weights, _ in given]
    same([one.result for one in seen], outputs, "the output", about, [(why, transposed)] * (len(given[0][1]) == 1))
    for rank, one in enumerate(seen):
        if not one.kept["graph"]:
            why = "the output has no graph: torch.distributed's calls are not differentiable, so backward must be "
            raise Wrong(f"{why}written, in a torch.autograd.Function", f"rank {rank}, {about}")
        if one.kept["x"] is None:
            raise Wrong("x has no gradient: return it from backward, in the place of x", f"rank {rank}, {about}")
    if rows == 1:
        _judge_kept(seen, of_x, whole, about)
    else:
        mistakes = [
            ("x has the mean of the ranks' gradients: its rows are this rank's own", sum(of_x) / n),
            (f"x's gradient is divided by {n}: its rows are this rank's own", [g / n for g in of_x]),
        ]
        same([one.kept["x"] for one in seen], of_x, "the gradient of x", about, mistakes)
    for i, own in enumerate(zip(*of_weights, strict=True)):
        got = [one.kept["shards"][i] for one in seen]
        if any(g is None for g in got):
            raise Wrong("shard has no gradient: return it from backward, in the place of shard", about)
        _judge_mean(got, own, rows, about)
    for rank, one in enumerate(seen):
        if changed := one.kept["changed"]:
            raise Wrong(f"{changed[0]} was changed: others may use it too, work on a copy", f"rank {rank}, {about}")
    back = [one.kept["backward"] for one in seen]
    only_calls(back, ("all_gather", "reduce_scatter", "all_to_all", "send", "recv"), IN_BACKWARD)
    moves_at_most(seen, whole, 1, f"forward, {about}")
    moves_at_most(back, whole, 2, f"backward, {about}")


def _judge_kept(seen, of_x, whole, about):
    """Raise Wrong where more than shard and x is kept from forward to backward, where shard was changed in between."""
    again = "save the shard, and gather it again in backward"
    for rank, one in enumerate(seen):
        if one.kept["bytes"] >= whole:
            why = f"{one.kept['bytes']:,} bytes are kept from forward to backward besides x, shard and output, and the "
            raise Wrong(f"{why}whole weight has {whole:,}: {again}", f"rank {rank}, {about}")
    got = [one.kept["x"] for one in seen]
    if all(one.kept["copy"] and equal(g, old) for one, g, old in zip(seen, got, of_x, strict=True)):
        return  # of a copy of the shard, which is not a whole weight
    try:
        same(got, [CHANGED * g for g in of_x], "the gradient of x", about)
    except Wrong as wrong:  # it was right in all other cases
        why = "backward computes with a weight, or parts of it, kept from forward, and shard has changed since"
        wrong.diagnosis = f"{why} (the check did it): {again}"
        raise


def _judge_mean(got, own, rows, about):
    """Raise Wrong unless got[r] is the r-th part of the mean of the ranks' own gradients of the weight."""
    n, total = len(own), sum(own)
    cut = [g.flatten().chunk(n)[rank] for rank, g in enumerate(own)]
    mistakes = [
        (f"the sum was not divided by {n}: shard.grad is the mean over the ranks", total),
        (f"divided twice by {n}", total / n**2),
        (f"divided by the {rows} rows: the loss has done that, only ranks are to be averaged over", total / n / rows),
        ("shard.grad is counted twice: backward returns it, and autograd adds it up", 2 * total / n),
        ("shard.grad is made from the transposed gradient: the weight's is gradient.T @ x", total.T / n),
    ]
    mistakes = [(why, would.flatten().chunk(n)) for why, would in mistakes] + [
        ("nothing was reduced: shard.grad is cut from this rank's own gradient", cut),
        ("nothing was reduced, and the own gradient is divided by n", [part / n for part in cut]),
        ("every rank has the first n-th of the gradient: rank r keeps the r-th", total.flatten().chunk(n)[0] / n),
    ]
    same(got, (total / n).flatten().chunk(n), "shard.grad", about, mistakes)


why = (
    "The weight is gathered twice and kept never, so between forward and backward there is only the shard. FSDP frees "
    "the storage under a tensor that autograd keeps, instead of a Function for each layer: so it works for any "
    "module."
)
exercise = Exercise(hints, check, minutes=35, level="hard", why=why)
