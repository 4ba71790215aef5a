"""The exercise ring_bytes."""

from ..exercises.cases import numbers
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong
from .shared import rounded

hints = (
    "How many steps are there, and how large is what a rank sends in one step?",
    "n - 1 steps in the first half, n - 1 in the second, and size_in_bytes / n in each.",
)


def check(run):
    inputs = [(1000, 4), (64 << 20, 2), (1 << 20, 8), (4096, 1), (3000, 3), (3, 4), (1_000_003, 4), (7, 5)]
    expected = [2 * (n - 1) * size / n for size, n in inputs]
    labels = [f"ring_bytes({size}, {n})" for size, n in inputs]
    mistakes = [
        ("this is one half of it: n - 1 steps add the pieces up, n - 1 more bring them round",
         lambda size, n: (n - 1) * size / n),
        ("this is what all ranks send together: the question is what one of them sends",
         lambda size, n: 2 * (n - 1) * size),
        ("in each step a rank passes on one n-th of the tensor, not all of it", lambda size, n: (n - 1) * size),
        ("2 · size_in_bytes is what it comes close to for many ranks: a rank makes n - 1 steps each time, not n",
         lambda size, n: 2 * size),
        ("integer division: 2 * (n - 1) // n is 1 for every n above 1, multiply by the size first",
         lambda size, n: 2 * (n - 1) // n * size),
        ("this counts elements of 4 bytes: size_in_bytes is in bytes already",
         lambda size, n: 8 * (n - 1) * size / n),
        ("this counts elements of 4 bytes: size_in_bytes is in bytes already",
         lambda size, n: (n - 1) * size / n / 2),
        ("this is (n + 1)/n where (n - 1)/n is right", lambda size, n: 2 * (n + 1) * size / n),
        ("this is what a server's link carries, n tensors in and n out", lambda size, n: 2 * n * size),
        ("the size is missing: this is only the factor 2(n - 1)/n", lambda size, n: 2 * (n - 1) / n),
        ("in MB: bytes are asked for", lambda size, n: 2 * (n - 1) * size / n / 1e6),
        ("divided by n - 1: there are n pieces", lambda size, n: 2 * size if n > 1 else 0),
        *rounded(lambda size, n: 2 * (n - 1) * size / n),
        ("size_in_bytes // n drops what is left over: divide with /",
         lambda size, n: 2 * (n - 1) * (size // n)),
    ]  # fmt: skip
    try:
        numbers(run, inputs, expected, labels, mistakes, tolerance=(1e-7, 0))
    except Wrong as wrong:
        if wrong.diagnosis.endswith("where 0 is right"):
            wrong.diagnosis += ": one rank sends nothing"
        raise


exercise = Exercise(hints, check)
