"""The exercise bandwidths."""

from ..exercises.exercise import Exercise
from .shared import judge

hints = (
    "First the size: for an all_gather it is n shards, for the others it is the payload already.",
    "Algorithm bandwidth is size / seconds, whatever the operation. Bus bandwidth multiplies it by the operation's "
    "factor, so that a perfect ring shows the speed of its links for every n.",
    "factor = {'all_reduce': 2 * (n - 1) / n, 'broadcast': 1}.get(op, (n - 1) / n)",
)


def check(run):
    inputs, labels = [], []
    for op in OPS:
        for payload, n, seconds in (
            (4_000_000, 4, 0.01),
            (1_000_003, 3, 0.004),
            (96, 2, 1e-5),
            (8_000, 64, 0.5),
            (7, 3, 2.0),
        ):
            inputs.append((op, payload, n, seconds))
            labels.append(f"{op} of {payload:,} bytes on {n} ranks in {seconds * 1e3:g} ms")

    def factor_of(op, n):
        return {"all_reduce": 2 * (n - 1) / n, "broadcast": 1.0}.get(op, (n - 1) / n)

    def made(size=None, factor=None, unit=1.0, bus=None):
        size = size or (lambda op, payload, n: n * payload if op == "all_gather" else payload)
        factor = factor or factor_of

        def both(op, payload, n, seconds):
            algorithm = size(op, payload, n) / seconds / unit
            return algorithm, (bus or factor(op, n)) * algorithm

        return both

    right = made()
    mistakes = [
        ("an all_gather's payload in a Trace is one rank's shard: what it gathers is n times that",
         made(size=lambda op, payload, n: payload)),
        ("a reduce_scatter's payload is all n pieces already: only an all_gather's is a shard",
         made(size=lambda op, payload, n: n * payload if op in ("all_gather", "reduce_scatter") else payload)),
        ("an all_to_all's payload is all n pieces already: only an all_gather's is a shard",
         made(size=lambda op, payload, n: n * payload if op in ("all_gather", "all_to_all") else payload)),
        ("the size is multiplied by n for every operation: only an all_gather's payload is a shard",
         made(size=lambda op, payload, n: n * payload)),
        ("what an all_gather gathers includes the rank's own shard: n of them, not n - 1",
         made(size=lambda op, payload, n: (n - 1) * payload if op == "all_gather" else payload)),
        ("a reduce_scatter leaves one piece of n, but the size that counts is all that was handed in",
         made(size=lambda op, p, n: {"all_gather": n * p, "reduce_scatter": p / n}.get(op, p))),
        ("bus bandwidth equals algorithm bandwidth here: the operation's factor is missing", made(bus=1.0)),
        ("the factor of an all_reduce is twice that of the others: it is a reduce-scatter and an all-gather",
         made(factor=lambda op, n: 1.0 if op == "broadcast" else (n - 1) / n)),
        ("2(n-1)/n is the factor of an all_reduce alone: the others go round once",
         made(factor=lambda op, n: 1.0 if op == "broadcast" else 2 * (n - 1) / n)),
        ("a broadcast has the factor 1: each link carries the whole tensor once",
         made(factor=lambda op, n: {"all_reduce": 2 * (n - 1) / n}.get(op, (n - 1) / n))),
        ("the factor is turned round: bus bandwidth is algorithm bandwidth times it, not divided by it",
         lambda op, p, n, s: (right(op, p, n, s)[0], right(op, p, n, s)[0] ** 2 / right(op, p, n, s)[1])),
        ("the factor has n-1 where (n-1)/n is meant: bytes by rank, not of all ranks",
         made(factor=lambda op, n: {"all_reduce": 2.0 * (n - 1), "broadcast": 1.0}.get(op, n - 1.0))),
        ("it is rounded to whole bytes: bandwidth is not a whole number",
         lambda *args: tuple(float(round(v)) for v in right(*args))),
        ("it is rounded to whole bytes: bandwidth is not a whole number", lambda op, p, n, s:
         (right(op, p, n, s)[0] // 1, right(op, p, n, s)[0] // 1 * factor_of(op, n))),
        ("this is in GB: bytes a second are asked for", made(unit=1e9)),
        ("this is in MiB: bytes a second are asked for", made(unit=2**20)),
        ("these are bits: bytes are asked for", made(unit=1 / 8)),
        ("the two are in the wrong order: algorithm bandwidth first", lambda *args: right(*args)[::-1]),
        ("this is right for 4 ranks: is a 4 written into it?",
         made(factor=lambda op, n: {"all_reduce": 1.5, "broadcast": 1.0}.get(op, 0.75))),
        ("this is a time for each byte: bandwidth is bytes by seconds",
         lambda *args: tuple(1 / v for v in right(*args))),
    ]  # fmt: skip
    judge(run, inputs, labels, ("algorithm", "bus"), right, mistakes)


OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


exercise = Exercise(hints, check)
