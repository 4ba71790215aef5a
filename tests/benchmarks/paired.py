"""Comparing two timings on a machine that is never quiet: pairs taken turn about, and an interval for their ratio."""

import time

import numpy as np


def paired_ratio(a_times, b_times, seed=0):
    """(median, low, high) of a/b pair by pair: the median of the ratios and its 95 % bootstrap interval.

    a_times, b_times: seconds, the i-th of each taken right after one another. The interval resamples the pairs 10,000
    times with replacement (percentile bootstrap: Efron, Tibshirani 1993, chapter 13). Raises ValueError where the
    lists differ in length or are empty.
    """
    a, b = np.asarray(a_times, dtype=float), np.asarray(b_times, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"paired_ratio needs two equally long lists of times, not {a.shape} and {b.shape}")
    ratios = a / b
    again = np.random.default_rng(seed).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(again, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def interleave(a, b, pairs=30, before=None):
    """Time `a()` and `b()` A B, B A, A B …: a slow spell of the machine hits both, and neither is always the second.

    Each runs once unmeasured first. `before()` runs untimed ahead of every call (a barrier, say). A call that
    returns a float has timed itself: those are its seconds. Returns (a_times, b_times), for `paired_ratio`.
    """
    a_times, b_times = [], []
    for i in range(-1, pairs):
        turns = [(a, a_times), (b, b_times)]
        for call, times in turns if i % 2 == 0 else reversed(turns):
            if before:
                before()
            start = time.perf_counter()
            own = call()
            times.append(own if isinstance(own, float) else time.perf_counter() - start)
    return a_times[1:], b_times[1:]
