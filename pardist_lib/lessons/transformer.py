"""A small GPT-like language model, and what splits it: nothing in it knows of ranks."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from pardist_lib.mechanisms.group import rank_and_size
from pardist_lib.mechanisms.tensor_parallel.linear import ColumnParallelLinear
from pardist_lib.mechanisms.tensor_parallel.on_part import replicated
from pardist_lib.mechanisms.tensor_parallel.sequence import parallel_norm
from pardist_lib.mechanisms.tensor_parallel.splitting import first_ranks_copy, parameter
from pardist_lib.mechanisms.tensor_parallel.transformer import ParallelTransformerBlock, TransformerBlock
from pardist_lib.mechanisms.tensor_parallel.vocabulary import VocabParallelEmbedding


class Positions(nn.Module):
    """Adds what was learned of each position. x: (batch, s, width), s at most `length` -> the same shape"""

    def __init__(self, length, width, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(length, width, dtype=dtype))

    def forward(self, x):
        return x + self.weight[: x.size(1)]


class GPT(nn.Module):
    """Tokens and positions, blocks, a last norm, and logits from the tokens' own table (tied weights).

    tokens: (batch, s), s at most `length` -> logits (batch, s, vocabulary)
    """

    def __init__(self, vocabulary=96, width=64, heads=4, layers=2, length=64, dtype=None):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, dtype=dtype)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.positions = Positions(length, width, dtype)
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads, dtype=dtype) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
        self.head.weight = self.tokens.weight  # one table, to read words and to write them

    def forward(self, tokens):
        x = self.positions(self.tokens(tokens))  # (b, s, width)
        return self.head(self.norm(self.blocks(x)))  # (b, s, vocabulary)


def language_loss(logits, words):
    """The mean loss of predicting each word. logits: (b, s, vocabulary), words: (b, s)"""
    return F.cross_entropy(logits.flatten(0, 1), words.flatten())


def bytes_kept(module, x):
    """Bytes that autograd keeps for the backward of module(x). Memory that several tensors share counts once; the
    module's own parameters do not count."""
    own, found = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}

    def keep(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = module(x)  # held until all is counted: memory that is given back would be used again
    del y
    return sum(size for memory, size in found.items() if memory not in own)


class SequenceParallelPositions(Positions):
    """`Positions` for a rank's part of the sequence; every rank has the whole table, and equally many positions."""

    @classmethod
    def from_module(cls, module, group=None):
        split = cls.__new__(cls)
        nn.Module.__init__(split)
        split.group, split.weight = group, parameter(first_ranks_copy(module.weight, group), module.weight)
        return split

    def to_module(self):
        whole = Positions.__new__(Positions)
        nn.Module.__init__(whole)
        whole.weight = parameter(self.weight.detach().clone(), self.weight)
        return whole

    def forward(self, x):
        first = rank_and_size(self.group)[0] * x.size(1)
        return x + replicated(self.weight, group=self.group)[0][first : first + x.size(1)]


TENSOR_PARALLEL = {"tokens": "vocabulary", "blocks.?": "block", "head": "column"}


def sequence_parallel_plan(keep_gathered=True):
    """The plan with which `parallelize` splits a GPT's sequence, too."""
    options = {"sequence_parallel": True, "keep_gathered": keep_gathered}
    return {
        "tokens": partial(VocabParallelEmbedding.from_module, sequence_dim=1),
        "positions": SequenceParallelPositions.from_module,
        "blocks.?": partial(ParallelTransformerBlock.from_module, **options),
        "norm": parallel_norm,
        "head": partial(ColumnParallelLinear.from_module, **options),
    }
