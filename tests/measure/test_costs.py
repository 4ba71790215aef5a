"""The formulas against published figures, and against each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pardist_lib.lessons.lesson13.layouts import Kept
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
from pardist_lib.mechanisms.expert_parallel import MoE


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


def llama(hidden, layers, heads, ffn, vocab, sequence=4096, kv_heads=8, **options):
    options = {"bias": False, "rms_norm": True, "positions": False, "tied": False, "dropout": False} | options
    return Transformer(hidden, layers, heads, vocab, sequence, ffn, kv_heads, gated=True, **options)


DEEPSEEK = llama(
    2048, 28, 16, 1408, 102400, kv_heads=16, experts=64, active=6, shared=2, dense_layers=1, dense_ffn=10944
)  # Dai et al., "DeepSeekMoE" (2024), section 5.1.2


@pytest.mark.parametrize(
    "model, parameters",
    [
        (Transformer(768, 12, 12, 50257, 1024), 124_439_808),  # GPT-2
        (Transformer(1600, 48, 25, 50257, 1024), 1_557_611_200),  # GPT-2 XL
        (llama(4096, 32, 32, 11008, 32000, kv_heads=32), 6_738_415_616),  # Llama 2 7 B
        (llama(8192, 80, 64, 28672, 128256), 70_553_706_496),  # Llama 3 70 B
        (llama(16384, 126, 128, 53248, 128256), 405_853_388_800),  # Llama 3.1 405 B
        (llama(4096, 32, 32, 14336, 32000, experts=8, active=2), 46_702_792_704),  # Mixtral 8x7B
        (llama(6144, 56, 48, 16384, 32768, experts=8, active=2), 140_630_071_296),  # Mixtral 8x22B, version 0.3
        (DEEPSEEK, 16_375_728_128),  # DeepSeekMoE 16 B
        (llama(896, 24, 14, 4864, 151936, kv_heads=2, bias="qkv", tied=True), 494_032_768),  # Qwen2.5 0.5 B
        (llama(3072, 28, 16, 24576, 256000, kv_heads=16, head_dim=256, tied=True), 8_537_680_896),  # Gemma 7 B
    ],
)
def test_parameters_of_published_checkpoints(model, parameters):
    """What the checkpoints' files hold: tied and untied, grouped heads, experts, heads wider than hidden / heads."""
    assert model.parameters() == parameters


def test_active_parameters():
    """Mixtral's by its checkpoint; DeepSeekMoE's 2.8 B of 16.4 B (section 5.1.2); without experts all are active."""
    mixtral = llama(4096, 32, 32, 14336, 32000, experts=8, active=2)
    assert mixtral.active_parameters() == 12_879_925_248
    assert round(DEEPSEEK.active_parameters() / 1e9, 1) == 2.8
    assert replace(mixtral, active=8).active_parameters() == mixtral.parameters()
    assert GPT3.active_parameters() == GPT3.parameters()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_parameters_of_experts_are_those_of_the_layer_itself(gated, bias):
    sizes = {"ffn": 24, "experts": 6, "active": 2, "shared": 2, "gated": gated, "bias": bias}
    model, dense = (Transformer(8, 4, 2, 10, 8, **sizes, dense_layers=n, dense_ffn=30) for n in (0, 3))
    with torch.device("meta"):
        moe = MoE(8, 24, 6, 2, shared_experts=2, gated=gated, bias=bias)
        one = MoE(8, 30, 1, 1, gated=gated, bias=bias).experts

    def count(module):
        return sum(p.numel() for p in module.parameters())

    # of the layer's shared experts, which are one MLP, the last bias is there once, not twice
    experts = count(moe) + bias * 8
    attention_only = model.parameters() - 4 * experts
    assert attention_only == Transformer(8, 4, 2, 10, 8, ffn=1, gated=gated, bias=bias).parameters() - 4 * count(
        MoE(8, 1, 1, 1, gated=gated, bias=bias).experts
    )
    assert dense.parameters() == attention_only + experts + 3 * count(one)
    unvisited = 4 * count(moe.experts[0])
    assert model.parameters() - model.active_parameters() == 4 * unvisited
    assert dense.parameters() - dense.active_parameters() == unvisited


def test_flops_of_experts_are_two_for_each_active_weight_and_token():
    """Matrix products with the weights that a token meets, three times (forward, and twice backward)."""
    for model in (DEEPSEEK, replace(DEEPSEEK, dense_layers=0), replace(DEEPSEEK, shared=0)):
        norms = (2 * model.layers + 1) * model.hidden
        weights = model.active_parameters() - norms - model.vocab * model.hidden  # the embedding is looked up
        scores = 4 * model.sequence * model.query * model.layers
        assert training_flops(model, 3) == pytest.approx(3 * model.sequence * 3 * (2 * weights + scores), rel=1e-12)


