"""The exercises of lesson 12: hints, and how an answer is checked."""

import random

import torch

from .cases import number
from .judge import Wrong, same, type_of
from .watch import watched

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


def _each(answer, inputs):
    """The answer's value for each input, and whether it changed what it was given."""

    def all_of_them():
        out = []
        for args in inputs:
            given = [list(a) if isinstance(a, list) else a for a in args]
            out.append((answer(*given), given == list(args)))
        return out

    return watched(all_of_them)


def _values(run, inputs):
    [seen] = run(_each, inputs, n=1)
    if seen.calls:
        raise Wrong(f"it calls {seen.calls[0].op}: this one is plain arithmetic, in one process")
    results = [value for value, _ in seen.result]
    for i, (_, unchanged) in enumerate(seen.result):
        if not unchanged:
            raise Wrong(
                "the lists that were given have changed: work on copies, as sorted(list) makes one", f"case {i}"
            )
    return results


def _judge(run, inputs, labels, parts, right, mistakes, tolerance=1e-6):
    """Compare the answers' numbers, part by part. parts: names of what is returned; mistakes: (diagnosis, function that
    gives all parts)."""
    results = _values(run, inputs)
    several = len(parts) > 1
    for label, value in zip(labels, results, strict=True):
        if value is None:
            raise Wrong("the result is None: does the function end without a return?", label)
        if several and (not isinstance(value, (tuple, list)) or len(value) != len(parts)):
            raise Wrong(f"it returns {type_of(value)}: {len(parts)} numbers are asked for, ({', '.join(parts)})", label)
    table = [value if several else (value,) for value in results]

    def column(rows, i):
        rows = [row if several else (row,) for row in rows]
        return [torch.tensor(float(row[i]), dtype=torch.float64) for row in rows]

    wanted = [right(*args) for args in inputs]
    wrong = [(why, [formula(*args) for args in inputs]) for why, formula in mistakes]
    for i, part in enumerate(parts):
        expected = column(wanted, i)
        would = [(why, column(rows, i)) for why, rows in wrong]
        would = [
            (why, rows)
            for why, rows in would
            if any(not torch.isclose(a, b) for a, b in zip(rows, expected, strict=True))
        ]
        got = [number(row[i]) for row in table]
        names = [f"{part}, {label}" if several else label for label in labels]
        same(got, expected, "", mistakes=would, labels=names, tolerance=(tolerance, 1e-12))


# ---- bandwidths -----------------------------------------------------------------------------------------------


class bandwidths:
    hints = (
        "First the size: for an all_gather it is n shards, for the others it is the payload already.",
        "Algorithm bandwidth is size / seconds, whatever the operation. Bus bandwidth multiplies it by the operation's "
        "factor, so that a perfect ring shows the speed of its links for every n.",
        "factor = {'all_reduce': 2 * (n - 1) / n, 'broadcast': 1}.get(op, (n - 1) / n)",
    )

    @staticmethod
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
        _judge(run, inputs, labels, ("algorithm", "bus"), right, mistakes)


# ---- exposed --------------------------------------------------------------------------------------------------


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


class exposed:
    hints = (
        "First write a helper that gives the length of the union of spans: sort them, and add of each only what lies "
        "beyond the end reached so far.",
        "Then no intersection is needed: all that is busy, minus what computes, is communication that is exposed.",
        "length(compute + communication) - length(compute)",
    )

    @staticmethod
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
        _judge(run, list(cases.values()), list(cases), ("seconds",), right, mistakes, tolerance=1e-9)


# ---- Amdahl ---------------------------------------------------------------------------------------------------


