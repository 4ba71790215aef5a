"""Predicted against measured: a step's time, a rank's memory and the planner's choice, on four ranks of this machine.

Calibration trains small models on single ranks and times collectives; it never runs a layout. Readings and steps are
taken in turn, round after round, so that a slow spell of the machine hits both; of either the median counts.
"""

from functools import partial

import numpy as np

from pardist_lib import Ranks
from pardist_lib.lessons.lesson13.layouts import OPERATIONS, described, memory_of, runnable, seconds_of
from pardist_lib.measure.calibration import describe, readings
from pardist_lib.measure.costs import Plan, training_memory
from pardist_lib.measure.planner import best_plans, estimate

MODELS = (  # width, layers, heads, vocabulary, length; batch
    ((128, 4, 4, 256, 64), 16),
    ((256, 4, 8, 512, 128), 16),
    ((512, 4, 8, 512, 64), 8),
)


def layouts(batch):
    each = batch // 4
    return [
        Plan(dp=4, micro=each), Plan(tp=4, micro=batch), Plan(dp=2, tp=2, micro=batch // 2),
        *(Plan(dp=4, zero=zero, micro=each) for zero in (1, 2, 3)),
        Plan(pp=4, micro=max(batch // 8, 1)), Plan(dp=2, pp=2, micro=max(batch // 8, 1)),
    ]  # fmt: skip


def rows(pairs=30, rounds=None):
    """One dict for each figure; `pairs` is three times the rounds."""
    cases = [(described(*sizes), batch, plan) for sizes, batch in MODELS for plan in layouts(batch)]
    with Ranks(4, timeout=120) as ranks:
        taken, times = {model: [] for model, *_ in cases}, [[] for _ in cases]
        for _ in range(rounds or max(pairs // 3, 1)):
            for (model, batch, plan), kept in zip(cases, times, strict=True):
                taken[model] += readings(ranks, OPERATIONS) if plan.tp > 1 or plan.pp > 1 else []
                kept += ranks.run(seconds_of, model, plan, batch, 2, quiet=True)[0]
        machines = {model: describe(found)[0] for model, found in taken.items()}  # what was read while it was run
        chosen = list(_first_choices(ranks, machines, cases, times))
        held = [error for case in cases for error in _memory(ranks, *case)]
    errors = []
    for (model, batch, plan), kept in zip(cases, times, strict=True):
        measured, low, high = np.quantile(kept, [0.5, 0.25, 0.75])
        predicted = estimate(model, plan, machines[model], batch, "float32").seconds
        errors.append(abs(predicted / measured - 1))
        yield _row(f"width {model.hidden}, {plan}: predicted {predicted * 1e3:.0f} ms / measured {measured * 1e3:.0f}",
                   predicted / measured, predicted / high, predicted / low, "×", "stated")  # fmt: skip
    percent = partial(_row, unit="%")
    yield percent(f"error of predicted step times, median of {len(errors)}",
                  *(100 * np.quantile(errors, [0.5, 0.25, 0.75])), target="≤ 15")  # fmt: skip
    yield percent(f"error of predicted memory, {len(held)} kinds in layouts (high: largest)",
                  *(100 * np.quantile(held, [0.5, 0, 1])), target="≤ 10")  # fmt: skip
    for model, place, plan in chosen:
        name = f"width {model.hidden}: place of the planner's first choice, {plan}, among the measured"
        yield _row(name, place, place, place, "", "≤ 2")


def _first_choices(ranks, machines, cases, times):
    """(model, place among the measured times, plan) of the planner's first choice for each model."""
    for sizes, batch in MODELS:
        model = described(*sizes)
        ranked = best_plans(model, machines[model], 4, batch, states="float32", most=10_000, max_micro=batch)
        plan = next(r.plan for r in ranked if runnable(r.plan, batch))
        measured = {p: np.median(t) for (m, _, p), t in zip(cases, times, strict=True) if m == model}
        if plan not in measured:
            measured[plan] = np.median(ranks.run(seconds_of, model, plan, batch, 9, quiet=True)[0])
        yield model, sorted(measured.values()).index(measured[plan]) + 1, plan


def _memory(ranks, model, batch, plan):
    """Relative error of each kind of the fullest rank's bytes."""
    found = max(ranks.run(memory_of, model, plan, batch, quiet=True), key=lambda kinds: sum(kinds.values()))
    computed = training_memory(model, plan, batch, "float32")
    return [abs(computed[kind] / found[kind] - 1) for kind in found]


def _row(name, median, low, high, unit, target):
    return {"name": name, "ranks": 4, "median": median, "low": low, "high": high, "unit": unit, "target": target}
