"""rate_and_steps: what the privacy accountant is told; one rank's rows are counted, or steps are rounded down."""

import math

from ..exercises.cases import number
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, same
from ..exercises.runs import pair, results

hints = (
    "A row takes part with the same probability wherever it is: what counts is all rows together, and all rows "
    "that take part in one step.",
    "rate = batch / sum(rows). After s steps a row has taken part s · rate times on average: that has to be at "
    "least epochs.",
    "math.ceil(epochs / rate), the smallest whole number that is enough. (Mind that epochs / rate may come out as "
    "6000.000000000001: round first.)",
)


def steps(r, b, e):
    return math.ceil(round(e * sum(r) / b, 9))


WRONG_RATES = [  # (diagnosis, what it would give for rows r, batch b, epochs e)
    ("rate and steps are swapped", steps),
    ("divided by one rank's rows: a row may be on any rank, all rows count", lambda r, b, e: b / r[0]),
    ("divided by the mean of the ranks' rows: all rows count", lambda r, b, e: b / (sum(r) / len(r))),
    ("the batch was divided by the ranks: it is of all ranks together", lambda r, b, e: b / len(r) / sum(r)),
    ("upside down: that is the number of steps in an epoch", lambda r, b, e: sum(r) / b),
    ("1 over all rows: every row takes part, not one in each step", lambda r, b, e: 1 / sum(r)),
    ("multiplied by the epochs: the rate is that of one step", lambda r, b, e: e * b / sum(r)),
    ("divided by the epochs: the rate is that of one step", lambda r, b, e: b / sum(r) / e),
    ("the batch itself: a probability is asked for", lambda r, b, e: b),
    ("rows that the ranks do not divide evenly are lost: all rows count",
     lambda r, b, e: b / (sum(r) // len(r) * len(r))),
    ("divided by the largest rank's rows", lambda r, b, e: b / max(r)),
]  # fmt: skip
WRONG_STEPS = [
    ("rounded to the nearest: that can be one step too few", lambda r, b, e: round(e * sum(r) / b)),
    ("rounded down: the last row would have taken part too rarely", lambda r, b, e: int(e * sum(r) / b)),
    ("the epochs are missing: these are the steps of one", lambda r, b, e: math.ceil(sum(r) / b)),
    ("these are the epochs: each of them has many steps", lambda r, b, e: e),
    ("one rank's steps: a batch is taken from all ranks together", lambda r, b, e: math.ceil(e * r[0] / b)),
    ("multiplied by the ranks: a step is one step of all ranks together", lambda r, b, e: len(r) * steps(r, b, e)),
    ("rounded up for each epoch, then multiplied: round once, at the end", lambda r, b, e: e * math.ceil(sum(r) / b)),
    ("one step too many where it fits exactly", lambda r, b, e: int(round(e * sum(r) / b, 9)) + 1),
    ("a step for every row: in a step batch of them take part", lambda r, b, e: e * sum(r)),
    ("not a whole number of steps", lambda r, b, e: e * sum(r) / b),
]


def check(run):
    inputs = [([15000] * 4, 150, 15), ([900, 300, 240], 60, 4), ([100], 7, 3), ([30, 10], 40, 5),
              ([1000, 2, 400, 38], 90, 1), ([50, 50], 12.5, 2), ([360] * 4, 144, 20),
              ([301, 300, 240], 60, 4)]  # fmt: skip
    labels = [f"rows {rows}, batch {batch}, {epochs} epochs" for rows, batch, epochs in inputs]
    found = results(run, inputs, labels)
    got = [pair(value, "(rate, steps)", label) for value, label in zip(found, labels, strict=True)]
    for i, (what, right, wrong, tolerance) in enumerate((
        ("rate", lambda r, b, e: b / sum(r), WRONG_RATES, None),
        ("steps", steps, WRONG_STEPS, (1e-12, 1e-12)),
    )):  # fmt: skip

        def each(formula):
            return [number(float(formula(*args))) for args in inputs]

        names, known = [f"the {what}, {label}" for label in labels], [(why, each(formula)) for why, formula in wrong]
        same([number(v[i]) for v in got], each(right), "", mistakes=known, labels=names, tolerance=tolerance)
    for (_, count), label in zip(got, labels, strict=True):
        if isinstance(count, float):
            raise Wrong("the number of steps is to be an int", label, got=repr(count))


WHY = (
    "The accountant's theorem is about rows that take part by dice of their own, with probability batch / all "
    "rows, on whatever rank. Opacus counts so too, and therefore puts a loader that throws such dice in the "
    "place of the reader's shuffled one."
)
exercise = Exercise(hints, check, minutes=10, level="medium", why=WHY)
