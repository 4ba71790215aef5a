"""The exercise sequence_parallel_mlp."""

import torch.distributed as dist

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from .shared import F32, F64, call_answer, random, results, told

hints = (
    "First gather: every rank needs all positions, because it has only some of the hidden features of each. "
    "dist.all_gather fills a list of n tensors; torch.cat puts them together.",
    "hidden @ down.T is, for all positions, this rank's summand. dist.reduce_scatter(mine, list(whole.chunk(n))) "
    "adds up and leaves each rank its positions: half of an all-reduce.",
    "Backward is the mirror image: gather grad (reduce-scatter's mirror), then grad_hidden = (whole_grad @ down) * "
    "(hidden > 0), then reduce-scatter grad_hidden @ up (the gather's mirror).",
    "The gradients of up and down are this rank's own and are not sent: grad_hidden.T @ whole_x and whole_grad.T @ "
    "hidden, with all positions in them. Keep whole_x: gathering it again costs a fifth message.",
)


def check(run):
    known = set()
    for n, each, width, hidden, dtype in [
        (4, 2, 3, 2, F64),
        (4, 3, 5, 4, F32),
        (3, 2, 4, 3, F64),
        (2, 5, 3, 1, F32),
    ]:
        notable = {f"it works with 4 ranks, but not with {n} (is a 4 written into it?)": n != 4}
        about = f"{n} ranks with {each} positions and {hidden} hidden features each, width {width}"
        try:
            seen = run(_mlp, each, width, hidden, dtype, n=n, about=about)
            _judge_mlp(seen, each, width, hidden, dtype, about)
        except Wrong as wrong:
            raise told(wrong, known, notable) from None
        known |= {text for text, holds in notable.items() if holds} | {"the first case"}


