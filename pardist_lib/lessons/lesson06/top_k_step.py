"""The exercise top_k_step."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.gradients import PAIRS
from ..exercises.judge import Wrong, only_calls, same
from ..exercises.watch import watched
from .shared import group, in_their_group

hints = (
    "wanted = gradient + residual is what this rank would like to add. wanted.abs().topk(k).indices are the "
    "places of its k largest elements; wanted[places] keeps their sign.",
    "Other ranks choose other places, so all_reduce cannot add them up: all_gather values and places, and add "
    "every rank's values in its own places.",
    "rest is wanted with zeros in the places that were sent. mean[places] += values / n adds; mean[places] = … "
    "would forget what another rank sent for the same place.",
)


def check(run):
    cases = [(4, 8, 2, F32, False), (4, 8, 2, F64, False), (3, 9, 1, F64, False), (2, 5, 5, F64, False),
             (4, 6, 3, F64, True), (4, 4000, 9, F64, False)]  # fmt: skip
    for seed, (n, size, k, dtype, in_pairs) in enumerate(cases):
        about = f"k = {k} of {size} {str(dtype)[6:]} on " + ("two groups of 2 ranks" if in_pairs else f"{n} ranks")
        seen = run(_compressed, size, k, dtype, seed, in_pairs, n=n, about=about)
        for members in PAIRS if in_pairs else [list(range(n))]:
            _judge_compressed([seen[r] for r in members], members, size, k, dtype, seed, about)
    about = "k = 2 of 6 float64 on 4 ranks, all equally large"
    _judge_ties(run(_compressed, 6, 2, F64, TIES, False, n=4, about=about), 6, 2, about)


TIES = 100  # a seed for elements of one size: which ones are sent is free, how many is not


def _vectors(size, dtype, seed, rank):
    """This rank's gradient and residual; the ranks like some places alike. The first case begins without residual."""
    if seed == TIES:
        return values((size,), dtype, rank, 3).sign(), torch.zeros(size, dtype=dtype)
    shared = values((size,), dtype, 77, seed)
    gradient = shared + values((size,), dtype, rank, seed)
    return gradient, torch.zeros_like(gradient) if seed == 0 else 2 * values((size,), dtype, 50 + rank, seed)


def _compressed(answer, size, k, dtype, seed, in_pairs):
    gradient, residual = _vectors(size, dtype, seed, dist.get_rank())
    seen = watched(answer, gradient, residual, k, **group(in_pairs))
    seen.kept = gradient, residual
    return seen


def _judge_ties(seen, size, k, about):
    given = [sum(_vectors(size, F64, TIES, rank)) for rank in range(len(seen))]
    for rank, (one, full) in enumerate(zip(seen, given, strict=True)):
        rest = one.result[1]
        if not bool(((rest == 0) | (rest == full)).all()) or int((rest != 0).sum()) != size - k:
            raise Wrong(f"exactly {k} elements are sent, and rest keeps all others: of equally large ones, too",
                        f"rank {rank}, rest, {about}", f"{size - k} elements of {full.tolist()} left",
                        f"{rest.tolist()}")  # fmt: skip
    mean = sum(full - one.result[1] for one, full in zip(seen, given, strict=True)) / len(seen)
    same([one.result[0] for one in seen], [mean] * len(seen), "mean", about)


def _chosen(values_, by, k):
    """`values_` where `by` is among its k largest, zero elsewhere."""
    return torch.zeros_like(values_).index_copy(0, by.topk(k).indices, values_[by.topk(k).indices])


