"""clip_and_add: each row's gradient is clipped by itself, then they are added up; typically the sum is clipped."""

import math

import torch

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, same, show
from ..exercises.runs import results

hints = (
    "gradients.norm(dim=1) has one length for each row. Each row gets a factor of its own: min(1, clip / length).",
    "torch.clamp(…, max=1) is the min(1, …): without it short gradients would be made longer. A zero gradient "
    "gives clip / 0, which is infinite, and infinity times zero is not a number.",
    "norms = gradients.norm(dim=1, keepdim=True); scale = (clip / norms.clamp(min=1e-30)).clamp(max=1); and then "
    "(gradients * scale).sum(0)",
)


def lengths(g):
    return g.norm(dim=1, keepdim=True)


def clipped(g, c, lengths=lengths, most=1.0):
    return (g * (c / lengths(g).clamp(min=1e-30)).clamp(max=most)).sum(0)


def as_one(g, c):
    return g * min(1.0, c / max(g.norm().item(), 1e-30))


MISTAKES = [  # (diagnosis, what it would give)
    ("the sum was clipped, not the single rows: one long row still decides where it points",
     lambda g, c: as_one(g.sum(0), c)),
    ("the mean was clipped, not the single rows", lambda g, c: as_one(g.mean(0), c)),
    ("a short row's length was taken to be 1e-3: rows may be shorter than that, only zero needs care",
     lambda g, c: clipped(g, c, lambda g: lengths(g).clamp(min=1e-3))),
    ("the mean was clipped, not the single rows, and multiplied back", lambda g, c: as_one(g.mean(0), c) * len(g)),
    ("nothing is clipped", lambda g, c: g.sum(0)),
    ("every row was made as long as clip: short ones stay as they are, the factor is at most 1",
     lambda g, c: clipped(g, c, most=math.inf)),
    ("each number was cut off at ±clip: it is the row's length that is bounded", lambda g, c: g.clamp(-c, c).sum(0)),
    ("one factor for all rows, from the longest: each row has its own",
     lambda g, c: clipped(g, c, lambda g: lengths(g).max())),
    ("the mean of the clipped rows: the sum was asked for", lambda g, c: clipped(g, c) / len(g)),
    ("the length is the sum of absolute values: the Euclidean one was asked for",
     lambda g, c: clipped(g, c, lambda g: g.abs().sum(1, keepdim=True))),
    ("divided by the squared length: the root is missing", lambda g, c: clipped(g, c, lambda g: lengths(g) ** 2)),
    ("1e-6 was added to the length: max(length, something tiny) keeps the zero away and changes nothing else",
     lambda g, c: clipped(g, c, lambda g: lengths(g) + 1e-6)),
    ("rows longer than clip are left out: they are to be shortened", lambda g, c: (g * (lengths(g) <= c)).sum(0)),
    ("the lengths are taken over the columns: dim=1 runs along a row",
     lambda g, c: clipped(g, c, lambda g: g.norm(dim=0, keepdim=True))),
]  # fmt: skip


def check(run):
    def rows(b, d, seed, dtype=F64):
        scale = torch.logspace(-1, 1, b, dtype=F64)[:, None] if b else 1.0
        return (values((b, d), F64, 0, seed) * scale).to(dtype)

    zero = rows(4, 3, 5)
    zero[1] = 0
    inputs = [(rows(6, 4, 1), 1.5), (rows(5, 7, 2, F32), 0.01), (rows(3, 2, 3), 100.0), (rows(1, 5, 4), 0.5),
              (zero, 0.7), (rows(9, 1, 7), 2.0), (1e-6 * rows(4, 3, 8), 1e-7), (rows(0, 3, 6), 1.0)]  # fmt: skip
    labels = [f"{len(g)} rows of {g.shape[1]} numbers, {str(g.dtype)[6:]}, clip {c}" for g, c in inputs]
    labels[4] += ", one of them zero"
    got, expected = results(run, inputs, labels), [clipped(*one) for one in inputs]
    if isinstance(got[4], torch.Tensor) and got[4].isnan().any():
        why = "a row that is zero makes the sum not a number: clip / 0 is infinite, and times 0 is NaN"
        raise Wrong(why, labels[4], show(expected[4]), show(got[4]))
    known = [(why, [formula(*one) for one in inputs[:-1]]) for why, formula in MISTAKES]
    same(got[:-1], expected[:-1], "", mistakes=known, labels=labels[:-1])
    same(got[-1:], expected[-1:], "", labels=labels[-1:])  # no rows at all


WHY = (
    "No row's part is longer than clip, whatever the row is: adding or taking away one moves the sum by clip at "
    "most, and the noise is measured against that. Opacus gets single rows' gradients from hooks, layer by "
    "layer; torch's clip_grad_norm_ clips the whole batch's gradient, which bounds nobody's part."
)
exercise = Exercise(hints, check, minutes=15, level="medium", why=WHY)