def test_layers_that_differ_have_no_memory_yet():
    for refused in (training_memory, layer_activations, stage_parameters):
        with pytest.raises(ValueError, match="1 of 28 are dense: dense_layers=0"):
            refused(DEEPSEEK, Plan())
    alike = replace(DEEPSEEK, dense_layers=0)
    plan = Plan(dp=4, ep=4)
    experts = 28 * 64 * 3 * 2048 * 1408 / 4
    assert stage_parameters(alike, plan)[1] == experts
    assert sum(stage_parameters(alike, plan)) == alike.parameters() - 3 * experts
    more = layer_activations(alike, Plan()) - layer_activations(replace(alike, shared=0), Plan())
    assert more == 4096 * 2 * 4 * 2 * 1408  # gate, its SiLU, up, their product, of 2 bytes


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
        states = sum(memory[kind] for kind in ("parameters", "gradients", "optimizer"))
        found.append(round(states * scale / 1e9, 1))
        assert memory["total"] == pytest.approx(states + memory["activations"] + memory["gathered"])
        assert (memory["gathered"] > 0) == (zero == 3)
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


class Eager(torch.nn.Module):
    """A layer as Korthikanti et al. draw it, every operation by itself: softmax and three dropouts written out."""

    def __init__(self, h, a):
        super().__init__()
        self.a, self.norm1, self.norm2 = a, torch.nn.LayerNorm(h), torch.nn.LayerNorm(h)
        self.qkv, self.out = torch.nn.Linear(h, 3 * h), torch.nn.Linear(h, h)
        self.up, self.down = torch.nn.Linear(h, 4 * h), torch.nn.Linear(4 * h, h)

    def forward(self, x):
        b, s, h = x.shape
        q, k, v = (part.view(b, s, self.a, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        weights = F.dropout((q @ k.transpose(-1, -2) / (h / self.a) ** 0.5).softmax(-1), 0.1)
        x = x + F.dropout(self.out((weights @ v).transpose(1, 2).reshape(b, s, h)), 0.1)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), 0.1)


