"""bus_bandwidth: bytes that a rank sends, per second. Typically wrong: the tensor's bytes instead, or half the ring."""

from ..exercises.cases import formula
from ..exercises.exercise import Exercise
from .shared import rounded

hints = (
    "A bandwidth is bytes per second. Which bytes does a rank send in a ring all-reduce?",
    "ring_bytes(size_in_bytes, n) / seconds.",
)


def bus_bandwidth(size, t, n):
    return 2 * (n - 1) * size / n / t


def check(run):
    inputs = [(1000, 0.5, 4), (64 << 20, 0.05, 2), (1 << 20, 2e-3, 8), (3000, 1e-4, 3), (3, 0.7, 4), (7, 0.9, 5)]
    mistakes = [
        (
            "this is the algorithm's bandwidth, size / seconds: a rank sends 2(n - 1)/n as many bytes",
            lambda s, t, n: s / t,
        ),
        ("this counts one half of the ring: 2(n - 1)/n, not (n - 1)/n", lambda s, t, n: (n - 1) * s / n / t),
        ("bytes times seconds: a bandwidth is bytes per second", lambda s, t, n: 2 * (n - 1) * s / n * t),
        ("seconds per byte: a bandwidth is bytes per second", lambda s, t, n: t * n / (2 * (n - 1) * s)),
        ("this adds up all ranks' links", lambda s, t, n: 2 * (n - 1) * s / t),
        ("in GB per second: bytes per second are asked for", lambda *args: bus_bandwidth(*args) / 1e9),
        ("in MB per second: bytes per second are asked for", lambda *args: bus_bandwidth(*args) / 1e6),
        ("in bits per second: bytes per second are asked for", lambda *args: bus_bandwidth(*args) * 8),
        ("the factor is upside down: multiply by 2(n - 1)/n", lambda s, t, n: s / t / (2 * (n - 1) / n)),
        ("the factor is upside down: 2(n - 1)/n, not 2n/(n - 1)", lambda s, t, n: 2 * n / (n - 1) * s / t),
        ("2 · size_in_bytes is sent with very many ranks: 2(n - 1)/n · size with n", lambda s, t, n: 2 * s / t),
        *rounded(bus_bandwidth),
        ("the bytes are rounded to a whole number: divide with /", lambda s, t, n: 2 * (n - 1) * s // n / t),
        ("size_in_bytes // n drops what is left over: divide with /", lambda s, t, n: 2 * (n - 1) * (s // n) / t),
    ]
    formula(run, bus_bandwidth, inputs, mistakes)


WHY = (
    "Counted so, a number can be held against the speed of the link, whatever n is. nccl-tests does it the same "
    "way, with another factor for each collective: (n - 1)/n for all-gather and reduce-scatter."
)
exercise = Exercise(hints, check, minutes=5, level="easy", why=WHY)
