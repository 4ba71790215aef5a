"""Formulas, the fit on made-up times, and what a sweep on live ranks gives; no time is judged."""

from math import inf, log2

import numpy as np
import pytest
import torch

from pardist_lib.measure.alpha_beta import (
    ALGORITHMS,
    OPERATIONS,
    all_reduce_seconds,
    alpha_beta,
    crossover,
    fit,
    group_of,
    measured_crossover,
    race,
)
from pardist_lib.mechanisms import collectives

SIZES = [1e3, 1e4, 1e5, 1e6, 1e7]


def noisy(alpha, beta, seed=0, repeats=15):
    draw = np.random.default_rng(seed)
    return [(alpha + s / beta) * (1 + 0.1 * draw.exponential(size=repeats)) for s in SIZES]


@pytest.mark.parametrize("alpha, beta", [(1e-4, 1e9), (2e-6, 1e11), (5e-3, 3e8)])
def test_the_fit_finds_what_the_times_were_made_from(alpha, beta):
    found = fit(SIZES, [[alpha + s / beta] for s in SIZES])
    assert found.latency == pytest.approx(alpha) and found.bandwidth == pytest.approx(beta)
    assert found.seconds(1e5) == pytest.approx(alpha + 1e5 / beta)
    found = fit(SIZES, noisy(alpha, beta))
    assert found.latency == pytest.approx(alpha, rel=0.2) and found.bandwidth == pytest.approx(beta, rel=0.2)
    low, high = found.latency_interval
    assert low <= found.latency <= high
    low, high = found.bandwidth_interval
    assert low <= found.bandwidth <= high


def test_a_slow_size_does_not_pull_the_line_away():
    times = [[1e-4 + s / 1e9] for s in SIZES]
    times[2] = [10 * times[2][0]]
    found = fit(SIZES, times)
    assert found.latency == pytest.approx(1e-4) and found.bandwidth == pytest.approx(1e9)


def test_neither_falls_below_zero():
    flat = fit(SIZES, [[3e-3]] * 5)
    assert flat.latency == pytest.approx(3e-3) and flat.bandwidth == inf and flat.seconds(1e9) == pytest.approx(3e-3)
    steep = fit([1e6, 1e7], [[1e-3], [5e-2]])
    assert steep.latency >= 0 and steep.bandwidth > 0


def test_the_interval_narrows_with_more_repetitions():
    few, many = (fit(SIZES, noisy(1e-4, 1e9, repeats=n)) for n in (3, 60))
    wide, narrow = (f.latency_interval[1] - f.latency_interval[0] for f in (few, many))
    assert narrow < wide


def test_a_bandwidth_that_does_not_show_is_said_in_words():
    """Ten times as many bytes, no longer: the latency hides it. And where one repetition of many shows it."""
    flat = fit([1 << 10, 1 << 14], [[4e-3] * 5, [4e-3] * 5], "exchange", 4)
    assert flat.bandwidth == inf and "inf" not in str(flat)
    assert "a bandwidth that does not show: even the largest size took no longer" in str(flat)
    once = fit([1 << 10, 1 << 24], [[4e-3] * 5, [4e-3, 4e-3, 9e-3, 9e-3, 9e-3]], "exchange", 4)
    assert once.bandwidth_interval[1] == inf and str(once).endswith("and 3.36 GB/s (3.36 or more)")


def test_formulas_of_the_papers():
    """Thakur et al. (2005), section 4; Patarasuk, Yuan (2009), theorem 1."""
    a, b, g, s = 3e-5, 2e9, 1e-10, 1e6
    for n in (2, 4, 8, 1024):
        k, share = log2(n), (n - 1) / n
        expected = {
            "ring": 2 * (n - 1) * a + 2 * share * s / b + share * s * g,
            "recursive doubling": k * (a + s / b + s * g),
            "Rabenseifner": 2 * k * a + 2 * share * s / b + share * s * g,
            "tree": 2 * k * (a + s / b) + k * s * g,
            "naive": 2 * (n - 1) * (a + s / b) + (n - 1) * s * g,
        }
        assert set(expected) == set(ALGORITHMS)
        for name, seconds in expected.items():
            assert all_reduce_seconds(name, n, s, a, b, g) == pytest.approx(seconds, rel=1e-12)
    assert all_reduce_seconds("ring", 1, s, a, b, g) == 0
    three = all_reduce_seconds("recursive doubling", 3, s, a, b, g)
    assert three == pytest.approx(3 * a + 3 * s / b + 2 * s * g)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_formulas_bytes_are_the_algorithms(ranks_of, n):
    """With α = 0 and β = 1 a formula is the bytes that the busiest rank sends one after the other."""
    trace = ranks_of(n).trace(all_of_them)
    size = 4 * 1200
    for name in ("ring", "recursive doubling", "Rabenseifner"):
        mark = list(NAMES).index(name)
        sent = []
        for rank in range(n):
            mine = [e.bytes for e in trace.collectives if e.rank == rank and e.name in ("send", "barrier")]
            cuts = np.flatnonzero(np.array([e == 0 for e in mine]))
            sent.append(sum(mine[cuts[mark] : cuts[mark + 1]]))
        assert max(sent) == pytest.approx(all_reduce_seconds(name, n, size, 0, 1) - (size if n == 3 and mark else 0))


