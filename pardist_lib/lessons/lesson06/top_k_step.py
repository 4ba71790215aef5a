"""The k largest elements averaged. Typical: no residual, or sent again; no sign; one place from several ranks."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, call, groups_of, own_group, untouched, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, only_within, same

hints = (
    "wanted = gradient + residual is what this rank would like to add. wanted.abs().topk(k).indices are the "
    "places of its k largest elements; wanted[places] keeps their sign.",
    "Other ranks choose other places, so all_reduce cannot add them up: all_gather values and places, and add "
    "every rank's values in its own places.",
    "rest is wanted with zeros in the places that were sent. mean[places] += values / n adds; mean[places] = … "
    "would forget what another rank sent for the same place.",
)
TIES = 6  # the case of elements of one size: which of them are sent is free, how many is not
OTHER_CALLS = {
    "all_reduce": "it calls all_reduce, which sends all elements: all_gather what was chosen, with its places",
    "": "it calls {op}: all_gather brings every rank what the others have chosen",
}


def check(run):
    cases = [(4, 8, 2, F32, False), (4, 8, 2, F64, False), (3, 9, 1, F64, False), (2, 5, 5, F64, False)]
    cases += [(4, 6, 3, F64, True), (4, 4000, 9, F64, False), (4, 6, 2, F64, False)]
    for case, (n, size, k, dtype, in_pairs) in enumerate(cases):
        about = f"k = {k} of {size} {str(dtype)[6:]} on " + ("two groups of 2 ranks" if in_pairs else f"{n} ranks")
        about += ", all equally large" * (case == TIES)
        seen = run(_compressed, size, k, dtype, case, in_pairs, n=n, about=about)
        only_calls(seen, ("all_gather",), OTHER_CALLS)
        for members in groups_of(in_pairs, n):
            only_within(members, [seen[r] for r in members], about)
        untouched(seen, about)
        for rank, one in enumerate(seen):
            if not isinstance(one.result, (tuple, list)) or len(one.result) != 2:
                raise Wrong("it does not return a pair (mean, rest)", f"rank {rank}, {about}")
        for members in groups_of(in_pairs, n):
            judge = _judge_ties if case == TIES else _judge
            judge(members, [seen[r] for r in members], size, k, dtype, case, about)


def _vectors(size, dtype, case, rank):
    """This rank's gradient and residual; the ranks like some places alike. The first case begins without residual."""
    if case == TIES:
        return values((size,), dtype, rank, 3).sign(), torch.zeros(size, dtype=dtype)
    gradient = values((size,), dtype, 77, case) + values((size,), dtype, rank, case)
    return gradient, torch.zeros_like(gradient) if case == 0 else 2 * values((size,), dtype, 50 + rank, case)


def _compressed(answer, size, k, dtype, case, in_pairs):
    gradient, residual = _vectors(size, dtype, case, dist.get_rank())
    return call(answer, {"gradient": gradient, "residual": residual}, k, **own_group(in_pairs))


def _judge_ties(members, mine, size, k, dtype, case, about):
    full = [sum(_vectors(size, dtype, case, rank)) for rank in members]
    for rank, one, all_of_it in zip(members, mine, full, strict=True):
        rest = one.result[1]
        if not bool(((rest == 0) | (rest == all_of_it)).all()) or int((rest != 0).sum()) != size - k:
            why = f"exactly {k} elements are sent, and rest keeps all others: of equally large ones, too"
            shown = f"{size - k} elements of {all_of_it.tolist()} left", f"{rest.tolist()}"
            raise Wrong(why, f"rank {rank}, rest, {about}", *shown)
    mean = sum(all_of_it - one.result[1] for one, all_of_it in zip(mine, full, strict=True)) / len(mine)
    same([one.result[0] for one in mine], mean, "mean", about)


