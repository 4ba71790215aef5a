"""The exercise weighted_gradients."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64
from ..exercises.exercise import Exercise
from ..exercises.gradients import OTHER_CALLS, PAIRS, Sample, gradients, loss_of, rows_of_rank
from ..exercises.judge import Wrong, only_calls, same
from ..exercises.watch import watched
from .shared import group

hints = (
    "The mean over all rows is Σ rows·gradient over the ranks, divided by all rows. Is that the mean of the means?",
    "First all-reduce the number of rows, in a tensor of one element. A rank's part is then rows / total.",
    "Multiply p.grad by that part, then add up over the ranks; nothing is left to divide by.",
)


def check(run):
    cases = [([5, 3, 2, 1], F64, False), ([3, 3, 3, 3], F32, False), ([4, 0, 1, 3], F64, False),
             ([6, 1, 2], F64, False), ([2, 5, 4, 2], F64, True), ([2500, 3, 0, 2], F64, False),
             ([1, 4, 2, 3], F64, False, "the second call, after one with a row each")]  # fmt: skip
    for sizes, dtype, in_pairs, *second in cases:
        n, stuck = len(sizes), "the ranks do not make the same calls, in the same order"
        stuck += ": a rank without rows has to take part, too" if 0 in sizes else ""
        about = f"{', '.join(map(str, sizes))} rows on " + ("two groups of 2 ranks" if in_pairs else f"{n} ranks")
        about = ", ".join([about, *second])
        seen = run(_weighed, sizes, dtype, in_pairs, bool(second), n=n, about=about, stuck=stuck)
        try:
            for members in PAIRS if in_pairs else [list(range(n))]:
                _judge_weighed(seen, members, sizes, about)
        except Wrong as wrong:
            if max(sizes) > 2048 and ("16 bits" in wrong.diagnosis or "times as large" in wrong.diagnosis):
                wrong.diagnosis = f"the number of rows does not survive the type it travels in: {wrong.diagnosis}"
            elif second:
                wrong.diagnosis = f"it works once; is something kept from the first call? {wrong.diagnosis}"
            raise


def _weighed(answer, sizes, dtype, in_pairs, second):
    rank, model, earlier = dist.get_rank(), Sample(4, dtype), Sample(4, dtype)
    if second:
        loss_of(earlier, rows_of_rank(19, rank, dtype)[:1]).backward()
        answer(earlier, 1, **group(in_pairs))
    rows = torch.cat([rows_of_rank(20 + i, rank, dtype) for i in range(3)]).repeat(1 + sizes[rank] // 9, 1)[
        : sizes[rank]
    ]
    loss_of(model, rows).backward()
    before, weights = gradients(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    seen = watched(answer, model, sizes[rank], **group(in_pairs))
    touched = [name for name, p in model.named_parameters() if not torch.equal(p, weights[name])]
    turned = [name for name, p in model.named_parameters() if p.requires_grad != (name in trainable)]
    seen.kept = {"before": before, "after": gradients(model), "touched": touched, "turned": turned}
    return seen


def _judge_weighed(seen, members, sizes, about):
    mine, rows, n = [seen[r] for r in members], [sizes[r] for r in members], len(members)
    for rank, one in zip(members, mine, strict=True):
        for call in one.calls:
            if call.op != "all_reduce" and 0 < call.bytes <= 8 * n:
                why = f"it calls {call.op} for the number of rows: an all_reduce adds it up, everywhere"
                raise Wrong(why, f"rank {rank}, {about}")
    only_calls(mine, ("all_reduce",), OTHER_CALLS)
    for rank, one in zip(members, mine, strict=True):
        if one.kept["touched"]:
            raise Wrong(f"the weights have changed ({one.kept['touched'][0]} is the first)", f"rank {rank}, {about}")
        if one.kept["turned"]:
            why = f"it changed requires_grad ({one.kept['turned'][0]} is the first): only the gradients are to change"
            raise Wrong(why, f"rank {rank}, {about}")
    size = total_rows = 0
    for name in mine[0].kept["before"]:
        own, after = ([one.kept[when][name] for one in mine] for when in ("before", "after"))
        if own[0] is None:
            if any(a is not None for a in after):
                raise Wrong(f"{name} had no gradient on any rank and now has one", about)
            continue
        if any(a is None for a in after):
            raise Wrong(f"no gradient is left for {name}", about)
        total_rows, size = sum(rows), size + own[0].numel() * own[0].element_size()
        right = sum(r * g for r, g in zip(rows, own, strict=True)) / total_rows
        everywhere = sum(r * one.kept["before"][name] for r, one in zip(sizes, seen, strict=True))
        with_rows = sum(r > 0 for r in rows)
        mistakes = [
            ("this is the mean of the ranks' means: a row on a rank with few rows counts more", sum(own) / n),
            ("the mean of the means, over the ranks that have rows: each row has to count alike", sum(own) / with_rows),
            (f"{n} times too small: the parts rows / total add up to 1, so nothing is left to divide by", right / n),
            ("not divided by all rows: it is the sum over all rows", right * total_rows),
            (f"divided by {n} ranks, not by {total_rows} rows", right * total_rows / n),
            ("the plain sum: rows are not used, and nothing is divided", sum(own)),
            (f"{n} times too large: n · rows / total wants the mean over the ranks, and this is the sum", right * n),
            ("the sum over the ranks is weighted, not each rank's part of it: multiply before all_reduce",
             [sum(own) * r / total_rows for r in rows]),
            ("the ranks' gradients are weighted, but not added up",
             [r * g / total_rows for r, g in zip(rows, own, strict=True)]),
            ("the rows are counted over all ranks of the world: the group is left out", everywhere / sum(sizes)),
            ("the rows are counted over all ranks of the world: the group is left out", right * sum(rows) / sum(sizes)),
            ("zero: rows // total is an integer division", 0 * right),
            ("the largest number of rows is divided by, not all of them", right * total_rows / max(rows)),
        ]  # fmt: skip
        if len(set(rows)) == 1:
            mistakes = mistakes[2:]
        mistakes = [(why, would if isinstance(would, list) else [would] * n) for why, would in mistakes]
        same(after, [right] * n, f"the gradient of {name}", about, mistakes, own, members)
    for rank, one in zip(members, mine, strict=True):
        made = sum(call.bytes for call in one.calls)
        if not size < made <= size + 8:
            raise Wrong("the result is right, but more travels than each gradient once and the number of rows",
                        f"rank {rank}, {about}", f"{size:,} bytes and up to 8 more", f"{made:,} bytes")  # fmt: skip


exercise = Exercise(hints, check)
