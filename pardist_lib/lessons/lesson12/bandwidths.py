"""bandwidths: algorithm and bus bandwidth of a collective; what counts as its size, and its factor, get mixed up."""

from ..exercises.exercise import Exercise
from .shared import judge

hints = (
    "First the size: for an all_gather it is n shards, for the others it is the payload already.",
    "Algorithm bandwidth is size / seconds, whatever the operation. Bus bandwidth multiplies it by the operation's "
    "factor, so that a perfect ring shows the speed of its links for every n.",
    "factor = {'all_reduce': 2 * (n - 1) / n, 'broadcast': 1}.get(op, (n - 1) / n)",
)


def made(shards=("all_gather",), size=None, factor=None, unit=1.0):
    """An answer: shards are the operations whose payload counts n times; size and factor may be something else."""

    def answer(op, payload, n, seconds):
        whole = size(op, payload, n) if size else payload * n if op in shards else payload
        bandwidth, ring = whole / seconds / unit, (n - 1) / n
        right = {"all_reduce": 2 * ring, "broadcast": 1.0}.get(op, ring)
        return bandwidth, bandwidth * (factor(op, ring, n) if factor else right)

    return answer


OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
right = made()
MISTAKES = [  # (diagnosis, what it would give)
    ("an all_gather's payload in a Trace is one rank's shard: what it gathers is n times that", made(shards=())),
    ("a reduce_scatter's payload is all n pieces already: only an all_gather's is a shard",
     made(shards=("all_gather", "reduce_scatter"))),
    ("an all_to_all's payload is all n pieces already: only an all_gather's is a shard",
     made(shards=("all_gather", "all_to_all"))),
    ("the size is multiplied by n for every operation: only an all_gather's payload is a shard", made(shards=OPS)),
    ("what an all_gather gathers includes the rank's own shard: n of them, not n - 1",
     made(size=lambda op, p, n: (n - 1) * p if op == "all_gather" else p)),
    ("a reduce_scatter leaves one piece of n, but the size that counts is all that was handed in",
     made(size=lambda op, p, n: {"all_gather": n * p, "reduce_scatter": p / n}.get(op, p))),
    ("bus bandwidth equals algorithm bandwidth here: the operation's factor is missing",
     made(factor=lambda op, ring, n: 1.0)),
    ("the factor of an all_reduce is twice that of the others: it is a reduce-scatter and an all-gather",
     made(factor=lambda op, ring, n: 1.0 if op == "broadcast" else ring)),
    ("2(n-1)/n is the factor of an all_reduce alone: the others go round once",
     made(factor=lambda op, ring, n: 1.0 if op == "broadcast" else 2 * ring)),
    ("a broadcast has the factor 1: each link carries the whole tensor once",
     made(factor=lambda op, ring, n: 2 * ring if op == "all_reduce" else ring)),
    ("the factor is turned round: bus bandwidth is algorithm bandwidth times it, not divided by it",
     lambda *args: (right(*args)[0], right(*args)[0] ** 2 / right(*args)[1])),
    ("the factor has n-1 where (n-1)/n is meant: bytes by rank, not of all ranks",
     made(factor=lambda op, ring, n: {"all_reduce": 2.0 * (n - 1), "broadcast": 1.0}.get(op, n - 1.0))),
    ("it is rounded to whole bytes: bandwidth is not a whole number",
     lambda *args: tuple(round(v) for v in right(*args))),
    ("it is rounded to whole bytes: bandwidth is not a whole number",
     lambda *args: (right(*args)[0] // 1, right(*args)[0] // 1 * (right(*args)[1] / right(*args)[0]))),
    ("this is in GB: bytes a second are asked for", made(unit=1e9)),
    ("this is in MiB: bytes a second are asked for", made(unit=2**20)),
    ("these are bits: bytes are asked for", made(unit=1 / 8)),
    ("the two are in the wrong order: algorithm bandwidth first", lambda *args: right(*args)[::-1]),
    ("this is right for 4 ranks: is a 4 written into it?",
     made(factor=lambda op, ring, n: {"all_reduce": 1.5, "broadcast": 1.0}.get(op, 0.75))),
    ("this is a time for each byte: bandwidth is bytes by seconds", lambda *args: tuple(1 / v for v in right(*args))),
]  # fmt: skip


def check(run):
    measured = [(4_000_000, 4, 0.01), (1_000_003, 3, 0.004), (96, 2, 1e-5), (8_000, 64, 0.5), (7, 3, 2.0)]
    inputs = [(op, *one) for op in OPS for one in measured]
    labels = [f"{op} of {p:,} bytes on {n} ranks in {seconds * 1e3:g} ms" for op, p, n, seconds in inputs]
    judge(run, inputs, labels, ("algorithm", "bus"), right, MISTAKES)


why = (
    "Bus bandwidth takes off what the algorithm must send anyhow, so one number can be held against a link's speed "
    "for any n. nccl-tests prints both columns, algbw and busbw, with these factors."
)
exercise = Exercise(hints, check, minutes=15, level="medium", why=why)
