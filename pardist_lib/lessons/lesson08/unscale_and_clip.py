"""The exercise unscale_and_clip."""

import math

import torch

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, same
from ..exercises.watch import plain, watched
from .shared import number, unsent

hints = (
    "max_norm is meant for the gradients of the loss, not of the loss times the scale: unscale first.",
    "norm = root of Σ (g / scale)² over all tensors together: add up squares, then one root.",
    "One factor for all: min(1, max_norm / norm) / scale; where the norm is 0 nothing is to be clipped. g *= "
    "factor or g.mul_(factor) writes into the tensor.",
)


def check(run):
    inputs = []
    for seed, (shapes, dtype, scale, times) in enumerate((
        ([(2, 2), (3,)], F64, 8.0, 3.0), ([(3, 4), (4,), ()], F64, 1024.0, 0.3), ([(5,)], F32, 65536.0, 0.01),
        ([(6,), (2, 3), (1,)], F32, 2.0, 0.9), ([(4,)], F64, 0.5, 0.25), ([(3,), (2,)], F64, 256.0, None),
    )):  # fmt: skip
        g = [values(shape, dtype, i, seed) * (1 + 2 * i) for i, shape in enumerate(shapes)]
        norm = math.sqrt(sum(t.double().square().sum().item() for t in g))
        if times is None:
            inputs.append(([t * 0 for t in g], scale, 1.0))  # nothing has a gradient
        else:
            inputs.append(([t * scale for t in g], scale, norm * times))
    labels = [f"shapes {[tuple(t.shape) for t in g]}, scale {s:g}, max_norm {m:.3g}" for g, s, m in inputs]
    [seen] = run(_clips, inputs, n=1)
    unsent(seen)
    if not seen.kept:
        raise Wrong("other tensors were put into the list: write into those that are there, with mul_ or *=")
    wholly = [  # mistakes that explain the whole of it, in all cases
        why
        for i, (why, _) in enumerate(_clipped(*inputs[0]))
        if i and all(
            len(after) == len(given[0]) and all(map(equal, after, _clipped(*given)[i][1]))
            for given, (_, *after) in zip(inputs, seen.result, strict=True)
            if any(t.any() for t in given[0])
        )
    ]  # fmt: skip
    for (g, scale, most), label, (returned, *after) in zip(inputs, labels, seen.result, strict=True):
        norm = _length(g) / scale
        if any(not isinstance(t, torch.Tensor) or t.isnan().any() for t in after) and norm == 0:
            raise Wrong("gradients that are all zero become NaN: max_norm / 0 is infinite", label)
        (_, right), *mistakes = _clipped(g, scale, most)
        mistakes.sort(key=lambda pair: pair[0] not in wholly)
        same(after, right, "", mistakes=mistakes, labels=[f"gradient {i}, {label}" for i in range(len(g))])
        if isinstance(returned, torch.Tensor):
            raise Wrong("it returns a tensor: a Python number is asked for, norm.item()", label)
        got = torch.tensor(number(returned, "what it returns", label), dtype=F64)
        wrong = [
            ("the norm of the scaled gradients", norm * scale), ("the norm after clipping", min(norm, most)),
            ("the factor", min(1.0, most / max(norm, TINY))), ("the squared norm", norm**2),
            ("the norm of the last gradient", _length(g[-1:]) / scale),
            ("the sum of the tensors' norms", sum(_length([t]) for t in g) / scale),
        ]  # fmt: skip
        why = "it returns {}: the norm of all unscaled gradients before clipping is asked for"
        wrong = [(why.format(what), [torch.tensor(x, dtype=F64)]) for what, x in wrong]
        expected = [torch.tensor(norm, dtype=F64)]
        same([got], expected, "", mistakes=wrong, labels=[f"the result, {label}"], tolerance=(1e-5, 1e-12))


def _clips(answer, inputs):
    def all_of_them():
        found = []
        for gradients, scale, most in inputs:
            own = [g.clone() for g in gradients]
            handed = list(own)
            returned = plain(answer(handed, scale, most))
            replaced.append(len(handed) == len(own) and any(a is not b for a, b in zip(handed, own, strict=True)))
            found.append([returned, *own])
        return found

    replaced = []
    seen = watched(all_of_them)
    seen.kept = not any(replaced)
    return seen


TINY = 1e-30


def _length(gradients):
    return math.sqrt(sum(t.double().square().sum().item() for t in gradients))


def _clipped(g, scale, most):
    """(diagnosis, gradients): the right ones first, then what each mistake would give."""
    norm = _length(g) / scale
    factor = min(1.0, most / max(norm, TINY))

    def times(f):
        return [t * x for t, x in zip(g, f if isinstance(f, list) else [f] * len(g), strict=True)]

    def at_most(norm):
        return min(1.0, most / max(norm, TINY))

    return [
        ("", times(factor / scale)),
        ("clipped before unscaling: the norm of the scaled gradients is `scale` times too large, so nearly everything "
         "is clipped, and then divided once more", times(at_most(norm * scale) / scale)),
        ("unscaled twice: divided by the scale two times", times(factor / scale / scale)),
        ("unscaled twice, the norm being taken in between", times(at_most(norm / scale) / scale / scale)),
        ("gradients shorter than max_norm are made longer: the factor is at most 1",
         times(most / max(norm, TINY) / scale)),
        ("gradients shorter than max_norm are made longer: the factor is at most 1",
         times(most / (norm + 1e-6) / scale)),
        ("clipped, but not unscaled", times(factor)),
        ("nothing has changed: write into the tensors, with mul_ or *=", times(1.0)),
        ("clipped by the norm of the scaled gradients, and not unscaled", times(at_most(norm * scale))),
        ("unscaled, but not clipped", times(1 / scale)),
        ("each tensor is clipped by its own norm: one norm for all of them together",
         times([at_most(_length([t]) / scale) / scale for t in g])),
        ("multiplied by the scale: divide", times(factor * scale)),
        ("the norms of the tensors are added up: add up their squares, and take the root once",
         times(at_most(sum(_length([t]) for t in g) / scale) / scale)),
        ("divided by the squared norm: the root is missing", times(at_most(norm**2) / scale)),
        ("1e-6 was added to the norm, as torch's own clipping does: leave it out here",
         times(at_most(norm + 1e-6) / scale)),
        ("each number is cut off at ±max_norm: it is the norm that is bounded",
         [(t / scale).clamp(-most, most) for t in g]),
    ]  # fmt: skip


exercise = Exercise(hints, check)
