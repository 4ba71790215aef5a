"""mean_without_late: a mean over the ranks in time, on all of them; the late ones' rows are easily counted still."""

import torch

from ..exercises.cases import F32, F64, PAIRS, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, show
from ..exercises.runs import ALONE, few_bytes, in_groups, named, only_all_reduce, pair, same_mean
from .shared import OTHER_CALLS

hints = (
    "A late rank takes part in every call, or the others wait for it after all. What does it add to a sum so that "
    "the sum does not change?",
    "Zeros for the gradient, and 0 for the rows: both. If its rows were counted, the mean would be over rows whose "
    "gradients are not in it.",
    "The gradients are of sums, so nothing is multiplied: Σ gradient / Σ rows, both over the ranks in time. "
    "int(many.item()) makes a tensor with one number an int.",
)


def check(run):
    cases = [  # each rank's rows, who is late, numbers, dtype, groups
        ([6, 4, 9, 2], [3], 5, F64, ()), ([6, 6, 6, 6], [], 4, F32, ()), ([8, 1, 12], [0, 1], 6, F64, ()),
        ([9, 4], [1], 3, F32, ()), ([5, 3, 2, 8], [0, 3], 4, F64, PAIRS), ([7, 0, 3, 4], [2], 5, F64, ()),
        ([2, 3, 4, 5], [], 3, F64, ALONE), ([121, 100, 90], [], 4, F64, ()),
    ]  # fmt: skip
    stuck = "the ranks do not make the same calls: a late rank has to take part in the all_reduce, with zeros"
    for seed, (rows, late, d, dtype, groups) in enumerate(cases):
        about = f"{rows} rows on {named(groups, len(rows))}, late: {', '.join(map(str, late)) or 'nobody'}"
        given = [(values((d,), dtype, r, seed) * many, many, r in late) for r, many in enumerate(rows)]
        for members, seen in in_groups(run, given, groups, about, stuck):
            _judge(members, seen, given, dtype, about)


def _judge(members, seen, given, dtype, about):
    only_all_reduce(members, seen, OTHER_CALLS, "`gradient` has", about)
    for rank, one in zip(members, seen, strict=True):
        pair(one.result, "(mean, rows)", f"rank {rank}, {about}")
    g, rows, late = [gradient.double() for gradient, *_ in given], [one[1] for one in given], [one[2] for one in given]
    everyone = [r for r in range(len(rows)) if not late[r]]
    kept, dropped = [r for r in members if not late[r]], [r for r in members if late[r]]
    n, own = len(members), [g[r] / max(rows[r], 1) for r in range(len(rows))]

    def total(of):
        return sum(g[r] for r in of)

    def many(of):
        return sum(rows[r] for r in of)

    mean = total(kept) / many(kept)
    mistakes = [
        ("the dropped ranks' rows are still counted: the mean is over rows whose gradients are not in it, and the step "
         "is too short", total(kept) / many(members)),
        ("late ranks are not dropped: their gradients and rows are still in it", total(members) / many(members)),
        ("the late ranks' gradients are still in it, only their rows are not", total(members) / many(kept)),
        ("a mean of means: the ranks in time all count the same", sum(own[r] for r in kept) / len(kept)),
        (f"divided by the {n} ranks: the rows in time are asked for", total(kept) / n),
        (f"divided by the {len(kept)} ranks that were in time: by their rows is asked for", total(kept) / len(kept)),
        ("nothing is divided: this is the sum", total(kept)),
        ("divided by the rows, and by the number of ranks again", mean / n),
        ("divided by the rows, and by the number of ranks in time again", mean / len(kept)),
        ("scaled up by ranks / ranks in time: the division by the rows does it already", mean * n / len(kept)),
        ("multiplied by the rows: the gradients are of sums already", sum(rows[r] * g[r] for r in kept) / many(kept)),
        ("divided by this rank's own rows", [total(kept) / max(rows[r], 1) for r in members]),
        ("the rows are added up in a tensor of 8 bits, which ends at 255: an int64 or a float holds them",
         total(kept) / (many(kept) % 256)),
        ("`late` is taken the wrong way round: the punctual were dropped",
         total(dropped) / max(many(dropped), 1) if dropped else None),
        ("a late rank keeps its own gradient: it needs the mean as the others do, to stay equal",
         [g[r] if late[r] else mean for r in members]),
        ("a late rank ends with zeros: it needs the mean as the others do, to stay equal",
         [mean * (not late[r]) for r in members]),
        ("nothing was exchanged: this is the rank's own mean", [own[r] for r in members]),
        ("the group argument is ignored: this is the mean over all ranks", total(everyone) / many(everyone)),
        ("the group argument is ignored where the rows are added up", total(kept) / many(everyone)),
    ]  # fmt: skip
    same_mean(members, [one.result[0] for one in seen], mean, dtype, about, mistakes)
    for rank, one in zip(members, seen, strict=True):
        counted, where = one.result[1], f"rank {rank}, {about}"
        if isinstance(counted, bool) or not isinstance(counted, int):
            said = show(counted) if isinstance(counted, torch.Tensor) else f"{counted!r:.40}"
            raise Wrong("the number of rows is to be an int: int(many.item())", where, str(many(kept)), said)
        if counted != many(kept):
            known = {
                many(members): "all ranks' rows: the dropped ranks' are not to be counted",
                rows[rank]: "this rank's own rows",
                len(kept): "the number of ranks in time",
                n: "the number of ranks",
            }
            said = known.get(counted, "another number")
            raise Wrong(f"the number of rows is {said}", where, str(many(kept)), str(counted))
    few_bytes(members, seen, mean, dtype, about)


WHY = (
    "A late rank sends zeros and counts no rows, so that the mean is that of the others. Chen et al. drop late "
    "gradients at a server; synchronous DDP and FSDP always wait for everybody."
)

exercise = Exercise(hints, check, minutes=10, level="medium", why=WHY)