class amdahl:
    hints = (
        "speedup = t1 / tn, and the efficiency is the share of n that it reaches.",
        "Divide tn = t1 * (s + (1 - s) / n) by t1: then 1 / speedup = s + (1 - s) / n. Solve for s.",
        "s = (1 / speedup - 1 / n) / (1 - 1 / n); with m ranks the speedup is 1 / (s + (1 - s) / m).",
    )

    @staticmethod
    def check(run):
        inputs = [(1.0, 0.25, 4, 64), (1.0, 0.4, 4, 64), (0.2, 0.14, 2, 8), (3.0, 1.2, 3, 1000), (0.5, 0.5, 4, 2),
                  (0.08, 0.03, 4, 4), (10.0, 1.0, 16, 4096), (1.0, 0.2, 4, 6), (0.078, 0.124, 2, 4)]  # fmt: skip
        labels = [f"{a * 1e3:g} ms on one rank, {b * 1e3:g} on {n}, then {m:,}" for a, b, n, m in inputs]

        def fraction(t1, tn, n):
            return (tn / t1 - 1 / n) / (1 - 1 / n)

        def right(t1, tn, n, m, serial=fraction):
            s = serial(t1, tn, n)
            return t1 / tn / n, s, 1 / (s + (1 - s) / m)

        def far(law):
            return lambda t1, tn, n, m: (*right(t1, tn, n, m)[:2], law(fraction(t1, tn, n), n, m))

        def clamped(low, high):
            return lambda *given: right(*given, lambda *three: min(high, max(low, fraction(*three))))

        bounds = [
            *(clamped(*b) for b in ((0.0, 1.0), (0.0, 1e9), (-1e9, 1.0))),
            lambda *given: (min(1.0, right(*given)[0]), *right(*given)[1:]),
            lambda *given: (*right(*given)[:2], min(given[3], right(*given)[2])),
        ]
        mistakes = [
            ("the efficiency is upside down: one rank's time is divided by the n ranks'",
             lambda t1, tn, n, m: (tn / t1 / n, *right(t1, tn, n, m)[1:])),
            ("this is t1 / tn, the speedup, or the efficiency of weak scaling: n ranks share one batch, so divide by n",
             lambda t1, tn, n, m: (t1 / tn, fraction(t1, tn, n), right(t1, tn, n, m)[2])),
            ("the serial fraction is 1 - efficiency here: that is what is lost, and s is not all of it",
             lambda t1, tn, n, m: right(t1, tn, n, m, lambda t1, tn, n: 1 - t1 / tn / n)),
            ("this is the parallel fraction, 1 - s",
             lambda t1, tn, n, m: (t1 / tn / n, 1 - fraction(t1, tn, n), right(t1, tn, n, m)[2])),
            ("this is the parallel fraction, 1 - s",
             lambda t1, tn, n, m: right(t1, tn, n, m, lambda *given: 1 - fraction(*given))),
            ("1 - 1/n is missing below: the serial part alone is not all that the n ranks have to do",
             lambda t1, tn, n, m: right(t1, tn, n, m, lambda t1, tn, n: tn / t1 - 1 / n)),
            ("the serial part is taken to be all of what n ranks need: s + (1 - s) / n is",
             lambda t1, tn, n, m: right(t1, tn, n, m, lambda t1, tn, n: tn / t1)),
            *[("a bound is put on it: n ranks can be faster than n times one (then s < 0) or slower than one (s > 1), "
               "and the number should show it", bounded) for bounded in bounds],
            ("the speedup is for n ranks again: m are asked for", far(lambda s, n, m: 1 / (s + (1 - s) / n))),
            ("this is what infinitely many ranks would have, 1 / s: m are asked for",
             far(lambda s, n, m: 1 / s if s > 1e-9 else float(m))),
            ("the speedup is upside down: that is the share of the time that is left",
             far(lambda s, n, m: s + (1 - s) / m)),
            ("this is Gustafson's law, s + (1 - s)·m: there the work grows with the ranks",
             far(lambda s, n, m: s + (1 - s) * m)),
            ("the efficiency of n ranks is taken for m, too: it falls with m", lambda t1, tn, n, m:
             (*right(t1, tn, n, m)[:2], t1 / tn / n * m)),
            ("percent are given: fractions are asked for",
             lambda t1, tn, n, m: tuple(100 * v for v in right(t1, tn, n, m)[:2]) + right(t1, tn, n, m)[2:]),
            ("this is right for 4 ranks: is a 4 written into it?",
             lambda t1, tn, n, m: (t1 / tn / 4, (tn / t1 - 0.25) / 0.75, right(t1, tn, 4, m)[2])),
        ]  # fmt: skip
        _judge(run, inputs, labels, ("efficiency", "serial", "speedup"), right, mistakes)