NAMES = {
    "ring": collectives.ring_all_reduce,
    "recursive doubling": collectives.recursive_doubling_all_reduce,
    "Rabenseifner": collectives.halving_doubling_all_reduce,
}


def all_of_them():
    for f in NAMES.values():
        torch.distributed.barrier()
        f(torch.ones(1200))
    torch.distributed.barrier()


def test_crossovers_are_where_both_take_as_long():
    a, b, g = 1e-4, 1e9, 2e-10
    for short, long in (
        ("recursive doubling", "ring"),
        ("tree", "ring"),
        ("recursive doubling", "Rabenseifner"),
    ):
        for n in (4, 8, 16, 24):
            size = crossover(short, long, n, a, b, g)
            assert 0 < size < inf
            both = [all_reduce_seconds(name, n, size, a, b, g) for name in (short, long)]
            assert both[0] == pytest.approx(both[1])
            assert all_reduce_seconds(long, n, 2 * size, a, b, g) < all_reduce_seconds(short, n, 2 * size, a, b, g)
    assert crossover("Rabenseifner", "tree", 8, a, b) == inf and crossover("naive", "tree", 8, a, b) == 0
    assert crossover("ring", "ring", 8, a, b) == inf


def test_a_measured_crossover_lies_between_the_sizes_where_the_winner_changes():
    sizes = [1, 10, 100, 1000]
    assert measured_crossover(sizes, [1, 1, 4, 8], [2, 2, 2, 2]) == pytest.approx(10 * 10**0.5)
    assert measured_crossover(sizes, [1, 1, 1, 1], [2, 2, 2, 2]) == inf
    assert measured_crossover(sizes, [3, 3, 3, 3], [2, 2, 2, 2]) == 0


def mine(n):
    return torch.distributed.get_process_group_ranks(group_of(n))


def test_a_sweep_on_live_ranks(ranks_of):
    ranks = ranks_of(4)
    assert ranks.run(mine, 2) == [[0, 1], [0, 1], [2, 3], [2, 3]] and ranks.run(mine, 4) == [[0, 1, 2, 3]] * 4
    for name in OPERATIONS:
        found = alpha_beta(ranks, name, n=2, sizes=(1024, 1 << 18), repeats=3)
        assert found.latency >= 0 and found.bandwidth > 0 and (found.operation, found.ranks) == (name, 2)
        assert [len(t) for t in found.times] == [3, 3] and f"{name} on 2 ranks" in str(found)
    raced = race(ranks, {"ring": ring, "doubling": doubling}, (1024, 4096), repeats=2)
    assert set(raced) == {"ring", "doubling"} and all(len(t) == 2 and min(t) > 0 for t in raced.values())


def ring(tensor, group):
    collectives.ring_all_reduce(tensor, group=group)


def doubling(tensor, group):
    collectives.recursive_doubling_all_reduce(tensor, group=group)


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda ranks: alpha_beta(ranks, "all_add"), "there is no operation 'all_add': all_reduce"),
        (lambda ranks: alpha_beta(ranks, n=3), "groups of 3 do not fill 4 ranks: n=2 does"),
        (lambda ranks: alpha_beta(ranks, sizes=(4, 4)), "two different sizes"),
        (lambda ranks: alpha_beta(ranks, repeats=0), "repeats is 1 or more"),
        (lambda ranks: fit([1, 2], [[1]]), "at least two sizes"),
        (lambda ranks: fit([1, 2], [[1], [0]]), "times above 0"),
        (lambda ranks: all_reduce_seconds("star", 4, 1, 1, 1), "there is no algorithm 'star': ring"),
        (lambda ranks: all_reduce_seconds("ring", 0, 1, 1, 1), "1 or more ranks"),
        (lambda ranks: all_reduce_seconds("ring", 4.5, 1, 1, 1), "a whole number of them, not 4.5"),
        (lambda ranks: all_reduce_seconds("ring", 4, -1, 1, 1), "0 or more bytes, not -1"),
        (lambda ranks: all_reduce_seconds("ring", 4, 1, 1, -1), "a bandwidth is above 0 bytes a second"),
        (lambda ranks: crossover("tree", "ring", 4, -1e-5, 1e9), "latency and the seconds to add a byte are 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(ranks_of, wrong, told):
    with pytest.raises(ValueError, match=told):
        wrong(ranks_of(4))
