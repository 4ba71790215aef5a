"""ring_bytes: what one rank sends in a ring all-reduce. Typically wrong: one half of it, or what all ranks send."""

from ..exercises.cases import formula
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong
from .shared import rounded

hints = (
    "How many steps are there, and how large is what a rank sends in one step?",
    "n - 1 steps in the first half, n - 1 in the second, and size_in_bytes / n in each.",
)


def ring_bytes(size, n):
    return 2 * (n - 1) * size / n


def check(run):
    inputs = [(1000, 4), (64 << 20, 2), (1 << 20, 8), (4096, 1), (3000, 3), (3, 4), (1_000_003, 4), (7, 5)]
    of_four = "this counts elements of 4 bytes: size_in_bytes is in bytes already"
    mistakes = [
        ("this is one half of it: n - 1 steps add the pieces up, n - 1 bring them round", lambda s, n: (n - 1) * s / n),
        ("this is what all ranks send together: what one of them sends is asked for", lambda s, n: 2 * (n - 1) * s),
        ("in each step a rank passes on one n-th of the tensor, not all of it", lambda s, n: (n - 1) * s),
        ("2 · size_in_bytes is what it comes close to with many ranks: each half has n - 1 steps", lambda s, n: 2 * s),
        ("integer division: 2 * (n - 1) // n is 1 for every n above 1, multiply by the size first",
         lambda s, n: 2 * (n - 1) // n * s),
        (of_four, lambda s, n: 8 * (n - 1) * s / n),
        (of_four, lambda s, n: (n - 1) * s / n / 2),
        ("this is (n + 1)/n where (n - 1)/n is right", lambda s, n: 2 * (n + 1) * s / n),
        ("this is what a server's link carries, n tensors in and n out", lambda s, n: 2 * n * s),
        ("the size is missing: this is only the factor 2(n - 1)/n", lambda s, n: 2 * (n - 1) / n),
        ("in MB: bytes are asked for", lambda s, n: ring_bytes(s, n) / 1e6),
        ("divided by n - 1: there are n pieces", lambda s, n: 2 * s if n > 1 else 0),
        *rounded(ring_bytes),
        ("size_in_bytes // n drops what is left over: divide with /", lambda s, n: 2 * (n - 1) * (s // n)),
    ]  # fmt: skip
    try:
        formula(run, ring_bytes, inputs, mistakes, tolerance=(1e-7, 0))
    except Wrong as wrong:
        wrong.diagnosis += ": one rank sends nothing" * wrong.diagnosis.endswith("where 0 is right")
        raise


WHY = (
    "2(n - 1) steps of one n-th each. NCCL may take trees, or sum inside the switch (NVLink SHARP), where a GPU "
    "sends about the tensor once instead of nearly twice."
)
exercise = Exercise(hints, check, minutes=5, level="easy", why=WHY)
