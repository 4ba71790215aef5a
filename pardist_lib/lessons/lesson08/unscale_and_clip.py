"""unscale_and_clip: undo the loss scale, then clip by one norm; clipped before unscaling, nearly everything is."""

import math

import torch

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, same
from ..exercises.runs import silent
from ..exercises.watch import plain, told, watched
from .shared import likeliest_first, number

hints = (
    "max_norm is meant for the gradients of the loss, not of the loss times the scale: unscale first.",
    "norm = root of Σ (g / scale)² over all tensors together: add up squares, then one root.",
    "One factor for all: min(1, max_norm / norm) / scale; where the norm is 0 nothing is to be clipped. g *= "
    "factor or g.mul_(factor) writes into the tensor.",
)


def check(run):
    cases = [  # shapes, dtype, scale, max_norm / norm; in the last one nothing has a gradient
        ([(2, 2), (3,)], F64, 8.0, 3.0), ([(3, 4), (4,), ()], F64, 1024.0, 0.3), ([(5,)], F32, 65536.0, 0.01),
        ([(6,), (2, 3), (1,)], F32, 2.0, 0.9), ([(4,)], F64, 0.5, 0.25), ([(3,), (2,)], F64, 256.0, 0.0),
    ]  # fmt: skip
    inputs = []
    for seed, (shapes, dtype, scale, times) in enumerate(cases):
        g = [values(shape, dtype, i, seed) * (1 + 2 * i) for i, shape in enumerate(shapes)]
        inputs.append(([t * scale * bool(times) for t in g], scale, _length(g) * times or 1.0))
    labels = [f"shapes {[tuple(t.shape) for t in g]}, scale {s:g}, max_norm {m:.3g}" for g, s, m in inputs]
    [seen] = run(_clips, inputs, n=1)
    silent(seen)
    if any(replaced for _, replaced, *_ in seen.result):
        raise Wrong("other tensors were put into the list: write into those that are there, with mul_ or *=")
    mistakes = [(why, [_times(*given, factor) for given in inputs]) for why, factor in FACTORS]
    mistakes += [(why, [made(*given) for given in inputs]) for why, made in OTHER_MISTAKES]
    mistakes = likeliest_first(mistakes, [after for _, _, *after in seen.result[:-1]])
    for case, ((g, scale, most), label) in enumerate(zip(inputs, labels, strict=True)):
        (returned, _, *after), norm = seen.result[case], _length(g) / scale
        if norm == 0 and any(not isinstance(t, torch.Tensor) or t.isnan().any() for t in after):
            raise Wrong("gradients that are all zero become NaN: max_norm / 0 is infinite", label)
        right, known = _times(g, scale, most), [(why, would[case]) for why, would in mistakes]
        same(after, right, "", mistakes=known, labels=[f"gradient {i}, {label}" for i in range(len(g))])
        if isinstance(returned, torch.Tensor):
            raise Wrong("it returns a tensor: a Python number is asked for, norm.item()", label)
        wrong = {
            "the norm of the scaled gradients": norm * scale,
            "the norm after clipping": min(norm, most),
            "the factor": min(1.0, most / max(norm, TINY)),
            "the squared norm": norm**2,
            "the norm of the last gradient": _length(g[-1:]) / scale,
            "the sum of the tensors' norms": sum(_length([t]) for t in g) / scale,
        }
        why = "it returns {}: the norm of all unscaled gradients before clipping is asked for"
        known = [(why.format(what), torch.tensor(x, dtype=F64)) for what, x in wrong.items()]
        got = torch.tensor(number(returned, "what it returns", label), dtype=F64)
        expected = torch.tensor(norm, dtype=F64)
        same([got], expected, "", mistakes=known, labels=[f"the result, {label}"], tolerance=(1e-5, 1e-12))


def _clips(answer, inputs):
    """On one rank: (what it returns, whether it put other tensors into the list, *gradients) of each case."""

    def all_of_them():
        found = []
        for gradients, scale, most in inputs:
            given = list(gradients)
            returned = plain(told(answer, given, scale, most))
            replaced = len(given) == len(gradients) and any(a is not b for a, b in zip(given, gradients, strict=True))
            found.append([returned, replaced, *gradients])
        return found

    return watched(all_of_them)


TINY = 1e-30


def _length(gradients):
    return math.sqrt(sum(t.double().square().sum().item() for t in gradients))


def _clip(norm, most):
    return min(1.0, most / max(norm, TINY))


def _right(norm, scale, most):
    return _clip(norm, most) / scale


def _times(g, scale, most, factor=_right):
    """The gradients times factor(their norm when unscaled, scale, max_norm)."""
    return [t * factor(_length(g) / scale, scale, most) for t in g]


FACTORS = [  # (diagnosis, the factor of all gradients, for norm, scale and max_norm)
    ("clipped before unscaling: the norm of the scaled gradients is `scale` times too large, so nearly everything is "
     "clipped, and then divided once more", lambda n, s, m: _clip(n * s, m) / s),
    ("unscaled twice: divided by the scale two times", lambda n, s, m: _clip(n, m) / s / s),
    ("unscaled twice, the norm being taken in between", lambda n, s, m: _clip(n / s, m) / s / s),
    ("gradients shorter than max_norm are made longer: the factor is at most 1", lambda n, s, m: m / max(n, TINY) / s),
    ("gradients shorter than max_norm are made longer: the factor is at most 1", lambda n, s, m: m / (n + 1e-6) / s),
    ("clipped, but not unscaled", lambda n, s, m: _clip(n, m)),
    ("nothing has changed: write into the tensors, with mul_ or *=", lambda n, s, m: 1.0),
    ("clipped by the norm of the scaled gradients, and not unscaled", lambda n, s, m: _clip(n * s, m)),
    ("unscaled, but not clipped", lambda n, s, m: 1 / s),
    ("multiplied by the scale: divide", lambda n, s, m: _clip(n, m) * s),
    ("divided by the squared norm: the root is missing", lambda n, s, m: _clip(n**2, m) / s),
    ("1e-6 was added to the norm, as torch's own clipping does: leave it out here",
     lambda n, s, m: _clip(n + 1e-6, m) / s),
]  # fmt: skip
OTHER_MISTAKES = [  # (diagnosis, what becomes of the gradients)
    ("each tensor is clipped by its own norm: one norm for all of them together",
     lambda g, s, m: [_times([t], s, m)[0] for t in g]),
    ("the norms of the tensors are added up: add up their squares, and take the root once",
     lambda g, s, m: [t * _clip(sum(_length([t]) for t in g) / s, m) / s for t in g]),
    ("each number is cut off at ±max_norm: it is the norm that is bounded",
     lambda g, s, m: [(t / s).clamp(-m, m) for t in g]),
]  # fmt: skip


WHY = (
    "max_norm is meant for the true gradient, so the scale goes first. GradScaler has unscale_ for it; where "
    "gradients are shards, as in FSDP, the norm has to be summed over the ranks besides."
)

exercise = Exercise(hints, check, minutes=10, level="medium", why=WHY)
