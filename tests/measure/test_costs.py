"""The formulas against published figures, and against each other."""

from dataclasses import replace

import numpy as np
import pytest

from pardist_lib.measure.costs import (
    Plan,
    Transformer,
    activations,
    layer_activations,
    stage_parameters,
    training_flops,
    training_memory,
    training_seconds,
)


def megatron(hidden, layers, heads):
    return Transformer(hidden, layers, heads, vocab=51200, sequence=2048)


GPT3 = megatron(12288, 96, 96)
LLAMA3 = Transformer(
    4096, 32, 32, 128256, 8192, ffn=14336, kv_heads=8, gated=True, bias=False, rms_norm=True, positions=False,
    tied=False, dropout=False,
)  # fmt: skip


@pytest.mark.parametrize("sizes, billions", [((2304, 24, 24), 1.7), ((3072, 30, 32), 3.6), ((4096, 36, 32), 7.5)])
def test_parameters_of_megatrons_models(sizes, billions):
    """Narayanan et al. (SC'21), table 1, and its equation 2, which leaves the last norm out."""
    model = megatron(*sizes)
    h, layers, v, s = model.hidden, model.layers, model.vocab, model.sequence
    by_equation = 12 * layers * h**2 * (1 + 13 / (12 * h) + (v + s) / (12 * layers * h))
    assert model.parameters() == pytest.approx(by_equation + 2 * h, rel=1e-12)
    assert round(model.parameters() / 1e9, 1) == billions


def test_parameters_of_llama_3():
    assert LLAMA3.parameters() == 8_030_261_248


def test_flops_of_gpt_3():
    """SC'21: a step of batch 1536 on 1,024 GPUs in 32 s is 138 TFLOP/s a GPU; equation 3."""
    h, layers, s, v, batch = GPT3.hidden, GPT3.layers, GPT3.sequence, GPT3.vocab, 1536
    flops = training_flops(GPT3, batch, "full")
    assert flops == 96 * batch * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert round(flops / 1024 / 32 / 1e12) == 138
    assert training_flops(GPT3, batch) < training_flops(GPT3, batch, "selective") < flops


def test_training_times():
    """SC'21, section 5.1: 34 days for 175 B on 1,024 GPUs, 84 days for 1 T on 3,072."""
    trillion = megatron(25600, 128, 160)
    assert round(training_seconds(GPT3, 300e9, 1024, 140e12) / 86400) == 34
    assert round(training_seconds(trillion, 450e9, 3072, 163e12) / 86400) == 84


def test_state_of_zero():
    """ZeRO (2020), figure 1: 7.5 B parameters on 64 GPUs: 120, 31.4, 16.6, 1.9 GB (decimal)."""
    model = megatron(4096, 36, 32)
    scale = 7.5e9 / model.parameters()
    found = []
    for zero in range(4):
        memory = training_memory(model, Plan(dp=64, zero=zero))
        gathered = 2 * 2 * sum(model.layer_parts()[k] for k in ("split",)) if zero == 3 else 0
        found.append(round((memory["total"] - memory["activations"] - gathered) * scale / 1e9, 1))
    assert found == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize("t", [1, 2, 8])
@pytest.mark.parametrize("model", [GPT3, megatron(3072, 30, 32)])
def test_activations_of_a_layer(model, t):
    """Korthikanti et al. (2022), table 2, times sbh."""
    h, s, a = model.hidden, model.sequence, model.heads
    sbh = 4 * s * h
    scores = 5 * a * s / h
    for sp, recompute, expected in [
        (False, "none", 10 + 24 / t + scores / t),
        (True, "none", 34 / t + scores / t),
        (True, "selective", 34 / t),
        (False, "full", 2),
    ]:
        plan = Plan(tp=t, sp=sp, micro=4, recompute=recompute)
        assert layer_activations(model, plan) == pytest.approx(sbh * expected, rel=1e-12)


def test_a_pipelines_first_stage_holds_as_much_as_one_rank():
    """Korthikanti et al., section 4.2.3, up to the ends of the model."""
    one = GPT3.layers * layer_activations(GPT3, Plan())
    for pp, v in [(1, 1), (8, 1), (8, 4)]:
        expected = one * (1 + (pp - 1) / (pp * v) if v > 1 else 1)
        held = activations(GPT3, Plan(pp=pp, v=v))
        assert expected <= held <= expected * 1.04
    assert activations(GPT3, Plan(pp=8), batch=2) < activations(GPT3, Plan(pp=8), batch=8)


@pytest.mark.parametrize("model", [GPT3, LLAMA3, replace(LLAMA3, experts=8, active=2), replace(GPT3, tied=False)])
def test_all_ranks_together_hold_the_model(model):
    """Two stages of half the layers each; what tensor parallelism does not split is there on every rank."""
    for tp, pp in [(1, 1), (4, 1), (1, 2), (4, 2)]:
        plan = Plan(tp=tp, pp=pp)
        stages = ["first"] if pp == 1 else ["first", "last"]
        held = sum(sum(stage_parameters(model, plan, stage)) * tp for stage in stages)
        norm = model.hidden * (1 if model.rms_norm else 2)
        positions = model.positions * model.sequence * model.hidden
        copies = (tp - 1) * (model.layers * model.layer_parts()["whole"] + norm + positions)
        again = model.vocab * model.hidden if pp > 1 and model.tied else 0
        assert held == pytest.approx(model.parameters() + copies + again, rel=1e-12)


def test_many_plans_at_once_are_one_after_the_other():
    plans = [Plan(dp=8, tp=4, micro=2, zero=z, sp=z > 1, recompute=r) for z in range(4) for r in ("none", "full")]
    columns = {name: np.array([getattr(p, name) for p in plans]) for name in vars(plans[0])}
    together = training_memory(LLAMA3, Plan(**columns), batch=64)
    for i, plan in enumerate(plans):
        for kind, value in training_memory(LLAMA3, plan, batch=64).items():
            assert together[kind][i] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda: Transformer(10, 2, 3, 100, 8), "3 heads do not divide hidden 10"),
        (lambda: Transformer(12, 2, 4, 100, 8, kv_heads=3), "3 heads of keys and values do not divide 4 heads"),
        (lambda: Transformer(12, 0, 4, 100, 8), "layers is a whole number from 1 on, not 0"),
        (lambda: Transformer(12, 1, 4, 100, 8, active=2), "cannot visit 2 of 1 experts"),
        (lambda: training_memory(GPT3, Plan(tp=5)), "tp 5 does not divide 96 heads: tp 4 does"),
        (lambda: training_memory(GPT3, Plan(pp=5)), "96 layers do not make 5 stages of 1 equal chunks: pp 4 does"),
        (lambda: training_memory(GPT3, Plan(dp=4), batch=6), "dp 4 does not divide 6 sequences of a batch: dp 3 does"),
        (lambda: training_memory(GPT3, Plan(micro=4), batch=6), "micro 4 does not divide 6 sequences a rank: micro 3"),
        (lambda: training_memory(GPT3, Plan(pp=4, v=2), batch=6), "pp 4 has to divide the 6 micro-batches"),
        (lambda: training_memory(GPT3, Plan(sp=True)), "with tp 1 there are none"),
        (lambda: training_memory(GPT3, Plan(zero=4)), "zero 0 to 3"),
        (lambda: training_flops(GPT3, 1, "some"), "recompute is one of none, selective, full, not 'some'"),
        (lambda: training_seconds(GPT3, 1e9, 0, 1e12), "are above 0"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(wrong, told):
    with pytest.raises(ValueError, match=told):
        wrong()
