"""The exercise row_forward."""

import torch
import torch.distributed as dist

from ..exercises.cases import values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from ..exercises.watch import watched
from ..worlds import group_of
from .shared import (
    ALL,
    F32,
    F64,
    PAIRS,
    changed,
    judge_gradients,
    layer,
    members_of,
    rows_of_rank,
    split,
    there_and_back,
    untouched,
)

hints = (
    "A rank's x @ weight.T has the shape of the whole result, but is only a summand of it: what do the ranks have "
    "to do with their summands?",
    "dist.all_reduce(y, group=group) replaces y by the sum over the ranks, on every rank.",
    "Whatever is added before the all_reduce is added by every rank. The bias belongs into the result once.",
    "Backward is g's: a torch.autograd.Function whose forward returns the sum of all ranks' y, and whose backward "
    "returns the gradient as it came, for every rank has it already.",
)


def check(run):
    for seed, (n, groups, shape, wide, out, dtype, bias, new) in enumerate(ROW_CASES):
        about = f"{n} ranks, whole input {(*shape, wide)}, whole weight {(out, wide)}{'' if bias else ', no bias'}"
        about += ", groups (0, 2) and (1, 3)" if groups else ""
        try:
            seen = run(_row, groups, shape, wide, out, dtype, bias, seed, n=n, about=about)
            _judge_row(seen, groups or (tuple(range(n)),), layer(shape, wide, out, dtype, bias, seed)[2], about)
        except Wrong as wrong:
            if new:
                wrong.diagnosis = f"{new}: {wrong.diagnosis}"
            raise


ROW_CASES = [  # ranks, groups, shape of x, in, out, dtype, bias; what is new in it
    (4, ALL, (3,), 8, 5, F32, True, ""),
    (4, ALL, (3,), 10, 5, F64, True, "where 4 does not divide the input features"),
    (4, ALL, (3,), 3, 5, F32, True, "where there are fewer input features than ranks"),
    (4, ALL, (2, 3), 8, 1, F64, True, "where x has three dimensions"),
    (4, ALL, (3,), 8, 5, F32, False, "where bias is None"),
    (3, ALL, (2,), 7, 4, F64, True, "with 3 ranks (is a 4 written into it?)"),
    (2, ALL, (2,), 3, 6, F32, True, "with 2 ranks"),
    (4, PAIRS, (2,), 5, 3, F64, True, "in two groups of 2 ranks"),
]


def _row(answer, groups, shape, wide, out, dtype, bias, seed):
    rank, options = dist.get_rank(), {}
    x, weight, b = layer(shape, wide, out, dtype, bias, seed)
    members = members_of(groups, rank)
    if groups:
        made = [group_of(g) for g in groups]
        options = {"group": next(g for g, ranks in zip(made, groups, strict=True) if rank in ranks)}
        x = x + groups.index(members)  # the groups have something else to do each
    x, weight = (split(t, len(members), -1)[members.index(rank)].clone() for t in (x, weight))
    before = {"x": x.clone(), "weight": weight.clone(), "bias": None if b is None else b.clone()}
    seen = watched(answer, x, weight, b, **options)
    seen.kept = {"changed": changed(before, x=x, weight=weight, bias=b), "x": before["x"], "weight": before["weight"]}
    g = values((*shape, out), dtype, 60 + members[0], seed)  # the same on every rank of a group, as its loss is
    there_and_back(seen, answer, before, g, **options)
    return seen


ROW_CALLS = {
    "reduce": "it calls reduce, which brings the sum to one rank only: every rank needs the output",
    "all_gather": "it calls all_gather, which brings every summand to every rank, n times as many bytes as a sum: "
    "all_reduce adds up on the way",
    "broadcast": "it broadcasts one rank's tensor: the output is the sum of all ranks'",
    "": "it calls {op}: one all_reduce of the output is all that is needed",
}


def _judge_row(seen, groups, bias, about):
    only_calls(seen, ("all_reduce",), ROW_CALLS)
    untouched(seen, about)
    summands = [one.kept["x"] @ one.kept["weight"].T for one in seen]
    zero = summands[0].new_zeros(summands[0].shape[-1]) if bias is None else bias
    everywhere = sum(summands)
    for members in groups:
        n, mine = len(members), [summands[r] for r in members]
        total = sum(mine)
        mistakes = [
            (f"the bias is added {n} times, once by each rank: add it after the all_reduce", [total + n * zero] * n),
            ("the bias is in the output of rank 0 only: add it before the all_reduce there, or after it everywhere",
             [total + zero * (r == members[0]) for r in members]),
            ("the bias is left out", [total] * n),
            ("nothing was added up: each rank has its own summand", [m + zero for m in mine]),
            ("nothing was added up: each rank has its own summand", mine),
            (f"divided by {n}: the output is the sum of the summands, not their mean", [total / n + zero] * n),
            (f"divided by {n}: the output is the sum of the summands, not their mean", [(total + n * zero) / n] * n),
            ("it takes the MAX over the ranks, not the sum", [torch.stack(mine).amax(0) + zero] * n),
            ("the bias is counted twice", [total + 2 * zero] * n),
        ]  # fmt: skip
        if n < len(seen):
            mistakes[:0] = [
                ("the group argument is ignored: this is the sum over all ranks", [everywhere + zero] * n),
                ("the group argument is ignored: this is the sum over all ranks", [everywhere + len(seen) * zero] * n),
            ]
        same([seen[r].result for r in members], [total + zero] * n, "the output", about, mistakes, labels=list(members))
        for rank in members:
            made, fair = [call.bytes for call in seen[rank].calls], total.numel() * total.element_size()
            if sum(made) != fair or len(made) > 1:
                raise Wrong(
                    f"the output is right, but {len(made)} all_reduce of {sum(made):,} bytes are made for an output of "
                    f"{fair:,}", f"rank {rank}, {about}", f"1 of {fair:,} bytes", f"{len(made)} of {sum(made):,} bytes",
                )  # fmt: skip
        _judge_row_backward(seen, members, bias, about)


def _judge_row_backward(seen, members, bias, about):
    n, expected, mistakes = len(members), [], {}
    for rank in members:
        x, weight, g = (seen[rank].kept[name] for name in ("x", "weight", "g"))
        grads = {"x": g @ weight, "weight": rows_of_rank(g).T @ rows_of_rank(x), "bias": rows_of_rank(g).sum(0)}
        expected.append(grads if bias is not None else {k: grads[k] for k in ("x", "weight")})
    for name in expected[0]:
        what = [e[name] for e in expected]
        mistakes[name] = [
            (f"the output is right, its backward {n} times too large: every rank comes back with the whole gradient, "
             f"and adding {n} equal ones counts it {n} times", [n * w for w in what]),
            (f"the output is right, its backward divided by {n}: "
             + ("a share of the bias from each rank gets a share of its gradient; add it whole, after the sum"
                if name == "bias" else "the gradient of a sum goes on to each summand whole"), [w / n for w in what]),
        ]  # fmt: skip
    sent = "the gradients are right, but backward calls {op}: every rank has the whole gradient already"
    judge_gradients(seen, members, expected, mistakes, sent, about)


exercise = Exercise(hints, check)
