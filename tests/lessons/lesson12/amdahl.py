"""Answers to amdahl: wrong ones as people write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


def serial(t1, tn, n):
    return (tn / t1 - 1 / n) / (1 - 1 / n)


@mistake("amdahl", "or the efficiency of weak scaling")
def weak_efficiency(t1, tn, n, m):
    s = serial(t1, tn, n)
    return t1 / tn, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "the efficiency is upside down")
def inverse_efficiency(t1, tn, n, m):
    s = serial(t1, tn, n)
    return tn / t1 / n, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "that is what is lost, and s is not all of it")
def what_is_lost(t1, tn, n, m):
    s = 1 - t1 / tn / n
    return t1 / tn / n, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "this is the parallel fraction, 1 - s")
def the_other_part(t1, tn, n, m):
    p = 1 - serial(t1, tn, n)
    return t1 / tn / n, p, 1 / (1 - p + p / m)


@mistake("amdahl", "1 - 1/n is missing below")
def not_divided(t1, tn, n, m):
    s = tn / t1 - 1 / n
    return t1 / tn / n, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "the speedup is for n ranks again: m are asked for")
def for_n_again(t1, tn, n, m):
    return t1 / tn / n, serial(t1, tn, n), t1 / tn


@mistake("amdahl", "this is what infinitely many ranks would have")
def the_limit(t1, tn, n, m):
    s = serial(t1, tn, n)
    return t1 / tn / n, s, 1 / s if s > 1e-9 else m


@mistake("amdahl", "this is Gustafson's law")
def gustafson(t1, tn, n, m):
    s = serial(t1, tn, n)
    return t1 / tn / n, s, s + (1 - s) * m


@mistake("amdahl", "it falls with m")
def same_efficiency(t1, tn, n, m):
    return t1 / tn / n, serial(t1, tn, n), t1 / tn / n * m


@mistake("amdahl", "a bound is put on it")
def between_nought_and_one(t1, tn, n, m):
    s = min(1.0, max(0.0, serial(t1, tn, n)))
    return t1 / tn / n, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "a bound is put on it")
def not_below_nought(t1, tn, n, m):
    s = max(0.0, serial(t1, tn, n))
    return t1 / tn / n, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "a bound is put on it")
def not_above_one(t1, tn, n, m):
    s = min(1.0, serial(t1, tn, n))
    return t1 / tn / n, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "a bound is put on it")
def efficiency_at_most_one(t1, tn, n, m):
    s = serial(t1, tn, n)
    return min(1.0, t1 / tn / n), s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "a bound is put on it")
def at_most_m(t1, tn, n, m):
    s = serial(t1, tn, n)
    return t1 / tn / n, s, min(m, 1 / (s + (1 - s) / m))


@mistake("amdahl", "the result is None")
def prints_it(t1, tn, n, m):
    print(t1 / tn / n)


@right("amdahl")
def by_time(t1, tn, n, m):
    s = (n * tn - t1) / (t1 * (n - 1))
    time = t1 * s + t1 * (1 - s) / m
    return t1 / (n * tn), s, t1 / time
