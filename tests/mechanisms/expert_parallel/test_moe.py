"""The layer in one process, beside what the papers write: every token for itself, expert by expert."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pardist_lib.mechanisms.expert_parallel import GatedMLP, MoE, Router
from pardist_lib.mechanisms.expert_parallel.experts import through_experts
from pardist_lib.mechanisms.expert_parallel.routing import within_capacity
from tests.mechanisms.expert_parallel.nets import crowd, layer, tokens
from tests.mechanisms.nets import same


def one_by_one(moe, x, senders=None):
    """Each visit by itself, in plain Python."""
    router, outputs = moe.router, []
    capacity = [
        math.inf if moe.capacity_factor is None else math.ceil(moe.capacity_factor * t * router.top_k / router.experts)
        for t in senders or [len(x)]
    ]
    sender_of = [s for s, many in enumerate(senders or [len(x)]) for _ in range(many)]
    scores = [row @ router.weight.T for row in x]
    scores = [s.sigmoid() if router.score_function == "sigmoid" else s.exp() / s.exp().sum() for s in scores]
    bias = 0 if router.expert_bias is None else router.expert_bias
    best = [sorted(range(router.experts), key=lambda e, s=s: -(s + bias)[e].item())[: router.top_k] for s in scores]
    taken, visits = {}, {}
    for choice in range(router.top_k):
        for token, experts in enumerate(best):
            place = sender_of[token], experts[choice]
            taken[place] = taken.get(place, 0) + 1
            visits[token, choice] = taken[place] <= capacity[place[0]]
    for token, (row, s, experts) in enumerate(zip(x, scores, best, strict=True)):
        whole = sum(s[e] for e in experts) if router.normalize else 1
        y = torch.zeros_like(row) if moe.shared is None else moe.shared(row)
        for choice, e in enumerate(experts):
            if visits[token, choice]:
                y = y + router.scaling_factor * s[e] / whole * moe.experts[e](row)
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1, "normalize": False},
        {"top_k": 5},
        {"score_function": "sigmoid", "scaling_factor": 2.5, "shared_experts": 2, "gated": True, "bias": False},
        {"score_function": "sigmoid", "normalize": False, "bias_update_rate": 0.1},
        {"capacity_factor": 0.6},
        {"capacity_factor": 1.0, "bias_update_rate": 0.1, "shared_experts": 1},
    ],
    ids=str,
)
def test_output_and_gradients_are_those_of_every_visit_by_itself(options):
    moe = layer(**options)
    if moe.router.expert_bias is not None:
        moe.router.expert_bias += torch.linspace(-0.4, 0.4, 5)
    found = []
    for forward in (moe, lambda x, senders: one_by_one(moe, x, senders)):
        moe.zero_grad()
        x = torch.cat(tokens((5, 0, 4))).requires_grad_()
        y = forward(x, senders=[5, 0, 4])
        (y * y.sin()).sum().backward()
        zeros = {name: torch.zeros_like(p) for name, p in moe.named_parameters()}
        grads = {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "x": x.grad} | zeros | grads)
    same(*found)


def test_mixtrals_weights_are_the_softmax_of_the_best_logits():
    moe, (x,) = layer(), tokens((7,))
    moe(x)
    logits, chosen = (x @ moe.router.weight.T).topk(2)
    assert torch.equal(moe.routing.chosen, chosen)
    torch.testing.assert_close(moe.routing.weights, logits.softmax(1))


def test_the_bias_chooses_and_never_weights():
    plain, biased = layer(), layer(bias_update_rate=0.001)
    (x,) = tokens((7,))
    plain(x), biased(x)
    assert torch.equal(plain.routing.weights, biased.routing.weights), "a bias of zeros changes nothing"
    biased.router.expert_bias[2] = 10.0
    biased(x)
    routing = biased.routing
    assert (routing.chosen[:, 0] == 2).all()
    scores = routing.probabilities.gather(1, routing.chosen)
    torch.testing.assert_close(routing.weights, scores / scores.sum(1, keepdim=True))
    torch.testing.assert_close(routing.probabilities, plain.routing.probabilities, rtol=0, atol=0)


@pytest.mark.parametrize("cast", [lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16)])
def test_the_bias_stays_float32_and_exact(cast):
    moe = layer(dtype=torch.float32, bias_update_rate=0.001)
    moe.router.expert_bias += 1.001
    before = moe.router.expert_bias.clone()
    cast(moe)
    assert moe.router.weight.dtype != torch.float32 and moe.router.expert_bias.dtype == torch.float32
    assert torch.equal(moe.router.expert_bias, before) and "router.expert_bias" in moe.state_dict()


# ---- capacity -------------------------------------------------------------------------------------------------


def test_first_choices_come_before_second_ones_and_earlier_tokens_before_later_ones():
    chosen = torch.tensor([[0, 1], [1, 0], [0, 2], [0, 1]])  # capacity ⌈0.75·4·2/3⌉ = 2 of three experts
    kept = within_capacity(chosen, 3, 0.75)
    assert kept.tolist() == [[True, True], [True, False], [True, True], [False, False]]


@pytest.mark.parametrize("tokens_, top_k, experts, factor, capacity", [(10, 1, 1, 1.1, 11), (8, 2, 4, 1.25, 5)])
def test_a_capacity_is_rounded_up_but_not_for_the_sake_of_rounding(tokens_, top_k, experts, factor, capacity):
    chosen = torch.zeros(99 if experts == 1 else tokens_, top_k, dtype=torch.int64)[:tokens_]
    assert within_capacity(chosen, experts, factor).sum() == min(capacity, tokens_ * top_k)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_expert_takes_more_than_its_capacity_nor_drops_below_it(data):
    experts = data.draw(st.integers(1, 5))
    top_k, rows = data.draw(st.integers(1, experts)), data.draw(st.integers(0, 12))
    factor = data.draw(st.floats(0.05, 2.0))
    chosen = torch.rand(rows, experts, generator=torch.Generator().manual_seed(rows)).topk(top_k).indices
    kept = within_capacity(chosen, experts, factor)
    capacity = math.ceil(round(factor * rows * top_k / experts, 9))
    for e in range(experts):
        asked = chosen == e
        assert (kept & asked).sum() == min(asked.sum().item(), capacity)


def test_a_token_that_loses_all_its_visits_gives_zeros():
    moe, (x,) = crowd(layer(capacity_factor=0.2), [1, 4]), tokens((10,))
    y = moe(x)
    assert y[0].abs().max() > 0 and y[1:].abs().max() == 0


# ---- beside torch ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="grouped_mm is there from torch 2.10 on")
def test_experts_one_after_the_other_are_torchs_grouped_mm():
    torch.manual_seed(0)
    counts, weights = [5, 0, 1, 10], torch.randn(4, 8, 12)
    rows = torch.randn(16, 8, requires_grad=True)
    experts = [torch.nn.Linear(8, 12, bias=False) for _ in counts]
    for expert, weight in zip(experts, weights, strict=True):
        expert.weight.data.copy_(weight.T)
    weights.requires_grad_()
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    ours, theirs = through_experts(experts, rows, counts), torch.nn.functional.grouped_mm(rows, weights, offs=offsets)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    factors = torch.randn(16, 12)
    (mine,) = torch.autograd.grad((ours * factors).sum(), rows, retain_graph=True)
    torch.testing.assert_close(mine, torch.autograd.grad((theirs * factors).sum(), rows, retain_graph=True)[0])
    (theirs * factors).sum().backward()
    (ours * factors).sum().backward()
    torch.testing.assert_close(torch.stack([e.weight.grad.T for e in experts]), weights.grad, rtol=1e-5, atol=1e-5)


def test_experts_of_ones_own():
    experts = [GatedMLP(6, 3), torch.nn.Identity(), torch.nn.Linear(6, 6)]
    moe, x = MoE.of(Router(6, 3, 3), experts), torch.randn(4, 6)
    weights = (x @ moe.router.weight.T).softmax(1)
    torch.testing.assert_close(moe(x), sum(w * e(x) for w, e in zip(weights.T.unsqueeze(2), experts, strict=True)))


# ---- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda: layer(capacity_factor=0), "capacity_factor is a number above 0, not 0: with 1"),
        (lambda: layer(capacity_factor=-1.0), "capacity_factor is a number above 0, not -1.0"),
        (lambda: layer(capacity_factor=float("nan")), "capacity_factor is a number above 0, not nan"),
        (lambda: layer(top_k=6), "top_k 6: a token cannot visit more than the 5 experts"),
        (lambda: layer(top_k=0), "top_k is a whole number from 1 on, not 0"),
        (lambda: layer(experts=0), "experts is a whole number from 1 on, not 0"),
        (lambda: MoE(6, 7.0, 5, 2), "ffn is a whole number from 1 on, not 7.0"),
        (lambda: MoE("6", 7, 5, 2), "hidden is a whole number from 1 on, not '6'"),
        (lambda: layer(shared_experts=-1), "shared_experts is a whole number from 0 on, not -1"),
        (lambda: layer(score_function="relu"), "score_function is one of 'softmax', 'sigmoid', not 'relu'"),
        (lambda: layer(bias_update_rate=0), "bias_update_rate is a number above 0, not 0"),
        (lambda: layer(scaling_factor=None), "scaling_factor is a number above 0, not None"),
        (lambda: layer()(torch.ones(3, 5).double()), r"6 features in their last dimension, not \[3, 5\]"),
        (lambda: layer()(torch.tensor(1.0).double()), r"6 features in their last dimension, not \[\]"),
        (lambda: layer()(torch.ones(3, 6)), "tokens are torch.float32, the weights torch.float64: x.to"),
        (lambda: layer()(torch.ones(3, 6, dtype=torch.int64)), "floating point, not torch.int64"),
        (lambda: layer()([1.0]), "floating point, not list"),
        (lambda: layer()(torch.ones(3, 6).double(), senders=[2, 2]), r"senders \[2, 2\] do not share out 3 tokens"),
        (lambda: layer()(torch.ones(3, 6).double(), senders=[4, -1]), r"senders \[4, -1\] do not"),
        (lambda: MoE.of(Router(6, 3, 1), [torch.nn.Identity()]), "among 3 experts, but 1 are given"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        wrong()
