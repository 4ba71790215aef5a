"""The exercise rate_and_steps."""

import math

import torch

from ..exercises.cases import F64
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, same
from ..exercises.watch import Other
from .shared import in_one_process

hints = (
    "A row takes part with the same probability wherever it is: what counts is all rows together, and all rows "
    "that take part in one step.",
    "rate = batch / sum(rows). After s steps a row has taken part s · rate times on average: that has to be at "
    "least epochs.",
    "math.ceil(epochs / rate), the smallest whole number that is enough. (Mind that epochs / rate may come out as "
    "6000.000000000001: round first.)",
)


def check(run):
    inputs = [([15000] * 4, 150, 15), ([900, 300, 240], 60, 4), ([100], 7, 3), ([30, 10], 40, 5),
              ([1000, 2, 400, 38], 90, 1), ([50, 50], 12.5, 2), ([360] * 4, 144, 20),
              ([301, 300, 240], 60, 4)]  # fmt: skip
    labels = [f"rows {rows}, batch {batch}, {epochs} epochs" for rows, batch, epochs in inputs]
    got = in_one_process(run, inputs, labels)
    for value, label in zip(got, labels, strict=True):
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise Wrong(f"it returns {_kind(value)}: the pair (rate, steps) is asked for", label)

    def ratio(formula):
        return [torch.tensor(float(formula(*args)), dtype=F64) for args in inputs]

    rates, steps = [_number(v[0]) for v in got], [_number(v[1]) for v in got]
    same(rates, ratio(lambda r, b, e: b / sum(r)), "", labels=[f"the rate, {label}" for label in labels], mistakes=[
        ("rate and steps are swapped", ratio(lambda r, b, e: math.ceil(round(e * sum(r) / b, 9)))),
        ("divided by one rank's rows: a row may be on any rank, all rows count", ratio(lambda r, b, e: b / r[0])),
        ("divided by the mean of the ranks' rows: all rows count", ratio(lambda r, b, e: b / (sum(r) / len(r)))),
        ("the batch was divided by the ranks: it is of all ranks together",
         ratio(lambda r, b, e: b / len(r) / sum(r))),
        ("upside down: that is the number of steps in an epoch", ratio(lambda r, b, e: sum(r) / b)),
        ("1 over all rows: every row takes part, not one in each step", ratio(lambda r, b, e: 1 / sum(r))),
        ("multiplied by the epochs: the rate is that of one step", ratio(lambda r, b, e: e * b / sum(r))),
        ("divided by the epochs: the rate is that of one step", ratio(lambda r, b, e: b / sum(r) / e)),
        ("the batch itself: a probability is asked for", ratio(lambda r, b, e: b)),
        ("rows that the ranks do not divide evenly are lost: all rows count",
         ratio(lambda r, b, e: b / (sum(r) // len(r) * len(r)))),
        ("divided by the largest rank's rows", ratio(lambda r, b, e: b / max(r))),
    ])  # fmt: skip
    same(steps, ratio(lambda r, b, e: math.ceil(round(e * sum(r) / b, 9))), "", mistakes=[
        ("rounded to the nearest: that can be one step too few", ratio(lambda r, b, e: round(e * sum(r) / b))),
        ("rounded down: the last row would have taken part too rarely", ratio(lambda r, b, e: int(e * sum(r) / b))),
        ("the epochs are missing: these are the steps of one", ratio(lambda r, b, e: math.ceil(sum(r) / b))),
        ("these are the epochs: each of them has many steps", ratio(lambda r, b, e: e)),
        ("one rank's steps: a batch is taken from all ranks together",
         ratio(lambda r, b, e: math.ceil(e * r[0] / b))),
        ("multiplied by the ranks: a step is one step of all ranks together",
         ratio(lambda r, b, e: len(r) * math.ceil(round(e * sum(r) / b, 9)))),
        ("rounded up for each epoch, then multiplied: round once, at the end",
         ratio(lambda r, b, e: e * math.ceil(sum(r) / b))),
        ("one step too many where it fits exactly", ratio(lambda r, b, e: int(round(e * sum(r) / b, 9)) + 1)),
        ("a step for every row: in a step batch of them take part", ratio(lambda r, b, e: e * sum(r))),
        ("not a whole number of steps", ratio(lambda r, b, e: e * sum(r) / b)),
    ], labels=[f"the steps, {label}" for label in labels], tolerance=(1e-12, 1e-12))  # fmt: skip
    for value, label in zip(got, labels, strict=True):
        if isinstance(value[1], (bool, float)) or not equal(_number(value[1]), _number(value[1]).round()):
            raise Wrong("the number of steps is to be an int", label, got=repr(value[1]))


def _number(value):
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    ordinary = isinstance(value, (int, float)) and not isinstance(value, bool)
    return torch.tensor(float(value), dtype=F64) if ordinary else value


def _kind(value):
    return f"a {value.type}" if isinstance(value, Other) else "nothing (None)" if value is None else repr(value)[:60]


exercise = Exercise(hints, check)
