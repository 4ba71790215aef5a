"""The exercise fixed_point."""

import torch

from ..exercises.cases import F64
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, same, show
from .shared import FIELD, in_one_process, whole

hints = (
    "Multiply by 2**fraction_bits, round, and only then think about the sign: in Python and in torch, -1 % 2**32 "
    "is 2**32 - 1.",
    "The check comes before the wrap: afterwards a number that was too large looks like any other. Each of the "
    "clients may use its part of 2**31 - 1, so that the sum stays within.",
    "`if not (whole.abs() <= limit).all(): raise ValueError(…)` also catches NaN, which is neither larger nor "
    "smaller than anything.",
)


def check(run):
    def limit(clients):
        return (2**31 - 1) // clients

    good = [
        (torch.tensor([0.0, 1.0, 2.5, 0.3, 0.7, 0.49]), 3, 4),
        (torch.tensor([-1.0, -0.3, -0.7, 2.0, -100.0]), 4, 8),
        (torch.tensor([[0.1, -0.1, 12.75], [3.0, -3.3, 1e-9]]), 10, 16),
        (torch.tensor([limit(8), -limit(8), limit(8) - 1.0], dtype=F64), 8, 0),
        (torch.tensor([limit(100) / 2**12, -limit(100) / 2**12], dtype=F64), 100, 12),
        (torch.tensor([limit(8) + 0.25, -limit(8) - 0.25], dtype=F64), 8, 0),
    ]
    bad = [
        (torch.tensor([1.0, 40000.0]), 3, 16, "a value that alone leaves 32 bits"),
        (torch.tensor([limit(8) + 1.0], dtype=F64), 8, 0, "a value that 8 clients cannot all bring"),
        (
            torch.tensor([0.0, -(limit(4) + 1.0)], dtype=F64),
            4,
            0,
            "a negative value that 4 clients cannot all bring",
        ),
        (torch.tensor([1.0, float("nan")]), 3, 8, "a value that is not a number"),
        (torch.tensor([float("inf")]), 3, 8, "an infinite value"),
    ]
    inputs = [(v.double(), *rest) for v, *rest in good] + [(v.double(), *rest) for v, *rest, _ in bad]
    labels = [f"values {show(v)}, {c} clients, {bits} fraction bits" for v, c, bits in inputs]
    got = in_one_process(run, inputs, labels)
    edge = len(good) - 1
    if isinstance(got[edge], str) and not any(isinstance(value, str) for value in got[:edge]):
        why = "the range is checked before rounding: it is the whole number that may be as large as the limit"
        raise Wrong(why, labels[edge])
    _judge_encoding(inputs[: len(good)], got[: len(good)], labels)
    for value, label, (*_, kind) in zip(got[len(good) :], labels[len(good) :], bad, strict=True):
        if not (isinstance(value, str) and value.startswith("ValueError")):
            why = {
                "a value that alone leaves 32 bits": "it is not refused: nothing is checked, and it would wrap",
                "a value that is not a number": "NaN is not refused: it is neither larger nor smaller than a limit",
            }.get(kind, f"{kind} is not refused: each may use (2**31 - 1) // clients, or the sum can wrap")
            if isinstance(value, torch.Tensor) and kind == "a value that alone leaves 32 bits":
                signed = (value + 2**31) % FIELD - 2**31
                if signed.abs().max() <= limit(3):
                    why = "a value that is too large is cut off silently: a wrong sum is worse than a ValueError"
            raise Wrong(why, label, "ValueError", show(value) if isinstance(value, torch.Tensor) else repr(value))


def _judge_encoding(inputs, got, labels):
    def each(formula):
        return [formula(v, c, bits) for v, c, bits in inputs]

    expected = each(lambda v, c, bits: (v * 2**bits).round().long() % FIELD)
    whole(got, expected, labels[: len(inputs)], "the result")
    mistakes = [
        ("cut off, not rounded: to whole numbers .long() goes towards zero", each(lambda v, c, b: (v * 2**b).long())),
        ("rounded down, not to the nearest: .floor()", each(lambda v, c, b: (v * 2**b).floor().long())),
        ("multiplied by fraction_bits, not by 2**fraction_bits", each(lambda v, c, b: (v * b).round().long())),
        ("divided by 2**fraction_bits: the fraction is lost", each(lambda v, c, b: (v / 2**b).round().long())),
        ("rounded first, then scaled: the fraction is lost", each(lambda v, c, b: (v.round() * 2**b).long())),
        ("negative numbers are one too small: modulo 2**32, not 2**32 - 1",
         each(lambda v, c, b: (v * 2**b).round().long() % (FIELD - 1))),
        ("the sign is lost: -1 has to become 2**32 - 1", each(lambda v, c, b: (v * 2**b).round().abs().long())),
        ("negative numbers are cut off at zero", each(lambda v, c, b: (v * 2**b).round().clamp(min=0).long())),
        ("divided by the number of clients: that makes their mean, and loses digits",
         each(lambda v, c, b: (v * 2**b / c).round().long())),
        ("shifted by 2**31: in the sum every client would bring that shift along",
         each(lambda v, c, b: (v * 2**b).round().long() + 2**31)),
    ]  # fmt: skip
    mistakes = [(why, [t % FIELD for t in would]) for why, would in mistakes]
    mistakes.append(("modulo 2**31: the field has 2**32 elements, half of them stand for negative numbers",
                     each(lambda v, c, b: (v * 2**b).round().long() % 2**31)))  # fmt: skip
    same(got, expected, "", mistakes=mistakes, labels=labels[: len(inputs)])


exercise = Exercise(hints, check)
