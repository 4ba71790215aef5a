"""The exercise tensor_parallel_bytes."""

import math

from ..exercises.cases import numbers
from ..exercises.exercise import Exercise

hints = (
    "How many all-reduces? Attention has one forward and one backward, and so has the MLP.",
    "An all-reduce's tensor has batch · sequence · hidden numbers on every rank, whatever n is.",
    "A ring all-reduce sends 2(n - 1)/n times its tensor's bytes from each rank. Run forward again: its two "
    "all-reduces come again.",
)


def check(run):
    inputs = [(1, 2048, 4096, 8), (4, 128, 256, 4, 4), (1, 2048, 4096, 8, 2, True), (2, 100, 60, 3, 4, True),
              (3, 10, 10, 1), (2, 64, 64, 2, 8), (1, 5, 7, 3), (1, 5, 7, 4, 2, True)]  # fmt: skip
    labels = [
        f"{b} × {s} tokens, hidden {h}, {n} rank{'s' * (n > 1)}, {(*rest, 2)[0]} bytes a number"
        + ", forward run again" * (len(rest) > 1 and rest[1])
        for b, s, h, n, *rest in inputs
    ]

    def right(b, s, h, n, element=2, again=False, calls=None, ring=None):
        calls = 4 + 2 * again if calls is None else calls
        return calls * (2 * (n - 1) / n if ring is None else ring) * b * s * h * element

    mistakes = [
        ("recompute is not used: forward's two all-reduces come once more",
         lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e)),
        ("this is forward alone: backward all-reduces the gradient of attention's and of the MLP's input",
         lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, calls=2 + 2 * again)),
        ("there are two all-reduces forward and two backward, attention's and the MLP's: this is two in all",
         lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, calls=2)),
        ("this is what is given to the all-reduces: a ring sends 2(n - 1)/n times that",
         lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, again, ring=1)),
        ("a ring all-reduce sends 2(n - 1)/n of its tensor, twice what its halves send: this is half of it",
         lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, again, ring=(n - 1) / n)),
        ("this is for all ranks together: one rank's is asked for",
         lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, again) * n),
        ("2(n - 1) messages of a ring have 1/n of the tensor each: it is not divided by n here",
         lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, again, ring=2 * (n - 1))),
        ("activations are whole on every rank between the split products: the tensor is not divided by n",
         lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, again) / n),
        ("element is not used: a number need not have 2 bytes", lambda b, s, h, n, e=2, again=False:
         right(b, s, h, n, 2, again)),
        ("these are numbers, not bytes: each has `element` of them", lambda b, s, h, n, e=2, again=False:
         right(b, s, h, n, 1, again)),
        ("with recompute forward's two all-reduces come once more, not all four",
         lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, calls=8 if again else 4)),
        ("the MLP's inner tensor is split and never sent: what is all-reduced has `hidden` features, not 4·hidden",
         lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, again) * 2.5),
        ("a part of the tensor is rounded to whole numbers: 2(n - 1)/n is meant exactly",
         lambda b, s, h, n, e=2, again=False: (4 + 2 * again) * 2 * (n - 1) * (b * s * h // n) * e),
        ("a part of the tensor is rounded to whole numbers: 2(n - 1)/n is meant exactly",
         lambda b, s, h, n, e=2, again=False: (4 + 2 * again) * 2 * (n - 1) * -(-b * s * h // n) * e),
        ("a part of the tensor is rounded to whole numbers: 2(n - 1)/n is meant exactly",
         lambda b, s, h, n, e=2, again=False: math.floor(right(b, s, h, n, e, again) + 1e-9)),
        ("the batch is missing: all of its sequences' activations are sent",
         lambda b, s, h, n, e=2, again=False: right(1, s, h, n, e, again)),
    ]  # fmt: skip
    numbers(run, inputs, [right(*args) for args in inputs], labels, mistakes)


exercise = Exercise(hints, check)
