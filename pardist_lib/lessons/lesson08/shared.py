"""What several exercises of this lesson share."""

import math

import torch
import torch.distributed as dist

from ..exercises.judge import Wrong, same, type_of
from ..worlds import group_of

PAIRS, ALONE = [[0, 2], [1, 3]], [[0], [1], [2], [3]]


INF, NAN = math.inf, math.nan


def mine(groups):
    """The argument `group` for this rank, where there are groups. Every rank has to call it."""
    made = {rank: group_of(members) for members in groups for rank in members}
    return {"group": made[dist.get_rank()]} if groups else {}


def named(groups, n):
    if not groups:
        return f"{n} rank{'s' * (n > 1)}"
    return "two groups of 2 ranks" if len(groups[0]) == 2 else "four groups of 1 rank"


def number(value, said, label):
    """A Python number out of what an answer returned; Wrong for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Wrong(f"{said} is {type_of(value)}: a number is asked for", label)
    return float(value)


def pair(value, said, label):
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise Wrong(f"it returns {type_of(value)}: the pair {said} is asked for", label)
    return value


def unsent(seen):
    if seen.calls:
        raise Wrong(f"it calls {seen.calls[0].op}: this one is arithmetic, in one process")


OTHER_CALLS = {
    "all_gather": "it calls all_gather, which brings everybody's numbers to everybody: sums are all that is needed",
    "": "it calls {op}: sums over the ranks are all that is needed, one all_reduce of the numbers and one of the rows",
}


def compare(got, mean, dtype, about, mistakes, members):
    n = len(got)
    known = [
        (why, [None if t is None else t.to(dtype) for t in (would if isinstance(would, list) else [would] * n)])
        for why, would in mistakes
    ]
    same(got, [mean.to(dtype)] * n, "the result", about, known, labels=members)


def frugal(seen, members, d, dtype, about):
    most = d * torch.finfo(dtype).bits // 8 + 8
    for rank, one in zip(members, seen, strict=True):
        made = sum(call.bytes for call in one.calls)
        if len(members) > 1 and (made > most or len(one.calls) > 2):
            why = f"it is right, but {made} bytes in {len(one.calls)} calls are all-reduced: {d} numbers and 1 do"
            raise Wrong(why, f"rank {rank}, {about}", f"at most {most} bytes in 2 calls", f"{made} bytes")
