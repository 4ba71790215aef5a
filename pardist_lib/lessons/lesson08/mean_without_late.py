"""The exercise mean_without_late."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, show
from ..exercises.watch import watched
from .shared import ALONE, OTHER_CALLS, PAIRS, compare, frugal, named, pair

hints = (
    "A late rank takes part in every call, or the others wait for it after all. What does it add to a sum so that "
    "the sum does not change?",
    "Zeros for the gradient, and 0 for the rows: both. If its rows were counted, the mean would be over rows whose "
    "gradients are not in it.",
    "The gradients are of sums, so nothing is multiplied: Σ gradient / Σ rows, both over the ranks in time. "
    "int(many.item()) makes a tensor with one number an int.",
)


def check(run):
    cases = [([6, 4, 9, 2], [3], 5, F64, ()), ([6, 6, 6, 6], [], 4, F32, ()), ([8, 1, 12], [0, 1], 6, F64, ()),
             ([9, 4], [1], 3, F32, ()), ([5, 3, 2, 8], [0, 3], 4, F64, PAIRS), ([7, 0, 3, 4], [2], 5, F64, ()),
             ([2, 3, 4, 5], [], 3, F64, ALONE), ([121, 100, 90], [], 4, F64, ())]  # fmt: skip
    for seed, (rows, late, d, dtype, groups) in enumerate(cases):
        n = len(rows)
        who = f"late: {', '.join(map(str, late)) or 'nobody'}"
        about = f"{rows} rows on {named(groups, n)}, {who}"
        stuck = "the ranks do not make the same calls: a late rank has to take part in the all_reduce, with zeros"
        seen = run(_mean_without_late, rows, late, d, dtype, seed, groups, n=n, about=about, stuck=stuck)
        for members in groups or [list(range(n))]:
            _judge_late([seen[r] for r in members], members, rows, late, d, dtype, seed, about)


def _mean_without_late(answer, rows, late, d, dtype, seed, groups):
    rank = dist.get_rank()
    mine = values((d,), dtype, rank, seed) * rows[rank]
    given = mine.clone()
    seen = watched(answer, given, rows[rank], rank in late, **mine(groups))
    seen.kept = torch.equal(mine, given)
    return seen


def _judge_late(seen, members, rows, late, d, dtype, seed, about):
    only_calls(seen, ("all_reduce",), OTHER_CALLS)
    for rank, one in zip(members, seen, strict=True):
        if not one.kept:
            raise Wrong("`gradient` has changed: work on a new tensor", f"rank {rank}, {about}")
        pair(one.result, "(mean, rows)", f"rank {rank}, {about}")
    g = {r: (values((d,), dtype, r, seed) * rows[r]).double() for r in range(len(rows))}
    kept = [r for r in members if r not in late]
    n, outside, everyone = len(members), len(members) < len(rows), [r for r in range(len(rows)) if r not in late]

    def total(of):
        return sum(g[r] for r in of)

    def many(of):
        return sum(rows[r] for r in of)

    some = bool(set(members) & set(late))
    mean, per_rank = total(kept) / many(kept), [g[r] / max(rows[r], 1) for r in kept]
    mistakes = [
        ("the dropped ranks' rows are still counted: the mean is over rows whose gradients are not in it, and the step "
         "is too short", total(kept) / many(members) if some else None),
        ("late ranks are not dropped: their gradients and rows are still in it",
         total(members) / many(members) if some else None),
        ("the late ranks' gradients are still in it, only their rows are not",
         total(members) / many(kept) if some else None),
        ("a mean of means: the ranks in time all count the same", sum(per_rank) / len(kept)),
        (f"divided by the {n} ranks: the rows in time are asked for", total(kept) / n),
        (f"divided by the {len(kept)} ranks that were in time: by their rows is asked for", total(kept) / len(kept)),
        ("nothing is divided: this is the sum", total(kept)),
        ("divided by the rows, and by the number of ranks again", mean / n),
        ("divided by the rows, and by the number of ranks in time again", mean / len(kept)),
        ("scaled up by ranks / ranks in time: the division by the rows does it already", mean * n / len(kept)),
        ("multiplied by the rows: the gradients are of sums already", sum(rows[r] * g[r] for r in kept) / many(kept)),
        ("divided by this rank's own rows", [total(kept) / max(rows[r], 1) for r in members]),
        ("the rows are added up in a tensor of 8 bits, which ends at 255: an int64 or a float holds them",
         total(kept) / (many(kept) % 256) if many(kept) > 255 else None),
        ("`late` is taken the wrong way round: the punctual were dropped",
         total([r for r in members if r in late]) / max(many([r for r in members if r in late]), 1) if some else None),
        ("a late rank keeps its own gradient: it needs the mean as the others do, to stay equal",
         [mean if r in kept else g[r] for r in members]),
        ("a late rank ends with zeros: it needs the mean as the others do, to stay equal",
         [mean if r in kept else g[r] * 0 for r in members]),
        ("nothing was exchanged: this is the rank's own mean", [g[r] / max(rows[r], 1) for r in members]),
        ("the group argument is ignored: this is the mean over all ranks",
         total(everyone) / many(everyone) if outside else None),
        ("the group argument is ignored where the rows are added up",
         total(kept) / many(everyone) if outside else None),
    ]  # fmt: skip
    compare([one.result[0] for one in seen], mean, dtype, about, mistakes, members)
    for rank, one in zip(members, seen, strict=True):
        counted, label = one.result[1], f"rank {rank}, {about}"
        if isinstance(counted, bool) or not isinstance(counted, int):
            said = show(counted) if isinstance(counted, torch.Tensor) else f"{counted!r:.40}"
            raise Wrong("the number of rows is to be an int: int(many.item())", label, str(many(kept)), said)
        if counted != many(kept):
            known = {
                many(members): "all ranks' rows: the dropped ranks' are not to be counted",
                rows[rank]: "this rank's own rows",
                len(kept): "the number of ranks in time",
                n: "the number of ranks",
            }
            said = known.get(counted, "another number")
            raise Wrong(f"the number of rows is {said}", label, str(many(kept)), str(counted))
    frugal(seen, members, d, dtype, about)


exercise = Exercise(hints, check)
