"""This rank's output features; typically too many of them, a bias that does not fit, or the weight cut too late."""

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from ..exercises.cases import F32, F64, untouched, values, what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from .shared import gradients, judge_gradients, layer, there_and_back

hints = (
    "torch's linear layer keeps its weight as (out, in): an output feature is a row of weight and an entry of "
    "bias. weight.tensor_split(n) cuts rows.",
    "With w = weight.tensor_split(n)[rank], the result is x @ w.T, and to it belongs the same part of the bias, "
    "bias.tensor_split(n)[rank].",
    "Cut first, multiply then: multiplying by the whole weight would do every rank's work on every rank.",
)


def check(run):
    for seed, (n, shape, wide, out, dtype, bias, new) in enumerate(CASES):
        about = f"{n} ranks, x {(*shape, wide)}, weight {(out, wide)}{'' if bias else ', no bias'}"
        with what_is_new(new):
            seen = run(_column, shape, wide, out, dtype, bias, seed, n=n, about=about, raises=RAISES)
            only_calls(seen, (), {"": "it calls {op}: a column-parallel layer sends nothing: its output stays split"})
            untouched(seen, about)
            _judge(seen, layer(shape, wide, out, dtype, bias, seed), torch.arange(out).tensor_split(n), about)


CASES = [  # ranks, shape of x, in, out, dtype, bias; what is new in it
    (4, (3,), 5, 8, F32, True, ""),
    (4, (3,), 5, 10, F32, True, "where 4 does not divide the output features"),
    (4, (3,), 5, 3, F32, True, "where there are fewer output features than ranks"),
    (4, (2, 3), 4, 8, F64, True, "where x has three dimensions"),
    (4, (), 4, 8, F32, True, "where x is one token alone, (in)"),
    (4, (3,), 5, 8, F32, False, "where bias is None"),
    (3, (2,), 7, 11, F64, True, "with 3 ranks (is a 4 written into it?)"),
    (2, (2,), 3, 6, F32, False, "with 2 ranks"),
]


RAISES = [
    (r"mat1 and mat2 shapes cannot be multiplied \(\d+x(\d+) and \d+x\1\)",
     "the weight is kept as (out, in), so it has to be turned: x @ w.T"),
    (r"mat1 and mat2|size mismatch",
     "is the weight cut along dim=1, its input features? An output feature is a row of it, dim=0 (of weight.T, dim=1)"),
    (r"size of tensor a|expanded size|broadcast|shape .* is invalid",
     "is the bias still whole? To this rank's output features belongs the same part of it"),
]  # fmt: skip


def _column(answer, shape, wide, out, dtype, bias, seed):
    rank, counter = dist.get_rank(), FlopCounterMode(display=False)

    def counted(*inputs):
        with counter:
            return answer(*inputs)

    own = len(torch.arange(out).tensor_split(dist.get_world_size())[rank])
    g = values((*shape, own), dtype, 60 + rank, seed)  # each rank comes back with its own features' part
    seen = there_and_back(counted, layer(shape, wide, out, dtype, bias, seed), g)
    seen.kept["flops"] = counter.get_total_flops()
    return seen


def _judge(seen, inputs, features, about):
    x, weight, bias = inputs.values()
    n, whole = len(seen), x @ weight.T
    bias = whole.new_zeros(len(weight)) if bias is None else bias
    got, widths = [one.result for one in seen], [len(own) for own in features]
    _judge_widths(got, len(weight), x.shape[-1], widths, about)

    def split(y):
        return list(y.tensor_split(n, -1))

    expected, nth = split(whole + bias), [(whole + bias)[..., r::n] for r in range(n)]
    first_bias = [y + bias[:width] for y, width in zip(split(whole), widths, strict=True)]
    mistakes = {
        "every rank has rank 0's features: the rank is not used": expected[0],
        "the bias is left out": split(whole),
        "the bias is counted twice": split(whole + 2 * bias),
        f"the bias is divided by {n}: no other rank adds to these features": split(whole + bias / n),
        "the weight is this rank's part, but the bias is rank 0's: it is cut the same way": first_bias,
        "bias[rank] is one number: to this rank's output features belongs a part of bias, cut as the weight is": [
            y + one for y, one in zip(split(whole), bias, strict=False)
        ]
        if len(bias) >= n
        else None,
        "rank r has every n-th feature, from r on: the parts are to be contiguous": nth,
        "the parts are in reverse order": expected[::-1],
        "rank r has the part of rank r - 1": expected[-1:] + expected[:-1],
    }
    same(got, expected, "the result", about, mistakes.items())
    for rank, one in enumerate(seen):
        fair, made = 2 * x.numel() * widths[rank], one.kept["flops"]
        if made > 1.01 * fair:
            why = f"rank {rank} multiplies {made / max(fair, 1):.3g} times as much as its part needs"
            why = f"the result is right, but {why}: cut the weight before, not the result after"
            raise Wrong(why, about, f"{fair:,} floating point operations", f"{made:,}")
    back = [gradients(inputs, one.kept["g"], own) for one, own in zip(seen, features, strict=True)]
    f = "this is the sum over the ranks: that is the work of f, which stands before this layer"
    summed = {"x": {f: sum(grads["x"] for grads in back)}}
    judge_gradients(range(n), seen, back, summed, about, free="nothing is sent here")


def _judge_widths(got, out, wide, right, about):
    """Raise Wrong where the ranks have other numbers of features than asked for, in a way that is known."""
    n, widths = len(got), [y.shape[-1] if isinstance(y, torch.Tensor) and y.dim() else None for y in got]
    chunks, each = [len(chunk) for chunk in torch.arange(out).chunk(n)], out // n
    ways = {
        "every rank has all output features: only its own are asked for": [out] * n,
        "cut as torch.chunk cuts, which can leave the last rank little or nothing": chunks + [0] * (n - len(chunks)),
        f"every rank has {each} of the {out} output features: the remainder is on no rank": [each] * n,
        "the last rank has all of the remainder": [each] * (n - 1) + [out - each * (n - 1)],
        "the larger parts are on the last ranks": right[::-1],
        "cut by the number of input features: it is the output features that are dealt out": [wide // n] * n,
    }
    for why, given in ways.items():
        if widths == given != right:
            raise Wrong(f"{why}; torch.tensor_split is the rule", about, f"widths {right}", f"widths {widths}")


why = (
    "An output feature needs the whole input and nothing of the other features: so a rank with some rows of "
    "the weight works alone. Megatron's ColumnParallelLinear keeps only its own rows from the start, where "
    "you cut them out of the whole weight."
)
exercise = Exercise(hints, check, minutes=8, level="easy", why=why)
