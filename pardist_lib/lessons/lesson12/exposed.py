"""exposed: seconds in which a rank communicates and does not compute; overlapping calls are easily counted twice."""

import random

from ..exercises.exercise import Exercise
from .shared import judge

hints = (
    "First write a helper that gives the length of the union of spans: sort them, and add of each only what lies "
    "beyond the end reached so far.",
    "Then no intersection is needed: all that is busy, minus what computes, is communication that is exposed.",
    "length(compute + communication) - length(compute)",
)


def check(run):
    cases = {
        "communication after compute": ([(0.0, 1.0)], [(1.0, 1.5)]),
        "all of it hidden": ([(0.0, 2.0)], [(0.5, 1.0)]),
        "half of it hidden": ([(0.0, 1.0)], [(0.5, 1.5)]),
        "it begins before compute and ends after it": ([(1.0, 2.0)], [(0.0, 3.0)]),
        "two calls at once": ([(0.0, 1.0)], [(0.5, 2.0), (1.5, 3.0)]),
        "a gap in compute": ([(0.0, 1.0), (2.0, 3.0)], [(0.5, 2.5)]),
        "in no order": ([(2.0, 3.0), (0.0, 1.0)], [(2.5, 4.0), (0.5, 1.5)]),
        "compute that overlaps itself": ([(0.0, 2.0), (1.0, 3.0)], [(1.5, 2.5), (2.75, 3.5)]),
        "one call inside another": ([(5.0, 6.0)], [(0.0, 4.0), (1.0, 2.0), (3.0, 4.5)]),
        "no compute": ([], [(0.0, 0.25), (0.5, 1.0)]),
        "no communication": ([(0.0, 1.0)], []),
        "microseconds": ([(0.0, 2e-6)], [(1e-6, 3.5e-6), (5e-6, 6e-6)]),
        **{f"made-up events, {i}": _random_case(i) for i in range(6)},
    }
    judge(run, list(cases.values()), list(cases), ("seconds",), exposed, MISTAKES, tolerance=1e-9)


def _random_case(seed):
    dice = random.Random(seed)
    make = lambda k: [(a := dice.uniform(0, 1), a + dice.uniform(0, 0.2)) for _ in range(k)]  # noqa: E731
    return make(dice.randint(1, 8)), make(dice.randint(1, 8))


def merged(spans):
    """The same moments, as spans that do not overlap; right only where the spans are sorted."""
    found = []
    for start, end in spans:
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def total(spans):
    return sum(end - start for start, end in spans)


def length(spans, order=sorted):
    return total(merged(order(spans)))


def exposed(a, b, length=length):
    return length([*a, *b]) - length(a)


def hidden_by_pairs(a, b):
    return sum(max(0.0, min(end, t) - max(start, s)) for start, end in a for s, t in b)


def rounded(spans, digits):
    return [(round(start, digits), round(end, digits)) for start, end in spans]


MISTAKES = [  # (diagnosis, what it would give)
    ("this is what is hidden: exposed is the rest", lambda a, b: length(b) - exposed(a, b)),
    ("this is all communication, hidden or not", lambda a, b: length(b)),
    ("calls that overlap each other are counted twice: take the length of their union",
     lambda a, b: total(b) - hidden_by_pairs(a, b)),
    ("calls that overlap each other are counted twice: take the length of their union",
     lambda a, b: total(b) - (length(b) - exposed(a, b))),
    ("spans that overlap are counted twice: take the length of their union",
     lambda a, b: max(0.0, total([*a, *b]) - total(a))),
    ("this is compute that nothing is sent beside: the two are mixed up", lambda a, b: exposed(b, a)),
    ("totals are subtracted, as if all compute lay beside communication: when each happens counts",
     lambda a, b: max(0.0, length(b) - length(a))),
    ("only communication after the last computation counts here: sort the events by start, and mind the gaps",
     lambda a, b: exposed([(min(s for s, _ in [*a, *b]), max(e for _, e in a))] if a else [], b)),
    ("the events are in no order: sort them by start first",
     lambda a, b: exposed(a, b, lambda spans: length(spans, order=list))),
    ("a call that compute touches at all is not all hidden: only the part beside compute is",
     lambda a, b: length([(s, e) for s, e in b if not any(c < e and s < d for c, d in a)])),
    ("this is in milliseconds: seconds are asked for", lambda a, b: 1e3 * exposed(a, b)),
    ("times are rounded to milliseconds: events take microseconds, too",
     lambda a, b: exposed(rounded(a, 3), rounded(b, 3))),
    ("times are rounded to microseconds: take them as they are", lambda a, b: exposed(rounded(a, 6), rounded(b, 6))),
    ("compute that overlaps itself is taken off twice: it hides a message only once",
     lambda a, b: length(b) - hidden_by_pairs(a, merged(sorted(b)))),
    ("this is a share of the whole: seconds are asked for", lambda a, b: exposed(a, b) / (length(b) or 1.0)),
]  # fmt: skip


why = (
    "The union of both less the union of compute is what nothing hides, in any order and however events overlap. "
    "Meta's Holistic Trace Analysis takes the same difference over the streams of a GPU in torch.profiler's traces."
)
exercise = Exercise(hints, check, minutes=20, level="medium", why=why)
