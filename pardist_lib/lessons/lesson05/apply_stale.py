"""The exercise apply_stale."""

import torch

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, same, show
from ..exercises.watch import Other, watched

hints = (
    "staleness = version - computed_at: 0 for a gradient that was computed from the newest parameters.",
    "Staler than limit: return version, and nothing has happened. Otherwise theta -= …, and version + 1.",
    "theta -= lr / (1 + staleness) * gradient changes theta in place; theta = theta - … makes a new tensor that "
    "nobody sees.",
)


def check(run):
    ages = [(5, 5, 3), (4, 5, 3), (2, 5, 3), (1, 5, 3), (0, 9, 3), (7, 7, 0), (6, 7, 0), (3, 13, 100)]
    inputs = [
        (values(shape, dtype, i, 1), values(shape, dtype, i, 2), computed_at, version, lr, limit)
        for i, (computed_at, version, limit) in enumerate(ages)
        for shape, dtype, lr in (((5,), F64, 0.5), ((2, 3), F32, 0.1))
    ]
    [seen] = run(_applied, inputs, n=1)
    if seen.calls:
        raise Wrong(f"it calls {seen.calls[0].op}: this happens on the server alone")
    _judge_stale(inputs, seen.result, seen.kept)


def _applied(answer, inputs):
    """In one process: each case with tensors of its own."""
    kept = []

    def all_of_them():
        results = []
        for theta, gradient, *rest in inputs:
            theta, given = theta.clone(), gradient.clone()
            results.append(answer(theta, given, *rest))
            kept.append((theta, torch.equal(given, gradient)))
        return results

    seen = watched(all_of_them)
    seen.kept = kept
    return seen


def _judge_stale(inputs, returned, kept):
    labels = [f"computed_at {c}, version {v}, limit {limit}, lr {lr}" for _, _, c, v, lr, limit in inputs]
    for (_, intact), label in zip(kept, labels, strict=True):
        if not intact:
            raise Wrong("`gradient` was changed: it is the worker's", label)

    def with_rule(rule, drop=lambda stale, limit: stale > limit):
        return [
            theta if drop(v - c, limit) else (theta - rule(v - c, lr) * gradient).to(theta.dtype)
            for theta, gradient, c, v, lr, limit in inputs
        ]

    def scaled(stale, lr):
        return lr / (1 + stale)

    expected, got = with_rule(scaled), [theta for theta, _ in kept]
    said_so = [type(value) is int and value == v for value, (_, _, _, v, *_) in zip(returned, inputs, strict=True)]
    mistakes = [
        ("the gradient is applied with the full lr: the staler it is, the smaller a step", with_rule(lambda s, lr: lr)),
        ("limit 0 drops whatever is stale: `if limit` takes it for no limit at all",
         with_rule(scaled, lambda s, limit: limit and s > limit)),
        ("nothing is dropped: a gradient staler than limit is not to be applied",
         with_rule(scaled, lambda s, limit: False)),
        ("a gradient exactly as stale as limit is dropped: only staler ones are",
         with_rule(scaled, lambda s, limit: s >= limit)),
        ("a gradient staler than limit is applied as if it were limit versions old: it has to be dropped",
         [(theta - lr / (1 + min(v - c, limit)) * g).to(theta.dtype) for theta, g, c, v, lr, limit in inputs]),
        ("neither dropped nor scaled", with_rule(lambda s, lr: lr, lambda s, limit: False)),
        ("the sign is wrong: a step goes against the gradient", with_rule(lambda s, lr: -lr / (1 + s))),
        ("the step grows with staleness: divide by 1 + staleness", with_rule(lambda s, lr: lr * (1 + s))),
        ("lr is missing", with_rule(lambda s, lr: 1 / (1 + s))),
        ("divided by staleness itself: a gradient of staleness 1 gets half a step",
         with_rule(lambda s, lr: lr / max(s, 1))),
        ("staleness has the wrong sign: version - computed_at", with_rule(lambda s, lr: lr / (1 - s) if s != 1 else
         float("inf"), lambda s, limit: -s > limit)),
        ("theta is as it was before the call: write into it with -= (theta = theta - x makes a new tensor)",
         [None if dropped else theta for (theta, *_), dropped in zip(inputs, said_so, strict=True)]),
        ("dropped, though it is not staler than limit: staleness is version - computed_at",
         [theta for theta, *_ in inputs]),
        ("every gradient that is stale at all is dropped", with_rule(scaled, lambda s, limit: s > 0)),
        ("lr to the power of staleness: divide by 1 + staleness", with_rule(lambda s, lr: lr ** (1 + s))),
    ]  # fmt: skip
    same(got, expected, "theta", "", mistakes, [theta for theta, *_ in inputs], [f"theta, {text}" for text in labels])
    for value, (*_, c, v, _, limit), label in zip(returned, inputs, labels, strict=True):
        want = v + (v - c <= limit)
        if isinstance(value, bool) or not isinstance(value, int):
            raise Wrong(f"it returns {_said(value)}: the version that theta has now is asked for", label, str(want))
        if value != want:
            dropped = v - c > limit
            why = "a dropped gradient makes no new version" if dropped else "each gradient applied makes a new version"
            if value == v - c:
                why = "it returns the staleness: the version that theta has now is asked for"
            raise Wrong(why, label, str(want), str(value))


def _said(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor {show(value)}"
    return "nothing (None)" if value is None else f"a {value.type}" if isinstance(value, Other) else repr(value)[:40]


exercise = Exercise(hints, check)
