"""Estimates against published runs, and the search against trying everything."""

import time
from dataclasses import replace
from itertools import product

import pytest

from pardist_lib.measure.costs import RECOMPUTE, Plan, Transformer, training_memory
from pardist_lib.measure.planner import Estimate, Link, Machine, best_plans, estimate, half_all_reduce, why_not

A100 = Machine(312e12, 80e9, 8, Link(5e-6, 250e9), Link(1e-5, 25e9))
GPT3 = Transformer(12288, 96, 96, 51200, 2048)
SMALL = Transformer(64, 4, 4, 100, 32)


def test_the_parts_add_up():
    for plan in [Plan(), Plan(dp=4, tp=8, pp=8, recompute="full"), Plan(dp=8, tp=8, sp=True, zero=3, micro=4)]:
        found = estimate(GPT3, plan, A100, 64)
        assert sum(getattr(found, part) for part in Estimate.PARTS) == pytest.approx(found.seconds, rel=1e-12)
        assert 0 < found.mfu <= A100.efficiency * (1 + 1e-12)


def test_the_bubble_is_the_papers():
    """(p − 1)/m of the time without it, (p − 1)/(vm) interleaved (SC'21, section 2.2)."""
    for v in (1, 2, 4):
        found = estimate(GPT3, Plan(tp=8, pp=8, v=v), A100, 64)
        busy = found.seconds - found.bubble - found.data
        assert found.bubble / busy == pytest.approx(7 / (v * 64))


def test_tensor_parallel_messages_of_a_block():
    """4 all-reduces a layer, a tenth more halves with what sequence parallelism gathers again: 10 instead of 8."""
    still = replace(A100, within=Link(0, 250e9))
    plan, size = Plan(tp=8), 2 * GPT3.sequence * GPT3.hidden
    half = half_all_reduce(8, size, 0, 250e9)
    assert half == pytest.approx(7 / 8 * size / 250e9)
    assert estimate(GPT3, plan, still, 1).tensor == pytest.approx(half * (8 * 96 + 4))
    assert estimate(GPT3, replace(plan, sp=True), still, 1).tensor == pytest.approx(half * (10 * 96 + 4))


def test_a_ring_between_nodes_uses_the_links_of_all_its_ranks():
    """Bytes a second of each rank: within a node 250, of 8 ranks in each of two nodes 8 · 25, of single ones 25."""
    still = replace(A100, within=Link(0, 250e9), between=Link(0, 25e9), overlap=0.0)
    size = 2 * GPT3.sequence * GPT3.hidden
    for tp, bandwidth in ((8, 250e9), (16, 200e9)):
        half = half_all_reduce(tp, size, 0, bandwidth)
        assert estimate(GPT3, Plan(tp=tp), still, 1).tensor == pytest.approx(half * (8 * 96 + 4))
    for tp, bandwidth in ((1, 200e9), (2, 100e9), (8, 25e9)):
        plan = Plan(dp=16, tp=tp)
        gradients = training_memory(GPT3, plan)["gradients"]
        assert estimate(GPT3, plan, still, 16).data == pytest.approx(2 * half_all_reduce(16, gradients, 0, bandwidth))
    wide = replace(still, between=Link(0, 1e12))
    assert estimate(GPT3, Plan(tp=16), wide, 1).tensor < estimate(GPT3, Plan(tp=16), still, 1).tensor


def test_data_parallel_messages_hide_as_far_as_backward_goes():
    free = estimate(SMALL, Plan(dp=4), replace(A100, overlap=0.0), 4)
    hides = estimate(SMALL, Plan(dp=4), replace(A100, overlap=1.0), 4)
    assert free.hidden == 0 and hides.hidden > 0
    assert free.data == pytest.approx(hides.data + hides.hidden)


