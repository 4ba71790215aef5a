"""An MLP between two halves of an all-reduce, and backward; typically a sum is missing, or more than halves travel."""

import torch.distributed as dist

from ..exercises.cases import F32, F64, call, untouched, values, what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from .shared import results

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
    for n, each, width, hidden, dtype, new in CASES:
        about = f"{n} ranks with {each} positions and {hidden} hidden features each, width {width}"
        with what_is_new(new):
            seen = run(_mlp, each, width, hidden, dtype, n=n, about=about)
            x, up, down, grad = _inputs(n, each, width, hidden, dtype)
            _only_halves(seen, up.nbytes // n)
            got = results(seen, ("y", "gradient of x", "gradient of up", "gradient of down"), about)
            untouched(seen, about)
            _judge(got, x, up, down, grad, any(one.calls for one in seen), about)
            _judge_halves(seen, n, x.nbytes, about)


CASES = [  # ranks, positions of each, width, hidden features of each, dtype, what is new in it
    (4, 2, 3, 2, F64, ""),
    (4, 3, 5, 4, F32, ""),
    (3, 2, 4, 3, F64, "it works with 4 ranks, but not with 3 (is a 4 written into it?)"),
    (2, 5, 3, 1, F32, "it works with 4 ranks, but not with 2 (is a 4 written into it?)"),
]


def _inputs(n, each, width, hidden, dtype):
    """Whole x, up, down and grad."""
    shapes = (n * each, width), (n * hidden, width), (width, n * hidden), (n * each, width)
    x, *others = [values(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    x[-1] = 0  # padding, say: relu's input is exactly 0 there
    return [x, *others]


def _mlp(answer, each, width, hidden, dtype):
    n, rank = dist.get_world_size(), dist.get_rank()
    x, up, down, grad = _inputs(n, each, width, hidden, dtype)
    parts = {"x": x.chunk(n), "up": up.chunk(n), "down": down.chunk(n, 1), "grad": grad.chunk(n)}
    seen = call(answer, {name: chunks[rank].clone() for name, chunks in parts.items()})
    scatters = sum(call.op == "reduce_scatter" for call in seen.calls)
    if seen.hidden in [k * (n - 1) for k in range(scatters + 1)]:
        seen.hidden = 0  # gloo makes n calls of one dist.reduce_scatter: it is not hiding anything
    return seen


def _judge(got, x, up, down, grad, talked, about):
    n, ranks = len(got[0]), range(len(got[0]))
    before, back = x @ up.T, grad @ down  # (all positions, all features)
    hidden, masked = before.relu(), back * (before > 0)
    y, grad_x, hiddens, maskeds = hidden @ down.T, masked @ up, hidden.chunk(n, 1), masked.chunk(n, 1)

    alone = "x was not gathered, and nothing is sent: each rank put only its own positions through its own features"
    if talked:
        alone = "each rank has only its own summand: the sum over the ranks is missing"
    other_order = [y.roll(len(x) // n * r, 0).chunk(n)[0] for r in ranks]
    mistakes = {
        alone: [(hiddens[r] @ down.chunk(n, 1)[r].T).chunk(n)[r] for r in ranks],
        f"divided by {n}: the ranks' summands are added, not averaged": (y / n).chunk(n),
        "the relu is missing": (before @ down.T).chunk(n),
        "every rank has the first rank's positions": y.chunk(n)[0],
        "the parts of x are put together in another order than that of the ranks": other_order,
    }
    same(got[0], y.chunk(n), "y", about, mistakes.items())

    own = "each rank has only what its own features give: the gradient of x has to be summed over the ranks"
    no_relu = "the relu's part is missing: the gradient is zero where hidden is"
    at_zero = back * (before >= 0)
    mistakes = {
        own: [(maskeds[r] @ up.chunk(n)[r]).chunk(n)[r] for r in ranks],
        no_relu: (back @ up).chunk(n),
        "where relu's input is 0 its gradient is 0: hidden > 0, not hidden >= 0": (at_zero @ up).chunk(n),
        "relu of the gradient: it has to be zero where hidden is, whatever its own sign": (back.relu() @ up).chunk(n),
        f"divided by {n}: the ranks' parts are added, not averaged": (grad_x / n).chunk(n),
    }
    same(got[1], grad_x.chunk(n), "the gradient of x", about, mistakes.items())

    positions = "it counts this rank's positions only: each weight has worked on all positions"
    divided = f"divided by {n}: each rank has the whole gradient of its own weights"
    right = (masked.T @ x).chunk(n)
    mistakes = {
        positions: [maskeds[r].chunk(n)[r].T @ x.chunk(n)[r] for r in ranks],
        "the gradients of up are added up over the ranks: each rank has other rows of up": sum(right),
        divided: [g / n for g in right],
        no_relu: (back.T @ x).chunk(n),
    }
    same(got[2], right, "the gradient of up", about, mistakes.items())
    right = (grad.T @ hidden).chunk(n, 1)
    mistakes = {
        positions: [grad.chunk(n)[r].T @ hiddens[r].chunk(n)[r] for r in ranks],
        "the gradients of down are added up over the ranks: each rank has other columns of down": sum(right),
        divided: [g / n for g in right],
        "hidden before the relu: down was multiplied by what is left after it": (grad.T @ before).chunk(n, 1),
    }
    same(got[3], right, "the gradient of down", about, mistakes.items())


_GATHER, _SCATTER = ("all_gather", "all_gather_into_tensor"), ("reduce_scatter", "reduce_scatter_tensor")


def _only_halves(seen, weights):
    """weights: bytes of a rank's part of up."""
    reduced = {call.bytes for one in seen for call in one.calls if call.op == "all_reduce"}
    why = "each rank needs only its positions of the sum, reduce_scatter sends half"
    why = "that is whole already, and no other rank needs it" if reduced == {weights} else why
    because = {
        "all_reduce": "it calls all_reduce" + " for a weight's gradient" * (reduced == {weights}) + f": {why}",
        "broadcast": "it calls broadcast: all_gather brings every rank's part to all in one call",
        "": "it calls {op}: all_gather and reduce_scatter are all that is needed",
    }
    only_calls(seen, (*_GATHER, *_SCATTER, "send", "recv"), because)


def _judge_halves(seen, n, size, about):
    """Raise Wrong unless a rank sends four halves of an all-reduce: 4·(n − 1)/n·S."""
    for rank, one in enumerate(seen):
        halves, where = [call for call in one.calls if call.op in (*_GATHER, *_SCATTER)], f"rank {rank}, {about}"
        if any(call.bytes not in (size, size // n) for call in halves):
            why = "the results are right, but what travels is not the size of x: gather x and grad, not weights"
            got = ", ".join(f"{call.op} of {call.bytes} bytes" for call in halves)
            raise Wrong(why, where, f"{size} bytes, or a rank's {size // n}", got)
        half = (n - 1) / n * size
        sent = len(halves) * half + sum(call.bytes for call in one.calls if call.op == "send")
        if sent > 4 * half * 1.001:
            why = "where 4 are enough: gather x, scatter y, gather grad, scatter its gradient"
            if len(halves) == 5 and sum(call.op in _GATHER for call in halves) == 3:
                why = "as x is gathered again in backward, where whole_x could have been kept"
            why = f"the results are right, but {sent / half:.3g} halves of an all-reduce are sent, {why}"
            raise Wrong(why, where, f"{4 * half:,.0f} bytes", f"{sent:,.0f} bytes")


why = (
    "An all-reduce is a reduce-scatter and an all-gather, so what stands between the halves is split for the "
    "same bytes. Megatron overlaps the second gathering of x, in backward, with a product; you kept the "
    "gathered x and sent nothing for it."
)
exercise = Exercise(hints, check, minutes=25, level="hard", why=why)
