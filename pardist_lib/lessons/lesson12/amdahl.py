"""amdahl: efficiency, serial fraction, and the speedup to expect; what is lost is taken for the serial fraction."""

from ..exercises.exercise import Exercise
from .shared import judge

hints = (
    "speedup = t1 / tn, and the efficiency is the share of n that it reaches.",
    "Divide tn = t1 * (s + (1 - s) / n) by t1: then 1 / speedup = s + (1 - s) / n. Solve for s.",
    "s = (1 / speedup - 1 / n) / (1 - 1 / n); with m ranks the speedup is 1 / (s + (1 - s) / m).",
)


def reached(t1, tn, n):
    return t1 / tn / n


def fraction(t1, tn, n):
    return (tn / t1 - 1 / n) / (1 - 1 / n)


def law(s, n, m):
    return 1 / (s + (1 - s) / m)


def made(efficiency=reached, serial=fraction, speedup=law):
    """An answer out of its three parts; speedup is a function of (serial, n, m)."""

    def answer(t1, tn, n, m):
        s = serial(t1, tn, n)
        return efficiency(t1, tn, n), s, speedup(s, n, m)

    return answer


def bounded(low=-1e9, high=1e9):
    return lambda *times: min(high, max(low, fraction(*times)))


BOUND = (
    "a bound is put on it: n ranks can be faster than n times one (then s < 0) or slower than one (s > 1), and the "
    "number should show it"
)
MISTAKES = [  # (diagnosis, what it would give)
    ("the efficiency is upside down: one rank's time is divided by the n ranks'",
     made(efficiency=lambda t1, tn, n: tn / t1 / n)),
    ("this is t1 / tn, the speedup, or the efficiency of weak scaling: n ranks share one batch, so divide by n",
     made(efficiency=lambda t1, tn, n: t1 / tn)),
    ("the serial fraction is 1 - efficiency here: that is what is lost, and s is not all of it",
     made(serial=lambda *times: 1 - reached(*times))),
    ("this is the parallel fraction, 1 - s",
     made(serial=lambda *times: 1 - fraction(*times), speedup=lambda p, n, m: law(1 - p, n, m))),
    ("this is the parallel fraction, 1 - s", made(serial=lambda *times: 1 - fraction(*times))),
    ("1 - 1/n is missing below: the serial part alone is not all that the n ranks have to do",
     made(serial=lambda t1, tn, n: tn / t1 - 1 / n)),
    ("the serial part is taken to be all of what n ranks need: s + (1 - s) / n is",
     made(serial=lambda t1, tn, n: tn / t1)),
    (BOUND, made(serial=bounded(0.0, 1.0))),
    (BOUND, made(serial=bounded(low=0.0))),
    (BOUND, made(serial=bounded(high=1.0))),
    (BOUND, made(efficiency=lambda *times: min(1.0, reached(*times)))),
    (BOUND, made(speedup=lambda s, n, m: min(m, law(s, n, m)))),
    ("the speedup is for n ranks again: m are asked for", made(speedup=lambda s, n, m: law(s, n, n))),
    ("this is what infinitely many ranks would have, 1 / s: m are asked for",
     made(speedup=lambda s, n, m: 1 / s if s > 1e-9 else m)),
    ("the speedup is upside down: that is the share of the time that is left",
     made(speedup=lambda s, n, m: 1 / law(s, n, m))),
    ("this is Gustafson's law, s + (1 - s)·m: there the work grows with the ranks",
     made(speedup=lambda s, n, m: s + (1 - s) * m)),
    ("the efficiency of n ranks is taken for m, too: it falls with m",
     made(speedup=lambda s, n, m: law(s, n, n) / n * m)),
    ("percent are given: fractions are asked for",
     made(lambda *times: 100 * reached(*times), lambda *times: 100 * fraction(*times),
          lambda s, n, m: law(s / 100, n, m))),
    ("this is right for 4 ranks: is a 4 written into it?",
     made(lambda t1, tn, n: reached(t1, tn, 4), lambda t1, tn, n: fraction(t1, tn, 4))),
]  # fmt: skip


def check(run):
    inputs = [(1.0, 0.25, 4, 64), (1.0, 0.4, 4, 64), (0.2, 0.14, 2, 8), (3.0, 1.2, 3, 1000), (0.5, 0.5, 4, 2),
              (0.08, 0.03, 4, 4), (10.0, 1.0, 16, 4096), (1.0, 0.2, 4, 6), (0.078, 0.124, 2, 4)]  # fmt: skip
    labels = [f"{a * 1e3:g} ms on one rank, {b * 1e3:g} on {n}, then {m:,}" for a, b, n, m in inputs]
    judge(run, inputs, labels, ("efficiency", "serial", "speedup"), made(), MISTAKES)


why = (
    "One measured pair gives the serial fraction, and that bounds every n; Karp and Flatt's point is to see whether "
    "it grows with n. Frameworks report weak scaling for this reason: Megatron's papers grow the batch with the GPUs."
)
exercise = Exercise(hints, check, minutes=15, level="easy", why=why)
