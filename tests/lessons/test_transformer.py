"""The small GPT: split by a plan, without a change to its code, it trains as in one process."""

import pytest
import torch

from pardist_lib.lessons.transformer import GPT, TENSOR_PARALLEL, bytes_kept, language_loss, sequence_parallel_plan
from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.tensor_parallel import full_state_dict, parallelize, vocab_parallel_cross_entropy

SIZES = {"vocabulary": 97, "width": 24, "heads": 12, "layers": 2, "length": 24, "dtype": torch.float64}
PLANS = {"tensor": TENSOR_PARALLEL, "sequence": sequence_parallel_plan(), "again": sequence_parallel_plan(False)}


def made(seed=0):
    torch.manual_seed(seed)
    model = GPT(**SIZES)
    for block in model.blocks:  # the keys' bias has no gradient but rounding, which Adam would make as large as any
        block.attention.qkv.bias.requires_grad_(False)
    return model


def batch(step):
    return torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(step))


def trained(plan, seed=0, steps=20):
    """(losses, the whole model's state)"""
    model = made(seed)
    if plan:
        parallelize(model, PLANS[plan])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(steps):
        words = batch(step)
        logits = model(words[:, :-1])
        loss = vocab_parallel_cross_entropy(logits, words[:, 1:]) if plan else language_loss(logits, words[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tied = model.head.weight is model.tokens.weight
    return losses, full_state_dict(model) if plan else model.state_dict(), tied


@pytest.mark.parametrize("plan", PLANS)
def test_split_by_a_plan_it_trains_as_one_process(ranks_of, plan):
    losses, state, _ = trained(None)
    for n in (2, 3, 4):
        for got, weights, tied in ranks_of(4).run(in_world, n, trained, plan, quiet=True)[:n]:
            assert tied and list(weights) == list(state)
            assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) < 1e-9
            for name, want in state.items():
                torch.testing.assert_close(weights[name], want, rtol=1e-8, atol=1e-8, msg=f"{name} on {n} ranks")


def test_its_state_loads_into_the_plain_model_and_into_another_number_of_ranks(ranks_of):
    _, state, _ = ranks_of(4).run(trained, "sequence", 0, 3, quiet=True)[0]
    plain = made(seed=5)
    plain.load_state_dict(state)

    def reloaded():
        model = made(seed=5)
        model.load_state_dict(state)
        return full_state_dict(parallelize(model, PLANS["tensor"]))

    for again in ranks_of(4).run(in_world, 3, reloaded, quiet=True)[:3]:
        assert all(
            torch.equal(again[name], t) and torch.equal(plain.state_dict()[name], t) for name, t in state.items()
        )


def test_bytes_kept_counts_shared_memory_once_and_no_parameters():
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    assert bytes_kept(layer, x) == x.nbytes
    assert bytes_kept(torch.nn.Sequential(layer, torch.nn.Tanh()), x) == 2 * x.nbytes
