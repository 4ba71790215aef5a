"""What several exercises of this lesson share."""

import torch

from ..exercises.judge import Wrong

F32, F64 = torch.float32, torch.float64


def counted(seen, n):
    """`seen`, where a reduce_scatter of a list is one call (gloo makes n of it, and torch counts those), and
    functional collectives have the names of the others."""
    for call in seen.calls:
        call.op = {"all_gather_into_tensor": "all_gather", "all_to_all_single": "all_to_all"}.get(call.op, call.op)
    seen.hidden = max(0, seen.hidden - (n - 1) * sum(call.op == "reduce_scatter" for call in seen.calls))
    return seen


def judge_moved(seen, n, size, times, about):
    """Raise Wrong where more than `times`·(n − 1)/n·size bytes leave a rank."""
    enough = times * (n - 1) * size // n
    for rank, one in enumerate(seen):
        made = moved(one.calls, n)
        if made > enough:
            raise Wrong(
                f"the result is right, but {made:,.0f} bytes leave a rank where {enough:,} are enough: "
                "is something moved whole, or twice?",
                f"rank {rank}, {about}", f"{enough:,} bytes", f"{made:,.0f} bytes",
            )  # fmt: skip


def moved(calls, n):
    """Bytes that leave a rank for these calls, as the best implementation would send them. (A call's bytes are those
    of the tensor that it fills: one n-th for a reduce_scatter, all for an all_gather.)"""
    share = {"reduce_scatter": n - 1, "all_to_all": (n - 1) / n, "all_gather": (n - 1) / n, "send": 1, "recv": 0}
    return sum(call.bytes * share[call.op] for call in calls)
