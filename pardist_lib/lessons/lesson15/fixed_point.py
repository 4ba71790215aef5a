"""fixed_point: real numbers as whole ones modulo 2**32; what is too large for the sum has to be refused before."""

import torch

from ..exercises.cases import F64
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, same, show
from ..exercises.runs import results
from .shared import FIELD, whole

hints = (
    "Multiply by 2**fraction_bits, round, and only then think about the sign: in Python and in torch, -1 % 2**32 "
    "is 2**32 - 1.",
    "The check comes before the wrap: afterwards a number that was too large looks like any other. Each of the "
    "clients may use its part of 2**31 - 1, so that the sum stays within.",
    "`if not (whole.abs() <= limit).all(): raise ValueError(…)` also catches NaN, which is neither larger nor "
    "smaller than anything.",
)


def limit(clients):
    return (2**31 - 1) // clients


GOOD = [  # values, clients, fraction bits; the last one is right only where the range is checked after rounding
    ([0.0, 1.0, 2.5, 0.3, 0.7, 0.49], 3, 4),
    ([-1.0, -0.3, -0.7, 2.0, -100.0], 4, 8),
    ([[0.1, -0.1, 12.75], [3.0, -3.3, 1e-9]], 10, 16),
    ([limit(8), -limit(8), limit(8) - 1.0], 8, 0),
    ([limit(100) / 2**12, -limit(100) / 2**12], 100, 12),
    ([limit(8) + 0.25, -limit(8) - 0.25], 8, 0),
]
SHARE = "is not refused: each may use (2**31 - 1) // clients, or the sum can wrap"
BAD = [  # and what it means where they are not refused
    ([1.0, 40000.0], 3, 16, "it is not refused: nothing is checked, and it would wrap"),
    ([limit(8) + 1.0], 8, 0, f"a value that 8 clients cannot all bring {SHARE}"),
    ([0.0, -(limit(4) + 1.0)], 4, 0, f"a negative value that 4 clients cannot all bring {SHARE}"),
    ([1.0, float("nan")], 3, 8, "NaN is not refused: it is neither larger nor smaller than a limit"),
    ([float("inf")], 3, 8, f"an infinite value {SHARE}"),
]
MISTAKES = [  # (diagnosis, what it would give for values v, x = v * 2**b, c clients, b bits) modulo 2**32
    ("cut off, not rounded: to whole numbers .long() goes towards zero", lambda v, x, c, b: x),
    ("rounded down, not to the nearest: .floor()", lambda v, x, c, b: x.floor()),
    ("multiplied by fraction_bits, not by 2**fraction_bits", lambda v, x, c, b: (v * b).round()),
    ("divided by 2**fraction_bits: the fraction is lost", lambda v, x, c, b: (v / 2**b).round()),
    ("rounded first, then scaled: the fraction is lost", lambda v, x, c, b: v.round() * 2**b),
    ("negative numbers are one too small: modulo 2**32, not 2**32 - 1",
     lambda v, x, c, b: x.round().long() % (FIELD - 1)),
    ("the sign is lost: -1 has to become 2**32 - 1", lambda v, x, c, b: x.round().abs()),
    ("negative numbers are cut off at zero", lambda v, x, c, b: x.round().clamp(min=0)),
    ("divided by the number of clients: that makes their mean, and loses digits", lambda v, x, c, b: (x / c).round()),
    ("shifted by 2**31: in the sum every client would bring that shift along", lambda v, x, c, b: x.round() + 2**31),
    ("modulo 2**31: the field has 2**32 elements, half of them stand for negative numbers",
     lambda v, x, c, b: x.round().long() % 2**31),
]  # fmt: skip


def check(run):
    inputs = [(torch.tensor(v, dtype=F64), clients, bits) for v, clients, bits, *_ in GOOD + BAD]
    labels = [f"values {show(v)}, {clients} clients, {bits} fraction bits" for v, clients, bits in inputs]
    got, n = results(run, inputs, labels, catch=ValueError), len(GOOD)
    refused = [isinstance(value, str) and value.startswith("ValueError") for value in got]
    if refused[n - 1] and not any(refused[: n - 1]):
        why = "the range is checked before rounding: it is the whole number that may be as large as the limit"
        raise Wrong(why, labels[n - 1])

    def each(formula):
        return [formula(v, v * 2**bits, clients, bits).long() % FIELD for v, clients, bits in inputs[:n]]

    expected = each(lambda v, x, clients, bits: x.round())
    whole(got[:n], expected, labels[:n], "the result")
    same(got[:n], expected, "", mistakes=[(why, each(formula)) for why, formula in MISTAKES], labels=labels[:n])
    for i, (*_, why) in enumerate(BAD, n):
        if not refused[i]:
            number = isinstance(got[i], torch.Tensor)
            if i == n and number and ((got[i] + 2**31) % FIELD - 2**31).abs().max() <= limit(3):
                why = "a value that is too large is cut off silently: a wrong sum is worse than a ValueError"
            raise Wrong(why, labels[i], "ValueError", show(got[i]) if number else repr(got[i]))


WHY = (
    "Whole numbers modulo 2**32 add up exactly in any order, and only so do masks cancel; and the range is "
    "checked before the wrap, after which nobody can tell. Flower's SecAgg+ makes whole numbers of floats as "
    "well, but cuts off silently what is outside a range that is given."
)
exercise = Exercise(hints, check, minutes=15, level="medium", why=WHY)
