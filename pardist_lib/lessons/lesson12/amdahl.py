"""The exercise amdahl."""

from ..exercises.exercise import Exercise
from .shared import judge

hints = (
    "speedup = t1 / tn, and the efficiency is the share of n that it reaches.",
    "Divide tn = t1 * (s + (1 - s) / n) by t1: then 1 / speedup = s + (1 - s) / n. Solve for s.",
    "s = (1 / speedup - 1 / n) / (1 - 1 / n); with m ranks the speedup is 1 / (s + (1 - s) / m).",
)


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
    judge(run, inputs, labels, ("efficiency", "serial", "speedup"), right, mistakes)


exercise = Exercise(hints, check)
