"""tensor_parallel_bytes: what a split layer's all-reduces send; backward's, or the ring's two rounds, are forgotten."""

import math

from ..exercises.cases import numbers
from ..exercises.exercise import Exercise

hints = (
    "How many all-reduces? Attention has one forward and one backward, and so has the MLP.",
    "An all-reduce's tensor has batch · sequence · hidden numbers on every rank, whatever n is.",
    "A ring all-reduce sends 2(n - 1)/n times its tensor's bytes from each rank. Run forward again: its two "
    "all-reduces come again.",
)


def sent(calls=lambda again: 4 + 2 * again, ring=lambda n: 2 * (n - 1) / n, size=lambda b, s, h, e: b * s * h * e):
    """An answer: how many all-reduces, how often each sends its tensor, and the tensor's bytes."""
    return lambda b, s, h, n, e=2, again=False: calls(again) * ring(n) * size(b, s, h, e)


def in_parts(rounded):
    """An answer that rounds the number of elements in 1/n of the tensor."""
    return lambda b, s, h, n, e=2, again=False: (4 + 2 * again) * 2 * (n - 1) * rounded(b * s * h, n) * e


right = sent()
MISTAKES = [  # (diagnosis, what it would give)
    ("recompute is not used: forward's two all-reduces come once more", sent(calls=lambda again: 4)),
    ("this is forward alone: backward all-reduces the gradient of attention's and of the MLP's input",
     sent(calls=lambda again: 2 + 2 * again)),
    ("there are two all-reduces forward and two backward, attention's and the MLP's: this is two in all",
     sent(calls=lambda again: 2)),
    ("this is what is given to the all-reduces: a ring sends 2(n - 1)/n times that", sent(ring=lambda n: 1)),
    ("a ring all-reduce sends 2(n - 1)/n of its tensor, twice what its halves send: this is half of it",
     sent(ring=lambda n: (n - 1) / n)),
    ("this is for all ranks together: one rank's is asked for", sent(ring=lambda n: 2 * (n - 1))),
    ("activations are whole on every rank between the split products: the tensor is not divided by n",
     sent(ring=lambda n: 2 * (n - 1) / n / n)),
    ("element is not used: a number need not have 2 bytes", sent(size=lambda b, s, h, e: 2 * b * s * h)),
    ("these are numbers, not bytes: each has `element` of them", sent(size=lambda b, s, h, e: b * s * h)),
    ("with recompute forward's two all-reduces come once more, not all four",
     sent(calls=lambda again: 4 + 4 * again)),
    ("the MLP's inner tensor is split and never sent: what is all-reduced has `hidden` features, not 4·hidden",
     sent(size=lambda b, s, h, e: 2.5 * b * s * h * e)),
    ("a part of the tensor is rounded to whole numbers: 2(n - 1)/n is meant exactly",
     in_parts(lambda size, n: size // n)),
    ("a part of the tensor is rounded to whole numbers: 2(n - 1)/n is meant exactly",
     in_parts(lambda size, n: -(-size // n))),
    ("a part of the tensor is rounded to whole numbers: 2(n - 1)/n is meant exactly",
     lambda *args: math.floor(right(*args) + 1e-9)),
    ("the batch is missing: all of its sequences' activations are sent", sent(size=lambda b, s, h, e: s * h * e)),
]  # fmt: skip


def check(run):
    inputs = [(1, 2048, 4096, 8), (4, 128, 256, 4, 4), (1, 2048, 4096, 8, 2, True), (2, 100, 60, 3, 4, True),
              (3, 10, 10, 1), (2, 64, 64, 2, 8), (1, 5, 7, 3), (1, 5, 7, 4, 2, True)]  # fmt: skip
    labels = [
        f"{b} × {s} tokens, hidden {h}, {n} rank{'s' * (n > 1)}, {(*more, 2)[0]} bytes a number"
        + ", forward run again" * (len(more) > 1 and more[1])
        for b, s, h, n, *more in inputs
    ]
    numbers(run, inputs, [right(*args) for args in inputs], labels, MISTAKES)


WHY = (
    "A split layer adds up over the ranks twice forward and twice backward, on whole activations. Megatron with "
    "sequence parallelism makes each all-reduce a reduce-scatter and an all-gather: the same bytes on a ring, "
    "and smaller activations between them."
)
exercise = Exercise(hints, check, minutes=10, level="medium", why=WHY)
