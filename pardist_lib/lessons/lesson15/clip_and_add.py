"""The exercise clip_and_add."""

import math

import torch

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, same, show
from .shared import in_one_process

hints = (
    "gradients.norm(dim=1) has one length for each row. Each row gets a factor of its own: min(1, clip / length).",
    "torch.clamp(…, max=1) is the min(1, …): without it short gradients would be made longer. A zero gradient "
    "gives clip / 0, which is infinite, and infinity times zero is not a number.",
    "norms = gradients.norm(dim=1, keepdim=True); scale = (clip / norms.clamp(min=1e-30)).clamp(max=1); and then "
    "(gradients * scale).sum(0)",
)


def check(run):
    def rows(b, d, seed, dtype=F64, spread=True):
        each = values((b, d), F64, 0, seed)
        scale = torch.logspace(-1, 1, b, dtype=F64)[:, None] if spread and b else 1.0
        return (each * scale).to(dtype)

    zero = rows(4, 3, 5)
    zero[1] = 0
    inputs = [
        (rows(6, 4, 1), 1.5),
        (rows(5, 7, 2, F32), 0.01),
        (rows(3, 2, 3), 100.0),
        (rows(1, 5, 4), 0.5),
        (zero, 0.7),
        (rows(0, 3, 6), 1.0),
        (rows(9, 1, 7), 2.0),
        (1e-6 * rows(4, 3, 8), 1e-7),
    ]
    labels = [f"{len(g)} rows of {g.shape[1]} numbers, {str(g.dtype)[6:]}, clip {c}" for g, c in inputs]
    labels[4] += ", one of them zero"
    got = in_one_process(run, inputs, labels)
    for value, label in zip(got, labels, strict=True):
        if isinstance(value, str) and value.startswith("ValueError"):
            raise Wrong(f"it raises: {value}", label)

    def factor(g, c, norms, smallest=1.0):
        return (c / norms.clamp(min=1e-30)).clamp(max=smallest)

    def clipped(g, c, norm=lambda g: g.norm(dim=1, keepdim=True), most=1.0):
        return (g * factor(g, c, norm(g), most)).sum(0)

    def total(g, c, by=1):
        return g.sum(0) / by * min(1.0, c / max((g.sum(0) / by).norm().item(), 1e-30))

    expected = [clipped(g, c) for g, c in inputs]
    mistakes = [
        ("the sum was clipped, not the single rows: one long row still decides where it points",
         [total(g, c) for g, c in inputs]),
        ("the mean was clipped, not the single rows", [total(g, c, max(len(g), 1)) for g, c in inputs]),
        ("a short row's length was taken to be 1e-3: rows may be shorter than that, only zero needs care",
         [clipped(g, c, lambda g: g.norm(dim=1, keepdim=True).clamp(min=1e-3)) for g, c in inputs]),
        ("the mean was clipped, not the single rows, and multiplied back",
         [total(g, c, max(len(g), 1)) * len(g) for g, c in inputs]),
        ("nothing is clipped", [g.sum(0) for g, c in inputs]),
        ("every row was made as long as clip: short ones stay as they are, the factor is at most 1",
         [clipped(g, c, most=math.inf) for g, c in inputs]),
        ("each number was cut off at ±clip: it is the row's length that is bounded",
         [g.clamp(-c, c).sum(0) for g, c in inputs]),
        ("one factor for all rows, from the longest: each row has its own",
         [g.sum(0) * min(1.0, c / max(g.norm(dim=1).max().item(), 1e-30)) if len(g) else None for g, c in inputs]),
        ("the mean of the clipped rows: the sum was asked for",
         [clipped(g, c) / len(g) if len(g) else None for g, c in inputs]),
        ("the length is the sum of absolute values: the Euclidean one was asked for",
         [clipped(g, c, lambda g: g.abs().sum(1, keepdim=True)) for g, c in inputs]),
        ("divided by the squared length: the root is missing",
         [clipped(g, c, lambda g: g.square().sum(1, keepdim=True)) for g, c in inputs]),
        ("1e-6 was added to the length: max(length, something tiny) keeps the zero away and changes nothing else",
         [(g * (c / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)).sum(0) for g, c in inputs]),
        ("rows longer than clip are left out: they are to be shortened",
         [(g * (g.norm(dim=1, keepdim=True) <= c)).sum(0) for g, c in inputs]),
        ("the lengths are taken over the columns: dim=1 runs along a row",
         [(g * factor(g, c, g.norm(dim=0, keepdim=True))).sum(0) for g, c in inputs]),
    ]  # fmt: skip
    if isinstance(got[4], torch.Tensor) and got[4].isnan().any():
        raise Wrong("a row that is zero makes the sum not a number: clip / 0 is infinite, and times 0 is NaN",
                    labels[4], show(expected[4]), show(got[4]))  # fmt: skip
    few = [[values[i] for i in range(len(inputs)) if i != 5] for values in (got, expected, labels)]
    mistakes = [(why, [t for i, t in enumerate(would) if i != 5]) for why, would in mistakes]
    same(few[0], few[1], "", mistakes=mistakes, labels=few[2])
    same(got[5:6], expected[5:6], "", labels=labels[5:6])  # no rows at all


exercise = Exercise(hints, check)