def _judge(members, mine, size, k, dtype, case, about):
    n, inputs = len(members), [_vectors(size, dtype, case, rank) for rank in members]
    gradient, residual = map(torch.stack, zip(*inputs, strict=True))  # here and below a row for each rank
    wanted = gradient + residual

    def chosen(rows, by, k=k):
        """`rows` where `by` is among the k largest of its row, zero elsewhere."""
        places = by.topk(k).indices
        return torch.zeros_like(rows).scatter(1, places, rows.gather(1, places))

    sent, places = chosen(wanted, wanted.abs()), wanted.abs().topk(k).indices
    mean, nothing, picked = sent.mean(0), torch.zeros_like(wanted), wanted.gather(1, places)
    last = nothing[0]
    for row in sent:
        last = torch.where(row != 0, row, last)

    def through(kind):  # the places, in so small a type
        at = places.to(kind).long().clamp(max=size - 1).flatten()
        return nothing[0].index_put((at,), picked.flatten() / n, accumulate=True)

    mistakes = [
        ("k is not used: 2 elements of each rank are sent", chosen(wanted, wanted.abs(), min(2, size)).mean(0)),
        ("the residual is not added before choosing: what was left out never gets its turn",
         chosen(gradient, gradient.abs()).mean(0)),
        ("chosen among gradient alone: what was left out grows, but never gets its turn",
         chosen(wanted, gradient.abs()).mean(0)),
        ("gradient is sent where gradient + residual was chosen: what was left out stays out",
         chosen(gradient, wanted.abs()).mean(0)),
        ("the largest elements are chosen, not the largest in absolute value: negative ones never travel",
         chosen(wanted, wanted).mean(0)),
        ("the absolute values are sent: the sign is lost", sent.abs().mean(0)),
        ("the smallest elements are chosen", chosen(wanted, -wanted.abs()).mean(0)),
        (f"the sum was not divided by {n}, the number of ranks", sent.sum(0)),
        (f"divided by k, {k}, not by {n}, the number of ranks", sent.sum(0) / k if k != n else None),
        ("where several ranks send the same place, only the last one counts: add, do not assign", last / n),
        ("where several ranks send the same place, only the last one counts, and nothing is divided", last),
        ("each rank has only what it sent itself", (sent / n).unbind()),
        ("each rank has only what it sent itself, undivided", sent.unbind()),
        ("every rank's values are put in this rank's own places: gather the places, too",
         nothing.scatter(1, places, picked.mean(0).expand(n, k)).unbind()),
        ("divided by the number of ranks that sent the place, not by all of them: the others sent zero",
         sent.sum(0) / (sent != 0).sum(0).clamp(min=1)),
        (f"divided by the number of all ranks, 4, where the group has {n}", sent.sum(0) / 4),
        (f"the places go through 8 bits, too few for {size} of them", through(torch.uint8)),
        (f"the places go through 16 bits, too few for {size} of them", through(torch.float16)),
        ("it returns (rest, mean): mean comes first", (wanted - sent).unbind()),
        ("the lists hold one tensor n times ([t] * n), so the last rank's counts for all: make n tensors", sent[-1]),
        ("this is the mean of everything: only k elements of each rank are to be sent", wanted.mean(0)),
    ]  # fmt: skip
    same([one.result[0] for one in mine], mean, "mean", about, mistakes, labels=members)
    mistakes = [
        ("rest is always zero: what was not sent is forgotten", nothing),
        ("rest still holds what was sent: it would be sent again", wanted),
        ("rest leaves the old residual out: gradient + residual - sent is left", gradient - sent),
        ("rest leaves the old residual out where nothing was sent", torch.where(sent != 0, 0, gradient)),
        ("rest counts the old residual twice", residual + wanted - sent),
        ("rest is what was sent: what was not sent is asked for", sent),
        ("rest subtracts the ranks' mean: each rank keeps what it has not sent itself", wanted - mean),
        ("rest is the old residual, unchanged", residual),
        ("rest has zeros where any rank sent: this rank's own places only", wanted * (mean == 0)),
    ]
    mistakes = [(why, rows.unbind()) for why, rows in mistakes]
    same([one.result[1] for one in mine], (wanted - sent).unbind(), "rest", about, mistakes, labels=members)
    for rank, one in zip(members, mine, strict=True):
        made = sum(call.bytes for call in one.calls) // n  # a call's bytes are those of all n ranks
        most = k * (mean.element_size() + 8)
        if made > most:
            why = "the result is right, but more travels than k elements and k places"
            raise Wrong(why, f"rank {rank}, {about}", f"at most {most:,} bytes", f"{made:,} bytes")
        if len(one.calls) > 2:
            why = f"the result is right, but it takes {len(one.calls)} calls"
            raise Wrong(f"{why}: one for the elements and one for their places are enough", f"rank {rank}, {about}")


WHY = (
    "What is not sent is kept and sent later, so nothing is lost for good. Deep Gradient Compression does so with"
    " 0.1 % and corrects momentum too; PyTorch ships PowerSGD with the same memory as a comm hook."
)

exercise = Exercise(hints, check, minutes=20, level="hard", why=WHY)
