"""The exercise bus_bandwidth."""

from ..exercises.cases import numbers
from ..exercises.exercise import Exercise
from .shared import rounded

hints = (
    "A bandwidth is bytes per second. Which bytes does a rank send in a ring all-reduce?",
    "ring_bytes(size_in_bytes, n) / seconds.",
)


def check(run):
    inputs = [(1000, 0.5, 4), (64 << 20, 0.05, 2), (1 << 20, 2e-3, 8), (3000, 1e-4, 3), (3, 0.7, 4), (7, 0.9, 5)]
    expected = [2 * (n - 1) * size / n / seconds for size, seconds, n in inputs]
    labels = [f"bus_bandwidth{args}" for args in inputs]
    mistakes = [
        ("this is the algorithm's bandwidth, size / seconds: the bytes a rank sends are 2(n - 1)/n as many",
         lambda size, t, n: size / t),
        ("this counts one half of the ring: 2(n - 1)/n, not (n - 1)/n", lambda size, t, n: (n - 1) * size / n / t),
        ("bytes times seconds: a bandwidth is bytes per second", lambda size, t, n: 2 * (n - 1) * size / n * t),
        ("seconds per byte: a bandwidth is bytes per second", lambda size, t, n: t * n / (2 * (n - 1) * size)),
        ("this adds up all ranks' links", lambda size, t, n: 2 * (n - 1) * size / t),
        ("in GB per second: bytes per second are asked for", lambda size, t, n: 2 * (n - 1) * size / n / t / 1e9),
        ("in MB per second: bytes per second are asked for", lambda size, t, n: 2 * (n - 1) * size / n / t / 1e6),
        ("in bits per second: bytes per second are asked for", lambda size, t, n: 16 * (n - 1) * size / n / t),
        ("the factor is upside down: multiply by 2(n - 1)/n", lambda size, t, n: size / t / (2 * (n - 1) / n)),
        ("the factor is upside down: 2(n - 1)/n, not 2n/(n - 1)", lambda size, t, n: 2 * n / (n - 1) * size / t),
        ("2 · size_in_bytes is what a rank sends with very many ranks: 2(n - 1)/n as many with n",
         lambda size, t, n: 2 * size / t),
        *rounded(lambda size, t, n: 2 * (n - 1) * size / n / t),
        ("the bytes are rounded to a whole number: divide with /", lambda size, t, n: 2 * (n - 1) * size // n / t),
        ("size_in_bytes // n drops what is left over: divide with /",
         lambda size, t, n: 2 * (n - 1) * (size // n) / t),
    ]  # fmt: skip
    numbers(run, inputs, expected, labels, mistakes)


exercise = Exercise(hints, check)
