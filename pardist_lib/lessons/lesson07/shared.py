"""Collectives that move shards, counted and weighed: as one list, one tensor or single messages, it is the same."""

from ..exercises.judge import Wrong

NOT_FOUR = "it works with 4 ranks, but not with 3 (is a 4 written into it?)"


def counted(seen, n):
    """`seen`, where a reduce_scatter of a list is one call (gloo makes n of it, and torch counts those), and
    functional collectives have the names of the others."""
    for call in seen.calls:
        call.op = {"all_gather_into_tensor": "all_gather", "all_to_all_single": "all_to_all"}.get(call.op, call.op)
    seen.hidden = max(0, seen.hidden - (n - 1) * sum(call.op == "reduce_scatter" for call in seen.calls))
    return seen


def moves_at_most(seen, size, times, about):
    """Raise Wrong where more than `times`·(n − 1)/n·size bytes leave a rank, each call made as well as can be."""
    n = len(seen)  # a call's bytes are those of the tensor that it fills: one n-th for a reduce_scatter, else all
    share = {"reduce_scatter": n - 1, "all_to_all": (n - 1) / n, "all_gather": (n - 1) / n, "send": 1, "recv": 0}
    enough = times * (n - 1) * size // n
    for rank, one in enumerate(seen):
        made = sum(call.bytes * share[call.op] for call in one.calls)
        if made > enough:
            why = f"the result is right, but {made:,.0f} bytes leave a rank where {enough:,} are enough"
            shown = f"{enough:,} bytes", f"{made:,.0f} bytes"
            raise Wrong(f"{why}: is something moved whole, or twice?", f"rank {rank}, {about}", *shown)
