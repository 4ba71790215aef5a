"""The exercise mean_by_rows."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, show
from ..exercises.watch import watched
from .shared import ALONE, NAN, OTHER_CALLS, PAIRS, compare, frugal, named

hints = (
    "A mean over rows times the number of rows is a sum over rows; sums may be added up over the ranks.",
    "total = gradient * rows, all-reduced; the rows all-reduced too; divide at the end, once.",
    "A rank without rows: NaN * 0 is NaN, and it would be everybody's. It takes part with zeros: "
    "torch.zeros_like(gradient).",
)


def check(run):
    cases = [([10, 10, 10, 2], 6, F64, ()), ([8, 8, 8, 8], 5, F32, ()), ([30, 1, 7], 4, F64, ()),
             ([3, 5], 7, F32, ()), ([4, 50, 9, 1], 3, F64, PAIRS), ([12, 0, 5, 3], 6, F64, ()),
             ([2, 9, 4, 6], 4, F32, ALONE), ([0, 6, 1, 0], 5, F64, PAIRS), ([121, 100, 90], 3, F64, ()),
             ([6, 3, 0, 5], 4, F64, (), 1)]  # fmt: skip
    for seed, (rows, d, dtype, groups, *spoilt) in enumerate(cases):
        n = len(rows)
        about = f"{rows} rows on {named(groups, n)}"
        stuck = "the ranks do not make the same calls: a rank without rows takes part, with zeros"
        seen = run(_mean_by_rows, rows, d, dtype, seed, groups, *spoilt or [None], n=n, about=about, stuck=stuck)
        if spoilt:
            _judge_spoilt(seen, f"{about}, rank {spoilt[0]}'s gradient has a NaN")
            continue
        for members in groups or [list(range(n))]:
            _judge_means([seen[r] for r in members], members, rows, d, dtype, seed, about)


def _mean_by_rows(answer, rows, d, dtype, seed, groups, spoilt):
    rank = dist.get_rank()
    mine = values((d,), dtype, rank, seed) if rows[rank] else torch.full((d,), NAN, dtype=dtype)
    if rank == spoilt:
        mine[1] = NAN
    given = mine.clone()
    seen = watched(answer, given, rows[rank], **mine(groups))
    seen.kept = torch.allclose(mine, given, 0, 0, equal_nan=True)
    return seen


def _judge_spoilt(seen, about):
    for rank, one in enumerate(seen):
        if not isinstance(one.result, torch.Tensor) or not one.result.isnan()[1]:
            why = "a rank with rows has a NaN in its gradient, and the mean hides it: rows == 0 is what counts as zeros"
            raise Wrong(why, f"rank {rank}, {about}", "NaN as element 1", show(one.result, 1))


def _judge_means(seen, members, rows, d, dtype, seed, about):
    only_calls(seen, ("all_reduce",), OTHER_CALLS)
    for rank, one in zip(members, seen, strict=True):
        if not one.kept:
            raise Wrong("`gradient` has changed: work on a new tensor", f"rank {rank}, {about}")
    n, everyone = len(seen), range(len(rows))
    g = {r: values((d,), dtype, r, seed).double() if rows[r] else torch.zeros(d, dtype=F64) for r in everyone}
    some = [r for r in members if rows[r]]

    def total(of):
        return sum(rows[r] * g[r] for r in of)

    many, all_rows = sum(rows[r] for r in members), sum(rows)
    if any(isinstance(one.result, torch.Tensor) and one.result.isnan().any() for one in seen) and len(some) < n:
        raise Wrong("a rank without rows makes everybody's mean NaN: NaN · 0 is NaN, so it has to give zeros", about)
    outside = n < len(rows)
    uneven = len({rows[r] for r in members}) > 1
    means = sum(g[r] for r in members)
    mistakes = [
        ("a mean of means: every rank counts the same, whatever rows it has", means / n if uneven else None),
        ("a mean of the means of those ranks that have rows", means / len(some) if uneven else None),
        ("the sum of the ranks' means: nothing is divided", means),
        ("the sum of the ranks' means, divided by all rows: each has to be multiplied by its own rows first",
         means / many),
        ("multiplied by the rows and never divided", total(members)),
        (f"divided by the {n} ranks, not by all {many} rows", total(members) / n),
        (f"divided by the {n} ranks as well: the weights n_r / N add up to 1 already", total(members) / many / n),
        ("the weight is n · n_r / N, as for a mean over the ranks: this is `ranks` times too large",
         total(members) / many * n),
        ("divided by this rank's own rows: all rows are asked for",
         [total(members) / max(rows[r], 1) for r in members]),
        ("nothing was exchanged: this is the rank's own gradient", [g[r] for r in members]),
        ("the group argument is ignored: this is the mean over all ranks",
         total(everyone) / all_rows if outside else None),
        ("the group argument is ignored where the rows are added up", total(members) / all_rows if outside else None),
        ("the group argument is ignored where the gradients are added up", total(everyone) / many if outside else None),
        ("the weights are upside down: more rows have to count more",
         sum(g[r] / rows[r] for r in some) / sum(1 / rows[r] for r in some) if uneven and some else None),
        ("the rows are added up in a tensor of 8 bits, which ends at 255: an int64 or a float holds them",
         total(members) / (many % 256) if many > 255 else None),
        ("the weights are squared: multiplied by the rows twice", sum(rows[r] ** 2 * g[r] for r in members) / many),
    ]  # fmt: skip
    compare([one.result for one in seen], total(members) / many, dtype, about, mistakes, members)
    frugal(seen, members, d, dtype, about)


exercise = Exercise(hints, check)