def _judge_compressed(mine, members, size, k, dtype, seed, about):
    n, inputs = len(members), [_vectors(size, dtype, seed, rank) for rank in members]
    because = {
        "all_reduce": "it calls all_reduce, which sends all elements: all_gather what was chosen, with its places",
        "": "it calls {op}: all_gather brings every rank what the others have chosen",
    }
    only_calls(mine, ("all_gather",), because)
    in_their_group(members, mine, about)
    for rank, one, given in zip(members, mine, inputs, strict=True):
        if not all(torch.equal(a, b) for a, b in zip(one.kept, given, strict=True)):
            raise Wrong("gradient or residual was changed: neither is to be", f"rank {rank}, {about}")
        if not isinstance(one.result, (tuple, list)) or len(one.result) != 2:
            raise Wrong("it does not return a pair (mean, rest)", f"rank {rank}, {about}")
    wanted = [g + e for g, e in inputs]
    sent = [_chosen(w, w.abs(), k) for w in wanted]
    mean = sum(sent) / n
    last = torch.zeros_like(mean)
    for s in sent:
        last = torch.where(s != 0, s, last)
    shortened = {}
    for bits, kind in ((8, torch.uint8), (16, torch.float16)):
        places = [w.abs().topk(k).indices for w in wanted]
        shortened[bits] = sum(
            torch.zeros_like(mean).index_put((p.to(kind).long().clamp(max=size - 1),), w[p] / n, accumulate=True)
            for p, w in zip(places, wanted, strict=True)
        )
    misplaced = []
    for w in wanted:
        places = w.abs().topk(k).indices
        misplaced.append(
            torch.zeros_like(mean).index_copy(0, places, sum(v[v.abs().topk(k).indices] for v in wanted) / n)
        )
    plain = [g for g, _ in inputs]
    two = min(2, size)
    mistakes = [
        *[("k is not used: 2 elements of each rank are sent", sum(_chosen(w, w.abs(), two) for w in wanted) / n)
          ] * (k != two),
        ("the residual is not added before choosing: what was left out never gets its turn",
         sum(_chosen(g, g.abs(), k) for g in plain) / n),
        ("chosen among gradient alone: what was left out grows, but never gets its turn",
         sum(_chosen(w, g.abs(), k) for w, g in zip(wanted, plain, strict=True)) / n),
        ("gradient is sent where gradient + residual was chosen: what was left out stays out",
         sum(_chosen(g, w.abs(), k) for w, g in zip(wanted, plain, strict=True)) / n),
        ("the largest elements are chosen, not the largest in absolute value: negative ones never travel",
         sum(_chosen(w, w, k) for w in wanted) / n),
        ("the absolute values are sent: the sign is lost", sum(s.abs() for s in sent) / n),
        ("the smallest elements are chosen", sum(_chosen(w, -w.abs(), k) for w in wanted) / n),
        (f"the sum was not divided by {n}, the number of ranks", mean * n),
        ("where several ranks send the same place, only the last one counts: add, do not assign", last / n),
        ("where several ranks send the same place, only the last one counts, and nothing is divided", last),
        ("each rank has only what it sent itself", [s / n for s in sent]),
        ("each rank has only what it sent itself, undivided", sent),
        ("every rank's values are put in this rank's own places: gather the places, too", misplaced),
        ("divided by the number of ranks that sent the place, not by all of them: the others sent zero",
         sum(sent) / sum((s != 0).to(dtype) for s in sent).clamp(min=1)),
        (f"divided by the number of all ranks, 4, where the group has {n}", mean * n / 4),
        *((f"the places go through {bits} bits, too few for {size} of them", would)
          for bits, would in shortened.items()),
        ("it returns (rest, mean): mean comes first", [w - s for w, s in zip(wanted, sent, strict=True)]),
        ("this is the mean of everything: only k elements of each rank are to be sent", sum(wanted) / n),
    ]  # fmt: skip
    if k == size:
        mistakes = [m for m in mistakes if "everything" not in m[0] and "absolute" not in m[0]]
    mistakes = [(why, would if isinstance(would, list) else [would] * n) for why, would in mistakes]
    same([one.result[0] for one in mine], [mean] * n, "mean", about, mistakes, None, members)
    rest = [w - s for w, s in zip(wanted, sent, strict=True)]
    mistakes = [
        ("rest is always zero: what was not sent is forgotten", [torch.zeros_like(mean)] * n),
        ("rest still holds what was sent: it would be sent again", wanted),
        ("rest leaves the old residual out: gradient + residual - sent is left",
         [g - s for g, s in zip(plain, sent, strict=True)]),
        ("rest leaves the old residual out where nothing was sent",
         [torch.where(s != 0, 0, g) for g, s in zip(plain, sent, strict=True)]),
        ("rest counts the old residual twice", [e + w - s for (_, e), w, s in zip(inputs, wanted, sent, strict=True)]),
        ("rest is what was sent: what was not sent is asked for", sent),
        ("rest subtracts the ranks' mean: each rank keeps what it has not sent itself", [w - mean for w in wanted]),
        ("rest is the old residual, unchanged", [e for _, e in inputs]),
        ("rest has zeros where any rank sent: this rank's own places only", [w * (mean == 0) for w in wanted]),
    ]  # fmt: skip
    same([one.result[1] for one in mine], rest, "rest", about, mistakes, None, members)
    for rank, one in zip(members, mine, strict=True):
        made, most = (
            sum(call.bytes for call in one.calls) // n,
            k * (mean.element_size() + 8),
        )  # what comes in is n times
        if made > most:
            raise Wrong("the result is right, but more travels than k elements and k places", f"rank {rank}, {about}",
                        f"at most {most:,} bytes", f"{made:,} bytes")  # fmt: skip
        if len(one.calls) > 2:
            raise Wrong(f"the result is right, but it takes {len(one.calls)} calls: one for the elements and one for "
                        "their places are enough", f"rank {rank}, {about}")  # fmt: skip


exercise = Exercise(hints, check)
