"""mean_by_rows: a mean of gradients that counts rows, not ranks; a rank without rows must not spoil it with its NaN."""

import math

import torch

from ..exercises.cases import F32, F64, PAIRS, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, show
from ..exercises.runs import ALONE, few_bytes, in_groups, named, only_all_reduce, same_mean
from .shared import OTHER_CALLS

hints = (
    "A mean over rows times the number of rows is a sum over rows; sums may be added up over the ranks.",
    "total = gradient * rows, all-reduced; the rows all-reduced too; divide at the end, once.",
    "A rank without rows: NaN * 0 is NaN, and it would be everybody's. It takes part with zeros: "
    "torch.zeros_like(gradient).",
)


def check(run):
    cases = [  # each rank's rows, numbers, dtype, groups, a rank that has rows and a NaN
        ([10, 10, 10, 2], 6, F64, ()), ([8, 8, 8, 8], 5, F32, ()), ([30, 1, 7], 4, F64, ()), ([3, 5], 7, F32, ()),
        ([4, 50, 9, 1], 3, F64, PAIRS), ([12, 0, 5, 3], 6, F64, ()), ([2, 9, 4, 6], 4, F32, ALONE),
        ([0, 6, 1, 0], 5, F64, PAIRS), ([121, 100, 90], 3, F64, ()), ([6, 3, 0, 5], 4, F64, (), 1),
    ]  # fmt: skip
    stuck = "the ranks do not make the same calls: a rank without rows takes part, with zeros"
    for seed, (rows, d, dtype, groups, *spoilt) in enumerate(cases):
        about = f"{rows} rows on {named(groups, len(rows))}"
        about += "".join(f", rank {r}'s gradient has a NaN" for r in spoilt)
        given = [(values((d,), dtype, r, seed) if many else torch.full((d,), math.nan, dtype=dtype), many)
                 for r, many in enumerate(rows)]  # fmt: skip
        for rank in spoilt:
            given[rank][0][1] = math.nan
        for members, seen in in_groups(run, given, groups, about, stuck):
            if spoilt:
                _judge_spoilt(seen, about)
            else:
                _judge(members, seen, given, dtype, about)


def _judge_spoilt(seen, about):
    for rank, one in enumerate(seen):
        if not isinstance(one.result, torch.Tensor) or not one.result.isnan()[1]:
            why = "a rank with rows has a NaN in its gradient, and the mean hides it: rows == 0 is what counts as zeros"
            raise Wrong(why, f"rank {rank}, {about}", "NaN as element 1", show(one.result, 1))


def _judge(members, seen, given, dtype, about):
    only_all_reduce(members, seen, OTHER_CALLS, "`gradient` has", about)
    g, rows = [gradient.double().nan_to_num() for gradient, _ in given], [many for _, many in given]
    n, some = len(members), [r for r in members if rows[r]]
    if any(isinstance(one.result, torch.Tensor) and one.result.isnan().any() for one in seen) and len(some) < n:
        raise Wrong("a rank without rows makes everybody's mean NaN: NaN · 0 is NaN, so it has to give zeros", about)

    def total(ranks, weight=lambda many: many):
        return sum(weight(rows[r]) * g[r] for r in ranks if rows[r])

    every, means = range(len(rows)), total(members, lambda many: 1)
    here, many, all_rows = total(members), sum(rows[r] for r in members), sum(rows)
    mistakes = [
        ("a mean of means: every rank counts the same, whatever rows it has", means / n),
        ("a mean of the means of those ranks that have rows", means / len(some)),
        ("the sum of the ranks' means: nothing is divided", means),
        ("the sum of the ranks' means, divided by all rows: each has to be multiplied by its own rows first",
         means / many),
        ("multiplied by the rows and never divided", here),
        (f"divided by the {n} ranks, not by all {many} rows", here / n),
        (f"divided by the {n} ranks as well: the weights n_r / N add up to 1 already", here / many / n),
        ("the weight is n · n_r / N, as for a mean over the ranks: this is `ranks` times too large", here / many * n),
        ("divided by this rank's own rows: all rows are asked for", [here / max(rows[r], 1) for r in members]),
        ("nothing was exchanged: this is the rank's own gradient", [g[r] for r in members]),
        ("the group argument is ignored: this is the mean over all ranks", total(every) / all_rows),
        ("the group argument is ignored where the rows are added up", here / all_rows),
        ("the group argument is ignored where the gradients are added up", total(every) / many),
        ("the weights are upside down: more rows have to count more",
         total(some, lambda many: 1 / many) / sum(1 / rows[r] for r in some)),
        ("the rows are added up in a tensor of 8 bits, which ends at 255: an int64 or a float holds them",
         here / (many % 256)),
        ("the weights are squared: multiplied by the rows twice", total(members, lambda many: many**2) / many),
    ]  # fmt: skip
    same_mean(members, [one.result for one in seen], here / many, dtype, about, mistakes)
    few_bytes(members, seen, here, dtype, about)


WHY = (
    "Sums and counts add up over ranks, means do not. DDP averages means, right for equal shares only; for others"
    " its users multiply the loss by n · rows / all rows."
)

exercise = Exercise(hints, check, minutes=10, level="medium", why=WHY)
