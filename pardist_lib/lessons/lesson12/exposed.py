"""The exercise exposed."""

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

    def right(compute, communication):
        return _length([*compute, *communication]) - _length(compute)

    def within_order(spans):  # as given, not sorted
        total, until = 0.0, float("-inf")
        for start, end in spans:
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total

    mistakes = [
        ("this is what is hidden: exposed is the rest", lambda a, b: _length(a) + _length(b) - _length([*a, *b])),
        ("this is all communication, hidden or not", lambda a, b: _length(b)),
        ("calls that overlap each other are counted twice: take the length of their union",
         lambda a, b: _sum(b) - _hidden_by_pairs(a, b)),
        ("calls that overlap each other are counted twice: take the length of their union",
         lambda a, b: _sum(b) - (_length(a) + _length(b) - _length([*a, *b]))),
        ("spans that overlap are counted twice: take the length of their union",
         lambda a, b: max(0.0, _sum([*a, *b]) - _sum(a))),
        ("this is compute that nothing is sent beside: the two are mixed up",
         lambda a, b: _length([*a, *b]) - _length(b)),
        ("totals are subtracted, as if all compute lay beside communication: when each happens counts",
         lambda a, b: max(0.0, _length(b) - _length(a))),
        ("only communication after the last computation counts here: sort the events by start, and mind the gaps",
         lambda a, b: _length([(max(s, max((e for _, e in a), default=s)), e) for s, e in b
                               if e > max((e for _, e in a), default=s)])),
        ("the events are in no order: sort them by start first",
         lambda a, b: within_order([*a, *b]) - within_order(a)),
        ("a call that compute touches at all is not all hidden: only the part beside compute is",
         lambda a, b: _length([(s, e) for s, e in b if not any(c < e and s < d for c, d in a)])),
        ("this is in milliseconds: seconds are asked for", lambda a, b: 1e3 * right(a, b)),
        ("times are rounded to milliseconds: events take microseconds, too",
         lambda a, b: right(*([(round(s, 3), round(e, 3)) for s, e in spans] for spans in (a, b)))),
        ("times are rounded to microseconds: take them as they are",
         lambda a, b: right(*([(round(s, 6), round(e, 6)) for s, e in spans] for spans in (a, b)))),
        ("compute that overlaps itself is taken off twice: it hides a message only once",
         lambda a, b: _length(b) - _hidden_by_pairs(a, _merged(b))),
        ("this is a share of the whole: seconds are asked for",
         lambda a, b: right(a, b) / (_length(b) or 1.0)),
    ]  # fmt: skip
    judge(run, list(cases.values()), list(cases), ("seconds",), right, mistakes, tolerance=1e-9)


def _length(spans):
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _sum(spans):
    return sum(end - start for start, end in spans)


def _merged(spans):
    """The same moments, as spans that do not overlap."""
    found = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def _hidden_by_pairs(compute, communication):
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b in compute for c, d in communication)


def _random_case(seed):
    dice = random.Random(seed)
    make = lambda k: [(a := dice.uniform(0, 1), a + dice.uniform(0, 0.2)) for _ in range(k)]  # noqa: E731
    return make(dice.randint(1, 8)), make(dice.randint(1, 8))


exercise = Exercise(hints, check)
