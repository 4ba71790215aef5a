"""A transformer block, plain and with everything in it split over the ranks of a group.

    x + attention(norm(x)), then x + mlp(norm(x))

Attention and MLP are each a column-parallel layer, work that needs no other rank, and a row-parallel layer: a block
sends two all-reduces of its activations forward and two backward (Megatron's 2 + 2). With sequence parallelism each
all-reduce is its two halves, and what lies between attention and MLP is split along the sequence.

Sources: Shoeybi et al., "Megatron-LM" (2019), figure 4; Korthikanti et al. (2022), figures 4 and 5.
"""

from contextlib import nullcontext

from torch import nn
from torch.nn import functional as F

from .attention import Attention, ParallelAttention
from .checks import check_group, check_plain
from .linear import ParallelMLP
from .on_part import random_per_rank
from .sequence import norm_of, parallel_norm
from .splitting import first_ranks_copy


class TransformerBlock(nn.Module):
    """A plain pre-norm block, in one process: what ParallelTransformerBlock splits.

    norm: nn.LayerNorm or nn.RMSNorm; hidden: of the MLP, 4·embed_dim by default; dropout: of the attention's weights
    and of both branches. x: (batch, s, embed_dim) -> (batch, s, embed_dim)
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        num_kv_heads=None,
        hidden=None,
        *,
        bias=True,
        causal=True,
        dropout=0.0,
        norm=nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        super().__init__()
        to, hidden = {"device": device, "dtype": dtype}, hidden or 4 * embed_dim
        self.norm1, self.norm2 = norm(embed_dim, **to), norm(embed_dim, **to)
        options = {"bias": bias, "causal": causal, "dropout": dropout}
        self.attention = Attention(embed_dim, num_heads, num_kv_heads, **options, **to)
        first, last = nn.Linear(embed_dim, hidden, bias, **to), nn.Linear(hidden, embed_dim, bias, **to)
        self.mlp = nn.Sequential(first, nn.GELU(), last)
        self.dropout = dropout

    def forward(self, x):
        p = self.dropout if self.training else 0.0
        x = x + F.dropout(self.attention(self.norm1(x)), p)
        return x + F.dropout(self.mlp(self.norm2(x)), p)


class ParallelTransformerBlock(nn.Module):
    """`TransformerBlock` with its heads and its hidden features split over the ranks of a group.

    Parts and their names are the plain block's; norms are whole on every rank. Arguments as for TransformerBlock,
    options as for ParallelAttention: sequence_parallel, keep_gathered, chunks.

    x: (batch, s, embed_dim), the same on every rank -> the same shape. S: its bytes.
    Sends two all-reduces of S forward and two backward. With sequence_parallel x is this rank's positions, (batch, s/n,
    embed_dim); then eight halves of (n − 1)/n·S (ten with keep_gathered=False), and backward one all-reduce of each
    norm's gradients.

    Dropout: on what is whole on every rank the ranks draw from torch's global stream and must have seeded it alike; on
    what is split each draws for itself (`random_per_rank`).
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        num_kv_heads=None,
        hidden=None,
        *,
        bias=True,
        causal=True,
        dropout=0.0,
        norm=nn.LayerNorm,
        device=None,
        dtype=None,
        group=None,
        **options,
    ):
        super().__init__()
        like = {"bias": bias, "causal": causal, "dropout": dropout, "norm": norm, "device": device, "dtype": dtype}
        self._split(TransformerBlock(embed_dim, num_heads, num_kv_heads, hidden, **like), group, options)

    @classmethod
    def from_module(cls, module, group=None, **options):
        """Split the group's first rank's `TransformerBlock`, exactly. Raises ValueError for any other module."""
        check_plain(module, [TransformerBlock], cls.__name__)
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block._split(module, group, options)
        return block.train(module.training)

    def _split(self, whole, group, options):
        check_group(group, type(self).__name__)
        self.group, self.dropout, self.sequence_parallel = group, whole.dropout, options.get("sequence_parallel", False)
        self.norm1, self.norm2 = (self._norm(norm) for norm in (whole.norm1, whole.norm2))
        self.attention = ParallelAttention.from_module(whole.attention, group, **options)
        self.mlp = ParallelMLP.from_module(whole.mlp, group, **options)

    def _norm(self, norm):
        if self.sequence_parallel:
            return parallel_norm(norm, self.group)
        return norm_of(type(norm), norm, lambda p: first_ranks_copy(p, self.group))

    def to_module(self):
        """The whole `TransformerBlock`, exactly, on every rank."""
        attention, mlp = self.attention.to_module(), self.mlp.to_module()
        whole = TransformerBlock.__new__(TransformerBlock)
        nn.Module.__init__(whole)
        norms = [n.to_module() if self.sequence_parallel else norm_of(type(n), n) for n in (self.norm1, self.norm2)]
        whole.norm1, whole.norm2 = norms
        whole.attention, whole.mlp, whole.dropout = attention, mlp, self.dropout
        return whole.train(self.training)

    def forward(self, x, sizes=None):
        """sizes: every rank's positions, where they differ (with sequence_parallel only)."""
        x = x + self._dropout(self.attention(self.norm1(x), sizes))
        column, *others = self.mlp
        hidden = column(self.norm2(x), sizes)
        for part in others:
            hidden = part(hidden)
        return x + self._dropout(hidden)

    def _dropout(self, x):
        if not self.training or not self.dropout:
            return x
        with random_per_rank(self.group) if self.sequence_parallel else nullcontext():
            return F.dropout(x, self.dropout)
