"""The exercise column_forward."""

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from ..exercises.cases import values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from ..exercises.watch import watched
from .shared import F32, F64, changed, judge_gradients, layer, rows_of_rank, split, there_and_back, untouched

hints = (
    "torch's linear layer keeps its weight as (out, in): an output feature is a row of weight and an entry of "
    "bias. weight.tensor_split(n) cuts rows.",
    "With w = weight.tensor_split(n)[rank], the result is x @ w.T, and to it belongs the same part of the bias, "
    "bias.tensor_split(n)[rank].",
    "Cut first, multiply then: multiplying by the whole weight would do every rank's work on every rank.",
)


def check(run):
    for seed, (n, shape, wide, out, dtype, bias, new) in enumerate(COLUMN_CASES):
        about = f"{n} ranks, x {(*shape, wide)}, weight {(out, wide)}{'' if bias else ', no bias'}"
        try:
            seen = run(_column, shape, wide, out, dtype, bias, seed, n=n, about=about)
            _judge_column(seen, *layer(shape, wide, out, dtype, bias, seed), about)
        except Wrong as wrong:
            if new:
                wrong.diagnosis = f"{new}: {wrong.diagnosis}"
            raise


COLUMN_CASES = [  # ranks, shape of x, in, out, dtype, bias; what is new in it
    (4, (3,), 5, 8, F32, True, ""),
    (4, (3,), 5, 10, F32, True, "where 4 does not divide the output features"),
    (4, (3,), 5, 3, F32, True, "where there are fewer output features than ranks"),
    (4, (2, 3), 4, 8, F64, True, "where x has three dimensions"),
    (4, (), 4, 8, F32, True, "where x is one token alone, (in)"),
    (4, (3,), 5, 8, F32, False, "where bias is None"),
    (3, (2,), 7, 11, F64, True, "with 3 ranks (is a 4 written into it?)"),
    (2, (2,), 3, 6, F32, False, "with 2 ranks"),
]


def _column(answer, shape, wide, out, dtype, bias, seed):
    x, weight, b = layer(shape, wide, out, dtype, bias, seed)
    before = {"x": x.clone(), "weight": weight.clone(), "bias": None if b is None else b.clone()}
    counter = FlopCounterMode(display=False)

    def counted():
        with counter:
            return answer(x, weight, b)

    seen = watched(counted)
    seen.kept = {"flops": counter.get_total_flops(), "changed": changed(before, x=x, weight=weight, bias=b)}
    own = len(split(weight, dist.get_world_size())[dist.get_rank()])
    g = values((*shape, own), dtype, 60 + dist.get_rank(), seed)  # each rank comes back with its own features' part
    there_and_back(seen, answer, before, g)
    return seen


def _judge_column(seen, x, weight, bias, about):
    n, out = len(seen), len(weight)
    why = "it calls {op}: a column-parallel layer's forward sends nothing, its output stays in parts"
    only_calls(seen, (), {"": why})
    untouched(seen, about)
    zero = weight.new_zeros(out) if bias is None else bias
    whole = x @ weight.T
    expected = [part.clone() for part in split(whole + zero, n, -1)]
    got = [one.result for one in seen]
    widths = [y.shape[-1] if isinstance(y, torch.Tensor) and y.dim() else None for y in got]
    right, equal_parts = [p.shape[-1] for p in expected], [out // n] * n
    cut_up = [part.shape[-1] for part in whole.chunk(n, -1)]
    ways = [
        ([out] * n, "every rank has all output features: only its own are asked for"),
        (cut_up + [0] * (n - len(cut_up)), "cut as torch.chunk cuts, which can leave the last rank little or nothing"),
        (equal_parts, f"every rank has {out // n} of the {out} output features: the remainder is on no rank"),
        (equal_parts[1:] + [out - out // n * (n - 1)], "the last rank has all of the remainder"),
        (right[::-1], "the larger parts are on the last ranks"),
    ]
    for given, why in ways:
        if widths == given != right:
            raise Wrong(f"{why}; torch.tensor_split is the rule", about, f"widths {right}", f"widths {widths}")
    starts = [sum(right[:r]) for r in range(n)]
    first = [zero[:width] for width in right]
    strided = [(whole + zero)[..., r::n] for r in range(n)]
    mistakes = [
        ("every rank has rank 0's features: the rank is not used", [expected[0] if right[r] == right[0] else None
                                                                    for r in range(n)]),
        ("the bias is left out", list(split(whole, n, -1))),
        ("the bias is counted twice", list(split(whole + 2 * zero, n, -1))),
        (f"the bias is divided by {n}: no other rank adds to these features", list(split(whole + zero / n, n, -1))),
        ("the weight is this rank's part, but the bias is rank 0's: it is cut the same way",
         [whole[..., s : s + w] + b for s, w, b in zip(starts, right, first, strict=True)]),
        ("rank r has every n-th feature, from r on: the parts are to be contiguous",
         [s if s.shape == e.shape else None for s, e in zip(strided, expected, strict=True)]),
        ("the parts are in reverse order", [e if e.shape == expected[r].shape else None
                                            for r, e in enumerate(expected[::-1])]),
    ]  # fmt: skip
    same(got, expected, "the result", about, mistakes)
    for rank, one in enumerate(seen):
        fair = 2 * x.numel() * right[rank]
        if one.kept["flops"] > 1.01 * fair:
            raise Wrong(
                f"the result is right, but rank {rank} multiplies {one.kept['flops'] / max(fair, 1):.3g} times as much "
                "as its part needs: cut the weight before, not the result after", about,
                f"{fair:,} floating point operations", f"{one.kept['flops']:,}",
            )  # fmt: skip
    expected = []
    for rank, one in enumerate(seen):
        g, place = one.kept["g"], slice(starts[rank], starts[rank] + right[rank])
        flat = rows_of_rank(g)
        dw, db = torch.zeros_like(weight), weight.new_zeros(out)
        dw[place], db[place] = flat.T @ rows_of_rank(x), flat.sum(0)
        expected.append({"x": g @ weight[place], "weight": dw} | ({} if bias is None else {"bias": db}))
    summed = [("this is the sum over the ranks: that is the work of f, which stands before this layer",
               [sum(e["x"] for e in expected)] * n)]  # fmt: skip
    sent = "the gradients are right, but backward calls {op}: nothing is sent here"
    judge_gradients(seen, range(n), expected, {"x": summed}, sent, about)


exercise = Exercise(hints, check)
