"""One solution for each exercise of lesson 12; signature and docstring are the blank in the notebook."""


def bandwidths(op: str, payload: int, n: int, seconds: float) -> tuple[float, float]:
    """Algorithm and bus bandwidth of one collective on n ranks, bytes a second, as in nccl-tests.

    op: "all_reduce", "all_gather", "reduce_scatter", "all_to_all" or "broadcast".
    payload: bytes as a `Trace` counts them, on one rank: of an all_gather its own shard; of a
    reduce_scatter and an all_to_all all n pieces; of an all_reduce and a broadcast the whole
    tensor. Algorithm bandwidth is the size of the whole tensor (of an all_gather: all that is
    gathered in the end) by the time. Bus bandwidth is algorithm bandwidth times a factor: 2(n-1)/n
    for an all_reduce, (n-1)/n for all_gather, reduce_scatter and all_to_all, 1 for a broadcast.
    """
    size = n * payload if op == "all_gather" else payload
    factor = {"all_reduce": 2 * (n - 1) / n, "broadcast": 1.0}.get(op, (n - 1) / n)
    return size / seconds, factor * size / seconds


def exposed(compute: list[tuple[float, float]], communication: list[tuple[float, float]]) -> float:
    """Seconds in which one rank communicates and does not compute.

    compute, communication: (start, end) of the rank's events in seconds, in any order; those of one
    kind may overlap each other, and then count once. Nothing is changed in the lists.
    """

    def length(spans):
        total, until = 0.0, float("-inf")
        for start, end in sorted(spans):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total

    return length([*compute, *communication]) - length(compute)


def amdahl(t1: float, tn: float, n: int, m: int) -> tuple[float, float, float]:
    """What two measured times say of a job on 1 and on n >= 2 ranks, and what Amdahl expects of m.

    t1, tn: seconds of one step of the whole batch on one rank, and on n ranks.
    Returns (efficiency, serial, speedup): the efficiency of n ranks, speedup by n; the serial
    fraction s that explains it, from tn = t1 * (s + (1 - s) / n) (Karp and Flatt; outside of 0 to 1
    where the times are so); and the speedup that m ranks would have with the same s.
    """
    speedup = t1 / tn
    serial = (1 / speedup - 1 / n) / (1 - 1 / n)
    return speedup / n, serial, 1 / (serial + (1 - serial) / m)
