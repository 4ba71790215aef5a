"""A whole language model whose sequence is dealt out: labels at the edges, positions, the loss of all tokens."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from pardist_lib.lessons.transformer import GPT
from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.collectives.agreement import sum_over_ranks
from pardist_lib.mechanisms.context_parallel.labels import mean_over_tokens, next_tokens
from pardist_lib.mechanisms.context_parallel.order import collect, deal, own_positions
from pardist_lib.mechanisms.context_parallel.ring import ring_attention
from tests.mechanisms.context_parallel.cases import ATTENTIONS

IGNORED = -100


def test_labels_are_the_next_tokens_and_none_at_the_ends():
    tokens = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    assert next_tokens(tokens).tolist() == [[6, 7, 8, IGNORED], [2, 3, 4, IGNORED]]
    assert next_tokens(tokens, [0, 0, 1, 1]).tolist() == [[6, IGNORED, 8, IGNORED], [2, IGNORED, 4, IGNORED]]
    each = [[0, 0, 0, 1], [4, 4, 9, 9]]
    assert next_tokens(tokens, torch.tensor(each)).tolist() == [[6, 7, IGNORED, IGNORED], [2, IGNORED, 4, IGNORED]]
    assert next_tokens(tokens, ignore_index=-1)[:, -1].tolist() == [-1, -1]
    assert next_tokens(tokens[:, :1]).tolist() == [[IGNORED]] * 2 and next_tokens(tokens[:, :0]).shape == (2, 0)


# ---- the mean over tokens that count --------------------------------------------------------------------------


def mean_of_some():
    """Rank r has r tokens, of which some count; the first rank has none."""
    rank, n = dist.get_rank(), dist.get_world_size()
    losses, counted = whole_losses(n)
    mine = slice(rank * (rank - 1) // 2, rank * (rank + 1) // 2)
    leaf = losses[mine].clone().requires_grad_()
    mean = mean_over_tokens(leaf * 2, counted[mine])
    mean.backward()
    return mean.detach(), leaf.grad, mine, mean_over_tokens(losses[mine]), mean_over_tokens(leaf, counted[mine] & False)


def whole_losses(n):
    g = torch.Generator().manual_seed(n)
    return torch.rand(n * (n - 1) // 2, generator=g, dtype=torch.float64), torch.arange(n * (n - 1) // 2) % 3 != 1


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_mean_is_over_all_ranks_tokens_that_count(ranks_of, n):
    losses, counted = whole_losses(n)
    leaf = losses.clone().requires_grad_()
    want = (leaf * 2)[counted].mean()
    want.backward()
    for mean, grad, mine, of_all, of_none in ranks_of(4).run(in_world, n, mean_of_some, quiet=True)[:n]:
        torch.testing.assert_close(mean, want.detach())
        torch.testing.assert_close(grad, leaf.grad[mine])
        torch.testing.assert_close(of_all, losses.mean())
        assert of_none.isnan()


def with_infinite_ones():
    """A token that does not count may have any loss."""
    leaf = torch.tensor([1.0, 3.0]).requires_grad_()
    mean = mean_over_tokens(leaf / torch.tensor([1.0, 0.0]), torch.tensor([True, False]))
    mean.backward()
    return mean.item(), leaf.grad[0].item()


def test_what_does_not_count_is_left_out_and_not_multiplied_by_zero(ranks_of):
    assert ranks_of(4).run(with_infinite_ones, quiet=True) == [(1.0, 0.25)] * 4


# ---- a whole GPT ----------------------------------------------------------------------------------------------


class DealtAttention(nn.Module):
    """An `Attention` for a rank's tokens."""

    def __init__(self, whole, how, order, documents):
        super().__init__()
        self.whole, self.how, self.options = whole, how, {"order": order, "documents": documents}

    def forward(self, x):
        b, s, width = x.shape
        heads = self.whole.num_heads  # of queries, and as many of keys and values
        qkv = self.whole.qkv(x).view(b, s, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (b, heads, s, d) each
        y = ATTENTIONS[self.how](q, k, v, causal=self.whole.causal, **self.options)
        return self.whole.out(y.transpose(1, 2).reshape(b, s, width))


class DealtPositions(nn.Module):
    """`Positions` for a rank's tokens of a sequence of `length`."""

    def __init__(self, whole, length, order):
        super().__init__()
        self.whole, self.length, self.order = whole, length, order

    def forward(self, x):
        return x + self.whole.weight[own_positions(self.length, order=self.order)]


def gpt():
    torch.manual_seed(0)
    model = GPT(vocabulary=17, width=24, heads=12, layers=2, length=30, dtype=torch.float64)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def batch_of(s):
    tokens = torch.randint(0, 17, (3, s), generator=torch.Generator().manual_seed(s))
    return tokens, (torch.arange(s) + torch.arange(3)[:, None]) // 6


def trained_together(how, order, s, packed):
    """On a rank: (the loss, every parameter's gradient, the logits), after one backward on its own tokens."""
    tokens, documents = batch_of(s)
    documents = documents if packed else None
    model = gpt()
    model.positions = DealtPositions(model.positions, s, order)
    for block in model.blocks:
        block.attention = DealtAttention(block.attention, how, order, documents)
    labels = deal(next_tokens(tokens, documents), order=order).flatten()
    logits = model(deal(tokens, order=order))
    losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
    loss = mean_over_tokens(losses, labels != IGNORED)
    loss.backward()
    grads = sum_over_ranks([p.grad for p in model.parameters()])
    names = [name.replace(".whole", "") for name, _ in model.named_parameters()]
    return loss.detach(), dict(zip(names, grads, strict=True)), collect(logits.detach(), order=order)


def trained_alone(s, packed):
    """One process; packed documents by one call for each, as if the others were not there."""
    tokens, documents = batch_of(s)
    model, logits, labels = gpt(), [], []
    for row, numbers in zip(tokens, documents if packed else documents * 0, strict=True):
        for number in numbers.unique():
            at = (numbers == number).nonzero().flatten()
            piece = copy.copy(model)
            piece._modules = dict(model._modules, positions=lambda x, at=at: x + model.positions.weight[at])
            logits.append(piece(row[at][None])[0])
            labels.append(torch.cat([row[at][1:], torch.tensor([IGNORED])]))
    logits = torch.cat(logits)
    loss = F.cross_entropy(logits, torch.cat(labels), ignore_index=IGNORED)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, logits.detach().view(3, s, -1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_whole_gpt_has_the_loss_and_the_gradients_of_one_process(ranks_of, n, packed):
    for s in (29, 3):
        want = trained_alone(s, packed)
        for how in ATTENTIONS:
            for order in ("zigzag", "contiguous"):
                for got in ranks_of(4).run(in_world, n, trained_together, how, order, s, packed, quiet=True)[:n]:
                    for mine, theirs in zip(got, want, strict=True):
                        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


# ---- rotary positions -----------------------------------------------------------------------------------------


def rotated(x, positions):
    """Rotary embedding: pairs of numbers turned by angles that grow with the position. x: (batch, heads, s, d)"""
    angles = positions[:, None] * 100.0 ** -torch.linspace(0, 1, x.size(-1) // 2, dtype=x.dtype)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(-2)


def rotary_on_ranks(order):
    q, k, v = torch.randn(3, 1, 2, 11, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at, every = own_positions(11, order=order), torch.arange(11)
    own_q, own_k, own_v = (deal(x, dim=2, order=order) for x in (q, k, v))
    y = ring_attention(rotated(own_q, at), rotated(own_k, at), own_v, order=order)
    want = F.scaled_dot_product_attention(rotated(q, every), rotated(k, every), v, is_causal=True)
    return (collect(y, dim=2, order=order) - want).abs().max().item()


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_rotary_embeddings_take_own_positions(ranks_of, order):
    assert max(ranks_of(4).run(rotary_on_ranks, order, quiet=True)) < 1e-12