def _mlp_case(n, each, width, hidden, dtype):
    """Whole (x, up, down, grad)."""
    shapes = (n * each, width), (n * hidden, width), (width, n * hidden), (n * each, width)
    x, *others = [random(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    x[-1] = 0  # padding, say: relu's input is exactly 0 there
    return [x, *others]


def _mlp(answer, each, width, hidden, dtype):
    n, rank = dist.get_world_size(), dist.get_rank()
    x, up, down, grad = _mlp_case(n, each, width, hidden, dtype)
    parts = [t.chunk(n, dim)[rank].clone() for t, dim in ((x, 0), (up, 0), (down, 1), (grad, 0))]
    seen = call_answer(answer, *parts)
    scatters = sum(call.op == "reduce_scatter" for call in seen.calls)
    if seen.hidden in [k * (n - 1) for k in range(scatters + 1)]:
        seen.hidden = 0  # gloo makes n calls of one dist.reduce_scatter: it is not hiding anything
    return seen


def _judge_mlp(seen, each, width, hidden, dtype, about):
    n = len(seen)
    x, up, down, grad = _mlp_case(n, each, width, hidden, dtype)
    ups, downs, xs, grads = up.chunk(n), down.chunk(n, 1), x.chunk(n), grad.chunk(n)
    _only_halves(seen, up.numel() // n * up.element_size())
    names = ("y", "gradient of x", "gradient of up", "gradient of down")
    got_y, got_x, got_up, got_down = results(seen, 4, names, ("x", "up", "down", "grad"), about)

    h = [(x @ u.T).relu() for u in ups]
    summands = [hr @ d.T for hr, d in zip(h, downs, strict=True)]
    y, talked = sum(summands), any(one.calls for one in seen)
    mistakes = [
        ("each rank has only its own summand: the sum over the ranks is missing" if talked else
         "x was not gathered, and nothing is sent: each rank put only its own positions through its own features",
         [s.chunk(n)[r] for r, s in enumerate(summands)]),
        (f"divided by {n}: the ranks' summands are added, not averaged", list((y / n).chunk(n))),
        ("the relu is missing", list(sum(x @ u.T @ d.T for u, d in zip(ups, downs, strict=True)).chunk(n))),
        ("every rank has the first rank's positions", [y.chunk(n)[0]] * n),
        ("the parts of x are put together in another order than that of the ranks",
         [y.roll(each * r, 0).chunk(n)[0] for r in range(n)]),
    ]  # fmt: skip
    same(got_y, list(y.chunk(n)), "y", about, mistakes)

    gh = [(grad @ d) * (hr > 0) for hr, d in zip(h, downs, strict=True)]
    back = [g @ u for g, u in zip(gh, ups, strict=True)]
    mistakes = [
        ("each rank has only what its own features give: the gradient of x has to be summed over the ranks",
         [b.chunk(n)[r] for r, b in enumerate(back)]),
        ("the relu's part is missing: the gradient is zero where hidden is",
         list(sum(grad @ d @ u for d, u in zip(downs, ups, strict=True)).chunk(n))),
        ("where relu's input is 0 its gradient is 0: hidden > 0, not hidden >= 0",
         list(sum(((grad @ d) * (x @ u.T >= 0)) @ u for d, u in zip(downs, ups, strict=True)).chunk(n))),
        ("relu of the gradient: it has to be zero where hidden is, whatever its own sign",
         list(sum((grad @ d).relu() @ u for d, u in zip(downs, ups, strict=True)).chunk(n))),
        (f"divided by {n}: the ranks' parts are added, not averaged", list((sum(back) / n).chunk(n))),
    ]  # fmt: skip
    same(got_x, list(sum(back).chunk(n)), "the gradient of x", about, mistakes)

    right_up = [g.T @ x for g in gh]
    mistakes = [
        ("it counts this rank's positions only: each weight has worked on all positions",
         [gh[r].chunk(n)[r].T @ xs[r] for r in range(n)]),
        ("the gradients of up are added up over the ranks: each rank has other rows of up", [sum(right_up)] * n),
        (f"divided by {n}: each rank has the whole gradient of its own weights", [g / n for g in right_up]),
        ("the relu's part is missing: the gradient is zero where hidden is",
         [(grad @ d).T @ x for d in downs]),
    ]  # fmt: skip
    same(got_up, right_up, "the gradient of up", about, mistakes)
    right_down = [grad.T @ hr for hr in h]
    mistakes = [
        ("it counts this rank's positions only: each weight has worked on all positions",
         [grads[r].T @ h[r].chunk(n)[r] for r in range(n)]),
        ("the gradients of down are added up over the ranks: each rank has other columns of down",
         [sum(right_down)] * n),
        (f"divided by {n}: each rank has the whole gradient of its own weights", [g / n for g in right_down]),
        ("hidden before the relu: down was multiplied by what is left after it",
         [grad.T @ (x @ u.T) for u in ups]),
    ]  # fmt: skip
    same(got_down, right_down, "the gradient of down", about, mistakes)
    _judge_halves(seen, n, x.numel() * x.element_size(), about)


_GATHER, _SCATTER = ("all_gather", "all_gather_into_tensor"), ("reduce_scatter", "reduce_scatter_tensor")


def _only_halves(seen, weights):
    """weights: bytes of a rank's part of up."""
    reduced = {call.bytes for one in seen for call in one.calls if call.op == "all_reduce"}
    only_calls(seen, (*_GATHER, *_SCATTER, "send", "recv"), {
        "all_reduce": "it calls all_reduce for a weight's gradient: that is whole already, and no other rank needs it"
        if reduced == {weights} else
        "it calls all_reduce: each rank needs only its positions of the sum, reduce_scatter sends half",
        "broadcast": "it calls broadcast: all_gather brings every rank's part to all in one call",
        "": "it calls {op}: all_gather and reduce_scatter are all that is needed",
    })  # fmt: skip


def _judge_halves(seen, n, size, about):
    """Raise Wrong unless a rank sends four halves of an all-reduce: 4·(n − 1)/n·S."""
    for rank, one in enumerate(seen):
        gathers = [call for call in one.calls if call.op in _GATHER]
        scatters = [call for call in one.calls if call.op in _SCATTER]
        halves = len(gathers) + len(scatters)
        if any(call.bytes not in (size, size // n) for call in gathers + scatters):
            why = "the results are right, but what travels is not the size of x: gather x and grad, not weights"
            got = ", ".join(f"{call.op} of {call.bytes} bytes" for call in gathers + scatters)
            raise Wrong(why, f"rank {rank}, {about}", f"{size} bytes, or a rank's {size // n}", got)
        by_hand = sum(call.bytes for call in one.calls if call.op == "send")
        sent = halves * (n - 1) / n * size + by_hand
        fair = 4 * (n - 1) / n * size
        if sent > fair * 1.001:
            why = f"the results are right, but {sent / fair * 4:.3g} halves of an all-reduce are sent"
            if halves == 5 and len(gathers) == 3:
                why += ": x is gathered again in backward, where whole_x could have been kept"
            else:
                why += ", where 4 are enough: gather x, scatter y, gather grad, scatter its gradient"
            raise Wrong(why, f"rank {rank}, {about}", f"{fair:,.0f} bytes", f"{sent:,.0f} bytes")


exercise = Exercise(hints, check)
