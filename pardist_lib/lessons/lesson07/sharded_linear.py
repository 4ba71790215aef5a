"""The exercise sharded_linear."""

import gc
import time

import torch
import torch.distributed as dist

from ..exercises.cases import values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, only_calls, same
from ..exercises.watch import forget, watched
from .shared import F32, F64, counted, judge_moved

hints = (
    "torch.autograd.Function is a class with two static methods: forward(ctx, x, shard) returns the output, "
    "backward(ctx, gradient) returns one gradient for each argument of forward. ctx.save_for_backward(…) keeps "
    "tensors, ctx.saved_tensors has them again. Call it as Linear.apply(x, shard).",
    "Forward: all_gather the shards, torch.cat them, view as (out_features, -1), and x @ weight.T. Save x and "
    "shard only: the weight is gone when forward returns.",
    "Backward: gather the weight again for gradient @ weight, the gradient of x. The weight's is gradient.T @ x: "
    "reduce_scatter its n chunks and divide by n.",
)


def check(run):
    cases = [
        (4, (6, 8), 3, F32), (4, (5, 4), 2, F64), (3, (4, 6), 3, F64), (2, (3, 2), 2, F32), (4, (4, 8, 6), 2, F64),
        (4, (64, 48), 1, F64),
    ]  # fmt: skip
    for seed, (n, sizes, batch, dtype) in enumerate(cases):
        layers = "" if len(sizes) == 2 else ", two layers one after the other"
        about = f"{sizes[0]} → {sizes[-1]} features, {batch} rows a rank, {str(dtype)[6:]}, {n} ranks{layers}"
        try:
            _judge_use(run(_use, seed, sizes, batch, dtype, n=n, about=about), seed, sizes, batch, dtype, about)
        except Wrong as wrong:
            if layers:
                wrong.diagnosis = f"one layer works, two do not (is something kept outside of ctx?): {wrong.diagnosis}"
            if seed == 2:
                wrong.diagnosis = f"it works with 4 ranks, but not with 3 (is a 4 written into it?): {wrong.diagnosis}"
            raise


WHOLE_KEPT = (
    "{:,} bytes are kept from forward to backward besides x, shard and output, and the whole weight has {:,}: save the "
    "shard, and gather it again in backward"
)


KEPT_SINCE = (
    "backward computes with a weight, or parts of it, kept from forward, and shard has changed since (the check did "
    "it): save the shard, and gather it again in backward"
)


def _layers(seed, rank, sizes, batch, dtype):
    """(x, [whole weight of each layer], gradient of the output)"""
    weights = [values((b, a), dtype, 50 + i, seed) for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))]
    return values((batch, sizes[0]), dtype, rank, seed), weights, values((batch, sizes[-1]), dtype, 20 + rank, seed)


def _use(answer, seed, sizes, batch, dtype):
    rank, n = dist.get_rank(), dist.get_world_size()
    x, weights, gradient = _layers(seed, rank, sizes, batch, dtype)
    shards = [w.flatten().chunk(n)[rank].clone().requires_grad_() for w in weights]
    x.requires_grad_()
    saved, outputs = [], []  # (what `watched` returns is a copy without a graph)

    def forward():
        y = x
        for shard, weight in zip(shards, weights, strict=True):
            outputs.append(y := answer(y, shard, len(weight)))
        return y

    gc.collect()
    before = _memory(_tensors())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        seen = counted(watched(forward), n)
    forget()  # else what the calls filled would be alive still
    known = before | _memory(t for t in [*outputs, seen.result, x, *shards] if isinstance(t, torch.Tensor))
    for _ in range(20):  # gloo's threads may hold on to tensors for a moment
        gc.collect()
        kept = {at: size for at, size in _memory([*_tensors(), *saved]).items() if at not in known}
        if batch > 1 or max(kept.values(), default=0) < shards[0].nbytes:
            break
        time.sleep(0.05)
    y = outputs[-1]
    seen.kept = {"graph": isinstance(y, torch.Tensor) and y.requires_grad, "saved": sum(kept.values())}
    seen.kept |= {"copy": shards[0].nbytes in kept.values(), "backward": None}
    if seen.kept["graph"] and y.shape == gradient.shape:
        if batch == 1:  # the case that looks at what is kept
            for shard in shards:
                shard.data *= CHANGED
        given, x_before = gradient.clone(), _layers(seed, rank, sizes, batch, dtype)[0]
        shards_before = [shard.detach().clone() for shard in shards]
        after = counted(watched(lambda: y.backward(given)), n)
        pairs = {"`x`": [(x, x_before)], "`shard`": list(zip(shards, shards_before, strict=True)),
                 "the gradient that backward is given": [(given, gradient)]}  # fmt: skip
        seen.kept |= {"backward": after.calls, "x": x.grad, "shards": [s.grad for s in shards]}
        seen.kept["changed"] = [what for what, both in pairs.items() if not all(torch.equal(a, b) for a, b in both)]
        for name in ("reference", "torchs", "hidden", "unwaited", "early"):
            setattr(seen, name, getattr(seen, name) or getattr(after, name))
    return seen


CHANGED = -3.0  # the shards are multiplied by it between forward and backward


def _tensors():
    """The tensors that are alive."""
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