@pytest.mark.parametrize("h, a, s, b", [(64, 4, 32, 2), (128, 8, 64, 1), (96, 2, 128, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_measured_in_eager_torch(h, a, s, b, dtype):
    """sbh(18 + 3as/h)·element on a CPU, whose dropout masks are as wide as what they mask: storages, each once."""
    layer, x = Eager(h, a).to(dtype), torch.randn(b, s, h, dtype=dtype, requires_grad=True)
    with Kept(layer.parameters()) as kept:
        y = layer(x + 0)  # x + 0: like any layer's input, the result of an operation
    element = x.element_size()
    model = Transformer(h, 1, a, 100, s)
    computed = layer_activations(model, Plan(micro=b), element, mask=element)
    assert computed == pytest.approx(s * b * h * (18 + 3 * a * s / h) * element, rel=1e-12)
    assert kept.most == pytest.approx(computed, rel=0.02)
    assert y.requires_grad


def test_fused_attention_keeps_no_scores():
    fused = replace(GPT3, fused=True)
    assert layer_activations(fused, Plan()) == layer_activations(GPT3, Plan(recompute="selective"))
    assert layer_activations(fused, Plan()) == layer_activations(fused, Plan(recompute="selective"))
    assert training_flops(fused, 1) == training_flops(GPT3, 1)


def test_more_ranks_than_heads_of_keys_have_copies_of_them():
    """8 heads of keys and values on 16 ranks: each is on two."""
    model = replace(LLAMA3, tied=True)
    common, _ = stage_parameters(model, Plan(tp=16))
    kv = 2 * model.hidden * model.key * model.layers
    whole = model.layers * model.layer_parts()["whole"] + model.hidden
    assert 16 * common == pytest.approx(model.parameters() + 15 * whole + kv)


def test_a_pipelines_first_stage_holds_as_much_as_one_rank():
    """Korthikanti et al., section 4.2.3, up to the ends of the model."""
    one = GPT3.layers * layer_activations(GPT3, Plan())
    for pp, v in [(1, 1), (8, 1), (8, 4)]:
        expected = one * (1 + (pp - 1) / (pp * v) if v > 1 else 1)
        held = activations(GPT3, Plan(pp=pp, v=v))
        assert expected <= held <= expected * 1.04
    assert activations(GPT3, Plan(pp=8), batch=2) < activations(GPT3, Plan(pp=8), batch=8)


@pytest.mark.parametrize("pp, v, m", [(4, 2, 8), (8, 3, 16), (4, 4, 4), (6, 1, 12), (2, 5, 2), (4, 2, 400)])
def test_what_a_pipeline_holds_is_what_its_schedule_holds(pp, v, m):
    """Interleaved 1F1B, as Megatron orders it: (p - r - 1)·2 + (v - 1)·p chunks forward, then one forward, one back."""
    model = replace(LLAMA3, layers=pp * v, vocab=1)
    for stage, rank in (("first", 0), ("last", pp - 1)):
        warm_up = (pp - rank - 1) * 2 + (v - 1) * pp if v > 1 else pp - rank - 1
        order = [1] * min(warm_up, m * v) + [1, -1] * (m * v - min(warm_up, m * v))
        most = max(np.cumsum(order))  # chunks, of one layer each here
        layer = layer_activations(model, Plan())
        ends = activations(replace(model, layers=1), Plan()) - layer if stage == "last" else 0
        held = activations(model, Plan(pp=pp, v=v), stage, batch=m)
        assert held == pytest.approx(most * layer + ends, rel=1e-9), stage


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
        (lambda: Transformer(12, 1.5, 4, 100, 8), "layers is a whole number from 1 on, not 1.5"),
        (lambda: Transformer(12, 1, 4, 100, 8, bias="q"), 'bias is True, False or "qkv", not'),
        (lambda: training_memory(GPT3, Plan(dp=0)), "dp is a whole number from 1 on, not 0"),
        (lambda: training_memory(GPT3, Plan(), batch=0), "batch is a whole number of sequences from 1 on, not 0"),
        (lambda: training_memory(GPT3, Plan(), states="half"), "states is one of 'mixed', .*, not 'half'"),
        (lambda: training_memory(GPT3, Plan(), states=(2, 2)), "weight, gradient, optimizer state"),
        (
            lambda: training_memory(replace(LLAMA3, heads=48, head_dim=128), Plan(tp=12)),
            "tp 12 does not spread 8 heads",
        ),
        (lambda: Transformer(12, 1, 4, 100, 8, active=2), "cannot visit 2 of 1 experts"),
        (lambda: Transformer(12, 1, 4, 100, 8, shared=1), "model with several experts, and this one has 1"),
        (lambda: Transformer(12, 1, 4, 100, 8, experts=2, shared=-1), "shared is a whole number from 0 on, not -1"),
        (lambda: Transformer(12, 1, 4, 100, 8, experts=2, dense_layers=2, dense_ffn=9), "more than the 1 layers"),
        (lambda: Transformer(12, 1, 4, 100, 8, experts=2, dense_layers=1), "dense_ffn is a whole number from 1 on"),
        (lambda: training_memory(GPT3, Plan(tp=5)), "tp 5 does not divide 96 heads: tp 4 does"),
        (lambda: training_memory(GPT3, Plan(pp=5)), "96 layers do not make 5 stages of 1 equal chunks: pp 4 does"),
        (lambda: training_memory(GPT3, Plan(dp=4), batch=6), "dp 4 does not divide 6 sequences of a batch: dp 3 does"),
        (lambda: training_memory(GPT3, Plan(micro=4), batch=6), "micro 4 does not divide 6 sequences a rank: micro 3"),
        (lambda: training_memory(GPT3, Plan(pp=4, v=2), batch=6), "pp 4 has to divide the 6 micro-batches"),
        (lambda: training_memory(GPT3, Plan(sp=True)), "with tp 1 there are none"),
        (lambda: training_memory(GPT3, Plan(sp=True, tp=6)), "sp: tp 6 does not divide 2048 tokens"),
        (lambda: training_memory(GPT3, Plan(zero=4)), "zero is a stage, 0 to 3, not 4"),
        (lambda: training_memory(GPT3, Plan(zero=True)), "zero is a stage, 0 to 3, not True: which stage is meant"),
        (lambda: training_memory(GPT3, Plan(zero=1.0)), "zero is a stage, 0 to 3, not 1.0"),
        (lambda: training_memory(GPT3, Plan(tp=2, sp="no")), "sp is True or False, not 'no'"),
        (lambda: training_memory(GPT3, Plan(recompute=None)), "recompute is one of .*, not None"),
        (lambda: training_memory(GPT3, Plan(), states=3), "three numbers|states is bytes"),
        (lambda: training_flops(GPT3, -1), "batch is a whole number of sequences from 1 on, not -1"),
        (lambda: training_flops(GPT3, "8"), "batch is a whole number of sequences from 1 on, not '8'"),
        (lambda: Transformer(None, 1, 4, 100, 8), "hidden is a whole number from 1 on, not None"),
        (lambda: Transformer(12, 1, "4", 100, 8), "heads is a whole number from 1 on, not '4'"),
        (lambda: training_flops(GPT3, 1, "some"), "recompute is one of none, selective, full, not 'some'"),
        (lambda: training_seconds(GPT3, 1e9, 0, 1e12), "are above 0"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(wrong, told):
    with pytest.raises(ValueError, match=told):
        wrong()
