"""The exercise bubble_share."""

from ..exercises.cases import numbers
from ..exercises.exercise import Exercise

hints = (
    "Count in pieces: how many does a stage work on in a step? How many pieces long does it wait, while the first "
    "one comes to it and the last one goes on without it?",
    "It works on m·v pieces, and waits for p - 1 of them (a forward and a backward together are one here).",
    "The papers' (p - 1)/(v·m) is waiting by work. Here the share of the whole step is asked for: waiting by "
    "(work + waiting).",
)


def check(run):
    inputs = [(4, 8), (4, 8, 2), (8, 64, 3), (1, 5), (4, 4, 1), (16, 16, 4), (2, 1), (8, 12, 6)]
    labels = [
        f"{p} stage{'s' * (p > 1)}, {m} micro-batch{'es' * (m > 1)}, {(*v, 1)[0]} chunk{'s' * ((*v, 1)[0] > 1)}"
        for p, m, *v in inputs
    ]

    def share(p, m, v=1):
        return (p - 1) / (m * v + p - 1)

    mistakes = [
        ("this is waiting by work, as the papers give it: the share of the whole step has both below the line",
         lambda p, m, v=1: (p - 1) / (m * v)),
        ("the chunks are not used: v pieces each 1/v as long make the waiting 1/v as long",
         lambda p, m, v=1: share(p, m)),
        ("chunks make the bubble smaller, not larger: waiting is p - 1 pieces, each 1/v as long",
         lambda p, m, v=1: v * (p - 1) / (m + v * (p - 1))),
        ("chunks make the bubble smaller, not larger: waiting is p - 1 pieces, each 1/v as long",
         lambda p, m, v=1: (p * v - 1) / (m + p * v - 1)),
        ("a stage waits for the p - 1 others, not for itself too", lambda p, m, v=1: p / (m * v + p)),
        ("stages and micro-batches are exchanged", lambda p, m, v=1: share(m, p, v)),
        ("this is the share in which it works: the rest is asked for", lambda p, m, v=1: 1 - share(p, m, v)),
        ("waiting is counted twice: a piece's forward and backward together are one here",
         lambda p, m, v=1: 2 * (p - 1) / (m * v + 2 * (p - 1))),
        ("this is per cent: a share from 0 to 1 is asked for", lambda p, m, v=1: 100 * share(p, m, v)),
        ("all of the work and p pieces are below the line: work and waiting are m·v + p - 1",
         lambda p, m, v=1: (p - 1) / (m * v + p)),
        ("the whole is divided by v: only the waiting gets shorter, not the work",
         lambda p, m, v=1: share(p, m) / v),
        ("whole numbers are divided here with //, which rounds down", lambda p, m, v=1: (p - 1) // (m * v + p - 1)),
    ]  # fmt: skip
    numbers(run, inputs, [share(*args) for args in inputs], labels, mistakes)


exercise = Exercise(hints, check)
