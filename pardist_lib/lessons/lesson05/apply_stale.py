"""A stale gradient on the server; typically not dropped or scaled, off by one, not in place, versions miscounted."""

import operator

import torch

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, same, show
from ..exercises.watch import Other, told, watched

hints = (
    "staleness = version - computed_at: 0 for a gradient that was computed from the newest parameters.",
    "Staler than limit: return version, and nothing has happened. Otherwise theta -= …, and version + 1.",
    "theta -= lr / (1 + staleness) * gradient changes theta in place; theta = theta - … makes a new tensor that "
    "nobody sees.",
)


def check(run):
    ages = [(5, 5, 3), (4, 5, 3), (2, 5, 3), (1, 5, 3), (0, 9, 3), (7, 7, 0), (6, 7, 0), (3, 13, 100)]
    inputs = [  # theta, gradient, computed_at, version, lr, limit
        (values(shape, dtype, i, 1), values(shape, dtype, i, 2), computed_at, version, lr, limit)
        for i, (computed_at, version, limit) in enumerate(ages)
        for shape, dtype, lr in (((5,), F64, 0.5), ((2, 3), F32, 0.1))
    ]
    labels = [f"computed_at {c}, version {v}, limit {limit}, lr {lr}" for _, _, c, v, lr, limit in inputs]
    [seen] = run(_applied, inputs, n=1)
    if seen.calls:
        raise Wrong(f"it calls {seen.calls[0].op}: this happens on the server alone")
    for (_, intact), label in zip(seen.kept, labels, strict=True):
        if not intact:
            raise Wrong("`gradient` was changed: it is the worker's", label)
    _judge_theta(inputs, [theta for theta, _ in seen.kept], seen.result, labels)
    for value, (*_, computed_at, version, _, limit), label in zip(seen.result, inputs, labels, strict=True):
        _judge_version(value, version, version - computed_at, limit, label)


def _applied(answer, inputs):
    """In one process: each case with tensors of its own."""
    kept = []

    def all_of_them():
        results = []
        for theta, gradient, *rest in inputs:
            theta, given = theta.clone(), gradient.clone()
            results.append(told(answer, theta, given, *rest))
            kept.append((theta, torch.equal(given, gradient)))
        return results

    seen = watched(all_of_them)
    seen.kept = kept
    return seen


def _judge_theta(inputs, got, returned, labels):
    before = [theta for theta, *_ in inputs]

    def stepping(rate=lambda stale, lr: lr / (1 + stale), drop=operator.gt):
        """theta in all cases, with a step of this rate unless the gradient is dropped."""
        return [
            theta if drop(v - c, limit) else (theta - rate(v - c, lr) * gradient).to(theta.dtype)
            for theta, gradient, c, v, lr, limit in inputs
        ]

    said_so = [type(value) is int and value == case[3] for value, case in zip(returned, inputs, strict=True)]
    clipped = [(theta - lr / (1 + min(v - c, limit)) * g).to(theta.dtype) for theta, g, c, v, lr, limit in inputs]
    unlimited = stepping(drop=lambda s, limit: limit and s > limit)
    backwards = stepping(lambda s, lr: lr / (1 - s) if s != 1 else float("inf"), lambda s, limit: -s > limit)
    as_limit = "a gradient staler than limit is applied as if it were limit versions old: it has to be dropped"
    unchanged = "theta is as it was before the call: write into it with -= (theta = theta - x makes a new tensor)"
    mistakes = {
        "the gradient is applied with the full lr: the staler it is, the smaller a step": stepping(lambda s, lr: lr),
        "limit 0 drops whatever is stale: `if limit` takes it for no limit at all": unlimited,
        "nothing is dropped: a gradient staler than limit is not to be applied": stepping(drop=lambda s, limit: False),
        "a gradient exactly as stale as limit is dropped: only staler ones are": stepping(drop=operator.ge),
        as_limit: clipped,
        "neither dropped nor scaled": stepping(lambda s, lr: lr, drop=lambda s, limit: False),
        "the sign is wrong: a step goes against the gradient": stepping(lambda s, lr: -lr / (1 + s)),
        "the step grows with staleness: divide by 1 + staleness": stepping(lambda s, lr: lr * (1 + s)),
        "lr is missing": stepping(lambda s, lr: 1 / (1 + s)),
        "divided by staleness: a gradient of staleness 1 gets half a step": stepping(lambda s, lr: lr / max(s, 1)),
        "staleness has the wrong sign: version - computed_at": backwards,
        unchanged: [None if dropped else theta for theta, dropped in zip(before, said_so, strict=True)],
        "dropped, though it is not staler than limit: staleness is version - computed_at": before,
        "every gradient that is stale at all is dropped": stepping(drop=lambda s, limit: s > 0),
        "lr to the power of staleness: divide by 1 + staleness": stepping(lambda s, lr: lr ** (1 + s)),
    }
    labels = [f"theta, {label}" for label in labels]
    same(got, stepping(), "theta", "", mistakes.items(), before, labels)


def _judge_version(value, version, stale, limit, label):
    want = version + (stale <= limit)
    why = "each gradient applied makes a new version" if stale <= limit else "a dropped gradient makes no new version"
    if isinstance(value, bool) or not isinstance(value, int):
        said = "nothing (None)" if value is None else f"{value!r:.40}"
        if isinstance(value, (torch.Tensor, Other)):
            said = f"a tensor {show(value)}" if isinstance(value, torch.Tensor) else f"a {value.type}"
        raise Wrong(f"it returns {said}: the version that theta has now is asked for", label, str(want))
    if value == stale:
        why = "it returns the staleness: the version that theta has now is asked for"
    if value != want:
        raise Wrong(why, label, str(want), str(value))


why = (
    "A gradient that is many versions old points where the loss fell then, so it makes a smaller step, and a "
    "very old one none. Staleness-aware async-SGD (Zhang and others, 2016) divides the learning rate by the "
    "staleness in this way."
)
exercise = Exercise(hints, check, minutes=8, level="medium", why=why)