NO_OTHER = {
    "all_reduce": "it calls all_reduce, which brings the whole gradient to every rank: a rank keeps its own n-th, and "
    "reduce_scatter brings that for half the bytes",
    "scatter": "its backward calls scatter, as that of torch.distributed.nn's all_gather does, for which autograd "
    "keeps the whole weight: write backward yourself, in a torch.autograd.Function",
    "": "it calls {op}: all_gather and reduce_scatter do it",
}


def _judge_use(seen, seed, sizes, batch, dtype, about):
    n = len(seen)
    size = sum(w.nbytes for w in _layers(seed, 0, sizes, batch, dtype)[1])
    outputs, x_grads, w_grads = [], [], []
    for rank in range(n):
        x, weights, gradient = _layers(seed, rank, sizes, batch, dtype)
        x.requires_grad_()
        y = x
        for w in weights:
            y = y @ w.requires_grad_().T
        y.backward(gradient)
        outputs.append(y.detach())
        x_grads.append(x.grad)
        w_grads.append([w.grad for w in weights])
    only_calls(seen, ("all_gather", "send", "recv"), {
        "broadcast": "it broadcasts in forward: one all_gather brings every rank's shard to all",
        "": "it calls {op} in forward: one all_gather is all that is needed"})  # fmt: skip
    mistakes = []
    if len(sizes) == 2:
        inputs = [_layers(seed, rank, sizes, batch, dtype) for rank in range(n)]
        wrong_view = [x @ w[0].reshape(sizes[0], sizes[1]) for x, w, _ in inputs]
        mistakes.append(("the weight is (out_features, in_features): here it was read as (in, out)", wrong_view))
    same([one.result for one in seen], outputs, "the output", about, mistakes)
    for rank, one in enumerate(seen):
        if not one.kept["graph"]:
            raise Wrong(
                "the output has no graph: torch.distributed's calls are not differentiable, so backward must be "
                "written, in a torch.autograd.Function", f"rank {rank}, {about}",
            )  # fmt: skip
        if one.kept["x"] is None:
            raise Wrong("x has no gradient: return it from backward, in the place of x", f"rank {rank}, {about}")
    mistakes = [
        ("x has the mean of the ranks' gradients: its rows are this rank's own", [sum(x_grads) / n] * n),
        (f"x's gradient is divided by {n}: its rows are this rank's own", [g / n for g in x_grads]),
    ]
    if batch == 1:
        _judge_memory(seen, size, about)
        old = all(one.kept["copy"] and equal(one.kept["x"], g) for one, g in zip(seen, x_grads, strict=True))
        x_grads = [(1.0 if old else CHANGED) * g for g in x_grads]  # (a copy of the shard is not a whole weight)
    try:
        same([one.kept["x"] for one in seen], x_grads, "the gradient of x", about, mistakes)
    except Wrong as wrong:
        if batch == 1:  # it was right in all other cases
            wrong.diagnosis = KEPT_SINCE
        raise
    for i in range(len(sizes) - 1):
        whole = [w[i] for w in w_grads]
        total = sum(whole).flatten().chunk(n)
        mistakes = [
            (f"the sum was not divided by {n}: shard.grad is the mean over the ranks", list(total)),
            (f"divided twice by {n}", [t / n**2 for t in total]),
            (f"divided by the {batch} rows: the loss has done that, only ranks are to be averaged over",
             [t / n / batch for t in total]),
            ("shard.grad is counted twice: backward returns it, and autograd adds it up", [2 * t / n for t in total]),
            ("nothing was reduced: shard.grad is cut from this rank's own gradient",
             [w.flatten().chunk(n)[r] for r, w in enumerate(whole)]),
            ("nothing was reduced, and the own gradient is divided by n",
             [w.flatten().chunk(n)[r] / n for r, w in enumerate(whole)]),
            ("every rank has the first n-th of the gradient: rank r keeps the r-th", [total[0] / n] * n),
            ("shard.grad is made from the transposed gradient: the weight's is gradient.T @ x",
             list((sum(w.T.flatten() for w in whole) / n).chunk(n))),
        ]  # fmt: skip
        got = [one.kept["shards"][i] for one in seen]
        if any(g is None for g in got):
            raise Wrong("shard has no gradient: return it from backward, in the place of shard", about)
        same(got, [t / n for t in total], "shard.grad", about, mistakes)
    for rank, one in enumerate(seen):
        where = f"rank {rank}, {about}"
        for what in one.kept["changed"]:
            raise Wrong(f"{what} was changed: others may use it too, work on a copy", where)
        for call in one.kept["backward"]:
            if call.op not in ("all_gather", "reduce_scatter", "all_to_all", "send", "recv"):
                raise Wrong(NO_OTHER.get(call.op, NO_OTHER[""]).format(op=call.op), where)
    judge_moved(seen, n, size, 1, f"forward, {about}")
    for one in seen:
        one.calls = one.kept["backward"]
    judge_moved(seen, n, size, 2, f"backward, {about}")


def _judge_memory(seen, size, about):
    for rank, one in enumerate(seen):
        if one.kept["saved"] >= size:
            raise Wrong(WHOLE_KEPT.format(one.kept["saved"], size), f"rank {rank}, {about}")


exercise = Exercise(hints, check)
