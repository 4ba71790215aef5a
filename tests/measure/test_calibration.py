"""Calibration gives back what made-up readings were made from, and on live ranks a machine that predicts."""

import numpy as np
import pytest

from pardist_lib.lessons.lesson13.layouts import OPERATIONS, described
from pardist_lib.measure.calibration import MODELS, SIZES, _features, calibrate, describe, nonnegative, readings
from pardist_lib.measure.costs import Plan
from pardist_lib.measure.planner import Estimate, best_plans, estimate


def made_up(flops, touch, layer, update, update_layer, alpha, beta):
    """Readings of a machine of four ranks on two cores that is described exactly."""
    steps = []
    for model, micro in MODELS:
        f, t, v, held, layers = _features(model, micro)
        steps.append((f / flops + t / touch + v * layer, held / update + layers * update_layer))
    wanted = [("all_reduce", 2), ("all_reduce", 4), ("exchange", 2)]
    calls = [[alpha * n + s / beta for s in SIZES] for _, n in wanted]
    rank = {"steps": steps, "calls": calls, "work": [1e-3, 1e-3, 2e-3]}
    return [{"n": 4, "wanted": wanted, "counts": [1, 2, 4], "of ranks": [rank] * 4}] * 3


def test_a_reading_is_many_runs(ranks_of, monkeypatch):
    """One for each model, operation and number at work: ranks give memory back only when a run ends."""
    ranks, ran = ranks_of(2), []
    run = ranks.run
    monkeypatch.setattr(ranks, "run", lambda f, *args, **kwargs: ran.append(f) or run(f, *args, **kwargs))
    [one] = readings(ranks)
    operations = 4  # on two ranks: an all-reduce, its two halves, an exchange
    assert len(ran) == len(MODELS) + operations + 2
    for mine in one["of ranks"]:
        assert [len(mine[kind]) for kind in ("steps", "calls", "work")] == [len(MODELS), operations, 2]
        assert all(len(each) == len(SIZES) for each in mine["calls"])


def test_readings_give_back_what_they_were_made_from():
    machine, seen = describe(made_up(2e10, 5e9, 1e-3, 4e9, 2e-4, 1e-4, 1e9))
    assert machine.flops == pytest.approx(2e10) and machine.touch == pytest.approx(5e9)
    assert machine.layer == pytest.approx(1e-3)
    assert machine.update == pytest.approx(4e9) and machine.update_layer == pytest.approx(2e-4)
    for link, latency in ((machine.calls["all_reduce", 4], 4e-4), (machine.within, 2e-4)):
        assert (link.latency, link.bandwidth) == pytest.approx((latency, 1e9))
    assert machine.busy == {1: 0.5, 2: 0.5, 4: 1.0} and machine.overlap == 0 and machine.efficiency == 1
    np.testing.assert_allclose(seen["fitted"], seen["measured"])


def test_an_estimate_on_such_a_machine_adds_up():
    """Four ranks: compute, α and β of each call, the optimizer, by hand."""
    machine, _ = describe(made_up(2e10, 5e9, 1e-3, 4e9, 2e-4, 1e-4, 1e9))
    model = described(64, 2, 4, 128, 32)
    found = estimate(model, Plan(dp=4, micro=2), machine, 8, "float32")
    flops, touched, visits, held, layers = _features(model, 2)
    assert found.compute == pytest.approx(flops / 2e10 + touched / 5e9 + visits * 1e-3)
    assert found.optimizer == pytest.approx(held / 4e9 + layers * 2e-4)
    assert found.data == pytest.approx(4e-4 + 4 * model.parameters() / 1e9)
    assert found.seconds == pytest.approx(sum(getattr(found, part) for part in Estimate.PARTS))
    split = estimate(model, Plan(tp=4, micro=8), machine, 8, "float32")
    assert split.tensor == pytest.approx((4 * 2 + 2) * (4e-4 + 4 * 8 * 32 * 64 / 1e9))


def test_ranks_that_wait_in_a_pipeline_leave_their_cores_to_others():
    """Two stages on two cores wait for nobody's core; four stages, 4 micro-batches: slots of 1, 2, 3, 4, 3, 2, 1 at
    work, of which those with 1 and 2 take half as long, that with 3 three quarters."""
    machine, _ = describe(made_up(2e10, 5e9, 1e-3, 4e9, 2e-4, 1e-4, 1e9))
    model = described(64, 4, 4, 128, 32)
    found = estimate(model, Plan(pp=4, micro=2), machine, 8, "float32")
    busy = found.compute + found.pipeline
    assert found.bubble / busy == pytest.approx((2 * (0.5 + 0.5 + 0.75) + 1) / 4 - 1)
    found = estimate(model, Plan(pp=2, dp=2, micro=1), machine, 8, "float32")
    assert found.bubble / (found.compute + found.pipeline) == pytest.approx((0.5 + 3 * 1 + 0.5) / 4 - 1)


@pytest.mark.parametrize("seed", range(5))
def test_nonnegative_least_squares(seed):
    draw = np.random.default_rng(seed)
    features, right = draw.uniform(1, 2, (8, 3)), np.array([0.0, 2.0, 1.0]) * draw.uniform(0, 1, 3)
    found = nonnegative(features, features @ right)
    np.testing.assert_allclose(found, right, atol=1e-9)
    noisy = nonnegative(features, features @ right * draw.uniform(0.5, 2, 8))
    assert (noisy >= 0).all() and noisy.any()


def test_calibrating_live_ranks(ranks_of):
    """A machine comes out that any plan can be predicted with; how well is for a quiet machine to see."""
    machine = calibrate(ranks_of(4), OPERATIONS, rounds=1)
    assert machine.flops > 0 and set(machine.busy) == {1, 2, 4} and machine.busy[4] == 1
    ranked = best_plans(described(64, 4, 4, 128, 32), machine, 4, 8, states="float32", most=500)
    assert ranked and all(np.isfinite(r.estimate.seconds) and r.estimate.seconds > 0 for r in ranked)


def test_no_rounds_are_refused(ranks_of):
    with pytest.raises(ValueError, match="rounds is 1 or more, not 0"):
        readings(ranks_of(4), rounds=0)
