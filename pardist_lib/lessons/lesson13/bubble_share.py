"""bubble_share: the share of a step that a pipeline's stage waits; of the work alone it is what the papers give."""

from ..exercises.cases import numbers
from ..exercises.exercise import Exercise

hints = (
    "Count in pieces: how many does a stage work on in a step? How many pieces long does it wait, while the first "
    "one comes to it and the last one goes on without it?",
    "It works on m·v pieces, and waits for p - 1 of them (a forward and a backward together are one here).",
    "The papers' (p - 1)/(v·m) is waiting by work. Here the share of the whole step is asked for: waiting by "
    "(work + waiting).",
)


def share(p, m, v=1, times=1):
    waiting = times * (p - 1)
    return waiting / (m * v + waiting)


MISTAKES = [  # (diagnosis, what it would give)
    ("this is waiting by work, as the papers give it: the share of the whole step has both below the line",
     lambda p, m, v=1: (p - 1) / (m * v)),
    ("the chunks are not used: v pieces each 1/v as long make the waiting 1/v as long", lambda p, m, v=1: share(p, m)),
    ("chunks make the bubble smaller, not larger: waiting is p - 1 pieces, each 1/v as long",
     lambda p, m, v=1: share(p, m, times=v)),
    ("chunks make the bubble smaller, not larger: waiting is p - 1 pieces, each 1/v as long",
     lambda p, m, v=1: share(p * v, m)),
    ("a stage waits for the p - 1 others, not for itself too", lambda p, m, v=1: share(p + 1, m, v)),
    ("stages and micro-batches are exchanged", lambda p, m, v=1: share(m, p, v)),
    ("this is the share in which it works: the rest is asked for", lambda p, m, v=1: 1 - share(p, m, v)),
    ("waiting is counted twice: a piece's forward and backward together are one here",
     lambda p, m, v=1: share(p, m, v, times=2)),
    ("this is per cent: a share from 0 to 1 is asked for", lambda p, m, v=1: 100 * share(p, m, v)),
    ("all of the work and p pieces are below the line: work and waiting are m·v + p - 1",
     lambda p, m, v=1: (p - 1) / (m * v + p)),
    ("the whole is divided by v: only the waiting gets shorter, not the work", lambda p, m, v=1: share(p, m) / v),
    ("whole numbers are divided here with //, which rounds down", lambda p, m, v=1: (p - 1) // (m * v + p - 1)),
]  # fmt: skip


def check(run):
    inputs = [(4, 8), (4, 8, 2), (8, 64, 3), (1, 5), (4, 4, 1), (16, 16, 4), (2, 1), (8, 12, 6)]
    sizes = [(*given, 1)[:3] for given in inputs]  # chunks may be left out
    labels = [
        f"{p} stage{'s' * (p > 1)}, {m} micro-batch{'es' * (m > 1)}, {v} chunk{'s' * (v > 1)}" for p, m, v in sizes
    ]
    numbers(run, inputs, [share(*given) for given in inputs], labels, MISTAKES)


WHY = (
    "A stage works on m · v pieces and waits for p - 1. Megatron's papers divide waiting by work, (p - 1) / (v "
    "· m), which can be above 1; its interleaved schedule makes the bubble v times smaller and the pipeline's "
    "messages v times as many."
)
exercise = Exercise(hints, check, minutes=10, level="easy", why=WHY)
