"""The mean over unequally many rows. Typical: a mean of means, a rank without rows stays away, small types."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, LOOSE, groups_of, own_group
from ..exercises.exercise import Exercise
from ..exercises.gradients import OTHER_CALLS, Sample, loss_of, rows_of_rank
from ..exercises.judge import Wrong, only_calls, same
from .shared import each_gradient, watched_on

hints = (
    "The mean over all rows is Σ rows·gradient over the ranks, divided by all rows. Is that the mean of the means?",
    "First all-reduce the number of rows, in a tensor of one element. A rank's part is then rows / total.",
    "Multiply p.grad by that part, then add up over the ranks; nothing is left to divide by.",
)


def check(run):
    cases = [  # each rank's rows, dtype, in pairs, after another call
        ([5, 3, 2, 1], F64, False, False),
        ([3, 3, 3, 3], F32, False, False),
        ([4, 0, 1, 3], F64, False, False),
        ([6, 1, 2], F64, False, False),
        ([2, 5, 4, 2], F64, True, False),
        ([2500, 3, 0, 2], F64, False, False),
        ([1, 4, 2, 3], F64, False, True),
    ]
    for sizes, dtype, in_pairs, second in cases:
        n, stuck = len(sizes), "the ranks do not make the same calls, in the same order"
        stuck += ": a rank without rows has to take part, too" if 0 in sizes else ""
        about = f"{', '.join(map(str, sizes))} rows on " + ("two groups of 2 ranks" if in_pairs else f"{n} ranks")
        about += ", the second call, after one with a row each" * second
        seen = run(_weighted, sizes, dtype, in_pairs, second, n=n, about=about, stuck=stuck)
        try:
            for members in groups_of(in_pairs, n):
                _judge(seen, members, sizes, about)
        except Wrong as wrong:
            if max(sizes) > 2048 and ("16 bits" in wrong.diagnosis or "times as large" in wrong.diagnosis):
                wrong.diagnosis = f"the number of rows does not survive the type it travels in: {wrong.diagnosis}"
            elif second:
                wrong.diagnosis = f"it works once; is something kept from the first call? {wrong.diagnosis}"
            raise


def _weighted(answer, sizes, dtype, in_pairs, second):
    rank, model, earlier, group = dist.get_rank(), Sample(4, dtype), Sample(4, dtype), own_group(in_pairs)
    if second:
        loss_of(earlier, rows_of_rank(19, rank, dtype)[:1]).backward()
        answer(earlier, 1, **group)
    rows = torch.cat([rows_of_rank(20 + i, rank, dtype) for i in range(3)])
    loss_of(model, rows.repeat(1 + sizes[rank] // 9, 1)[: sizes[rank]]).backward()
    return watched_on(model, lambda: answer(model, sizes[rank], **group))


def _judge(seen, members, sizes, about):
    mine, rows, n, size = [seen[r] for r in members], [sizes[r] for r in members], len(members), 0
    for rank, one in zip(members, mine, strict=True):
        if strange := [call.op for call in one.calls if call.op != "all_reduce" and 0 < call.bytes <= 8 * n]:
            why = f"it calls {strange[0]} for the number of rows: an all_reduce adds it up, everywhere"
            raise Wrong(why, f"rank {rank}, {about}")
    only_calls(mine, ("all_reduce",), OTHER_CALLS)
    for name, own, after in each_gradient(members, mine, about):
        weighted, added = [r * g for r, g in zip(rows, own, strict=True)], sum(own)
        total, over = sum(weighted), sum(rows)
        everywhere = sum(r * one.kept["before"][name] for r, one in zip(sizes, seen, strict=True))
        size += total.nbytes
        mistakes = [
            ("this is the mean of the ranks' means: a row on a rank with few rows counts more", added / n),
            ("the mean of the means, over the ranks that have rows: each row has to count alike",
             added / sum(r > 0 for r in rows)),
            (f"{n} times too small: the parts rows / total add up to 1, so nothing is left to divide by",
             total / over / n),
            ("not divided by all rows: it is the sum over all rows", total),
            (f"divided by {n} ranks, not by {over} rows", total / n),
            ("the plain sum: rows are not used, and nothing is divided", added),
            (f"{n} times too large: n · rows / total wants the mean over the ranks, and this is the sum",
             total / over * n),
            ("the sum over the ranks is weighted, not each rank's part of it: multiply before all_reduce",
             [added * r / over for r in rows]),
            ("the ranks' gradients are weighted, but not added up", [part / over for part in weighted]),
            ("the rows are counted over all ranks of the world: the group is left out", everywhere / sum(sizes)),
            ("the rows are counted over all ranks of the world: the group is left out", total / sum(sizes)),
            ("zero: rows // total is an integer division", 0 * total),
            ("the largest number of rows is divided by, not all of them", total / max(rows)),
            ("upside down: a rank's part of all rows is rows / total",
             sum(g * over / r for r, g in zip(rows, own, strict=True)) if all(rows) else None),
            ("the sum is divided by this rank's own rows: each rank's part of it counts by its rows, before the sum",
             [added / r for r in rows] if all(rows) else None),
            ("the result went into new tensors and p.grad is as it was: p.grad *= … and all_reduce work in place", own),
        ]  # fmt: skip
        same(after, total / over, f"the gradient of {name}", about, mistakes, own, members, LOOSE)
    for rank, one in zip(members, mine, strict=True):
        made = sum(call.bytes for call in one.calls)
        if not size < made <= size + 8:
            why = "the result is right, but more travels than each gradient once and the number of rows once"
            raise Wrong(why, f"rank {rank}, {about}", f"{size:,} bytes and up to 8 more", f"{made:,} bytes")


WHY = (
    "Each rank counts by its rows, so the sum is the mean over all rows. DDP divides by the number of ranks: "
    "there one multiplies the loss by n · rows / all rows. Megatron, told calculate_per_token_loss, sums losses and "
    "tokens, and divides once; else it takes means of means."
)

exercise = Exercise(hints, check, minutes=15, level="medium", why=WHY)