@pytest.mark.parametrize("model", [SMALL, replace(SMALL, kv_heads=2, experts=4, active=2)])
@pytest.mark.parametrize("gpus, batch", [(1, 4), (8, 8), (12, 24)])
def test_the_search_finds_what_trying_everything_finds(model, gpus, batch):
    tight = replace(A100, memory=1.2e7 / gpus**0.5, node=4)
    tried = {}
    shares = [n for n in range(1, 13) if gpus % n == 0]
    for tp, pp, cp, ep, micro, v in product(shares, shares, shares, (1, 2, 4), range(1, 17), (1, 2, 4)):
        if gpus % (tp * pp * cp) or batch % micro:
            continue
        for sp, zero, how in product((False, True), range(4), RECOMPUTE):
            plan = Plan(gpus // (tp * pp * cp), tp, pp, cp, ep, micro, v, sp, zero, how)
            if zero and plan.dp * plan.cp == 1:
                continue
            try:
                found = estimate(model, plan, tight, batch)
            except ValueError:
                continue
            if found.memory["total"] <= tight.memory:
                tried[plan] = found
    first = best_plans(model, tight, gpus, batch, most=5)
    fastest = sorted(e.seconds for e in tried.values())[:5]
    assert [r.estimate.seconds for r in first] == pytest.approx(fastest, rel=1e-9)
    assert first[0].plan in tried and first[0].why == "" and all(r.plan in tried for r in first)
    with_why = [r.why for r in first[1:] if r.estimate.seconds > 1.001 * first[0].estimate.seconds]
    assert all("slower, most of it" in why for why in with_why)


def test_a_number_of_gpus_that_cannot_be_is_told_at_once():
    """10,007 is prime; heads, layers, tokens and sequences of a batch have only 2 and 3 in them."""
    began = time.process_time()
    with pytest.raises(ValueError, match="10007 GPUs cannot be laid out for .*: 9216 can"):
        best_plans(GPT3, A100, 10_007, 1536)
    assert time.process_time() - began < 2


def test_without_a_batch_each_stage_has_a_micro_batch():
    plan = Plan(dp=2, tp=8, pp=4, micro=2)
    assert estimate(GPT3, plan, A100) == estimate(GPT3, plan, A100, 16)


def test_why_not():
    best = best_plans(GPT3, A100, 64, 64)[0].plan
    assert why_not(GPT3, best, A100, 64) == ""
    assert "it does not fit" in why_not(GPT3, Plan(dp=64), A100, 64)
    assert "slower, most of it" in why_not(GPT3, replace(best, recompute="full"), A100, 64)


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda: Link(1e-6, -1), "bandwidth above 0"),
        (lambda: replace(A100, memory=0), "memory of a machine is above 0"),
        (lambda: replace(A100, node=2.5), "node is a whole number of GPUs"),
        (lambda: best_plans(GPT3, A100, 8, 8, only={"tp": 2}), r"only has several values of tp, such as \(2,\)"),
        (lambda: replace(A100, efficiency=2), "efficiency is a share from 0 to 1"),
        (
            lambda: best_plans(GPT3, A100, 8, 8),
            r"no plan for 8 GPUs fits into 80 GB each: .* comes nearest with .* GB; 64 GPUs would do",
        ),
        (lambda: best_plans(GPT3, A100, 13, 8), "13 GPUs cannot be laid out .*: 12 can"),
        (lambda: best_plans(GPT3, A100, 0, 8), "gpus is a whole number from 1 on, not 0"),
        (lambda: best_plans(GPT3, A100, 8, 2.5), "batch is a whole number from 1 on, not 2.5"),
        (lambda: best_plans(GPT3, A100, 8, 8, only={"tpp": (1,)}), "a plan has no tpp: dp, tp"),
        (lambda: best_plans(GPT3, A100, 8, 8, only={"pp": (3,)}), r"cannot be laid out .*, pp of \(3,\): 9 can"),
        (lambda: best_plans(GPT3, A100, 8, 8, states="half"), "states is one of"),
        (lambda: Link("5 us", 1), "latency is a number, not '5 us'"),
        (lambda: replace(A100, within=25e9), r"within is a Link\(latency, bandwidth\), not 250"),
        (lambda: replace(A100, flops=None), "flops is a number, not None"),
        (lambda: best_plans(GPT3, A100, 8, 8, only={"zero": (7,)}), "no number near it can either"),
        (lambda: Link(float("nan"), 1), "latency of 0 or more"),
        (lambda: replace(A100, flops=float("nan")), "flops of a machine is above 0"),
        (lambda: replace(A100, layer=-1), "layer and update_layer are 0 or more"),
        (lambda: estimate(GPT3, Plan(tp=7), A100, 8), "tp 7 does not divide 96 heads"),
    ],
)
def test_what_cannot_be_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        wrong()
