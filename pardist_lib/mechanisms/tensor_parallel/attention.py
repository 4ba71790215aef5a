"""Self-attention whose heads are split over the ranks of a group.

No head looks at another, so each rank takes some of them: its rows of the query, key and value weights (as in a
ColumnParallelLinear), then attention of its heads with nobody else's help, then its columns of the output weight (as in
a RowParallelLinear). One all-reduce forward, after the output weight, and one backward, before query, key and value:
the three share their input, so their weights stand in one matrix, and their input gradients are added up before they
are sent. (Rows stand here as in most plain models, all queries, then all keys, then all values, and are put in order
before they are cut. Megatron's stand head by head from the start.)

Sources: Shoeybi et al., "Megatron-LM" (2019), section 3; Ainslie et al., "GQA" (2023), for grouped-query heads.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from ..group import rank_and_size
from .checks import briefly, check_group, check_heads, check_plain, check_self_attention
from .linear import ColumnParallelLinear, RowParallelLinear
from .on_part import random_per_rank
from .splitting import parameter


def attend(qkv, heads, kv_heads, *, causal=False, mask=None, dropout=0.0):
    """Attention of some heads. Whether these are all heads of a layer or a rank's, it does not know.

    qkv: (batch, s, (heads + 2·kv_heads)·d), queries, then keys, then values, head by head. kv_heads: how many heads
    of keys and values there are; each serves heads / kv_heads heads of queries. mask: as for
    F.scaled_dot_product_attention. Returns (batch, s, heads·d).
    """
    batch, s, width = qkv.shape
    d = width // (heads + 2 * kv_heads)
    q, k, v = qkv.split([heads * d, kv_heads * d, kv_heads * d], -1)
    q, k, v = (part.unflatten(-1, (-1, d)).transpose(1, 2) for part in (q, k, v))  # (batch, heads, s, d)
    if kv_heads != heads:
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    return y.transpose(1, 2).reshape(batch, s, heads * d)


class Attention(nn.Module):
    """Plain self-attention, in one process: what ParallelAttention splits.

    qkv: nn.Linear of (num_heads + 2·num_kv_heads)·d rows, queries first; out: nn.Linear; d = embed_dim / num_heads.
    x: (batch, s, embed_dim) -> (batch, s, embed_dim)
    """

    def __init__(
        self, embed_dim, num_heads, num_kv_heads=None, *, bias=True, causal=True, dropout=0.0, device=None, dtype=None
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(num_heads, num_kv_heads) < 1 or embed_dim % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"embed_dim {embed_dim} has to be a multiple of num_heads {num_heads}, and that of num_kv_heads "
                f"{num_kv_heads}"
            )
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.causal, self.dropout = causal, dropout
        rows = embed_dim // num_heads * (num_heads + 2 * num_kv_heads)
        self.qkv = nn.Linear(embed_dim, rows, bias, device=device, dtype=dtype)
        self.out = nn.Linear(embed_dim, embed_dim, bias, device=device, dtype=dtype)

    def forward(self, x):
        p = self.dropout if self.training else 0.0
        return self.out(attend(self.qkv(x), self.num_heads, self.num_kv_heads, causal=self.causal, dropout=p))


class ParallelAttention(nn.Module):
    """`Attention` with num_heads / n of its heads on each of the n ranks of a group.

    qkv: a ColumnParallelLinear, the rows of this rank's heads; out: a RowParallelLinear, their columns. Weights start
    as rank 0's `Attention` would. options: sequence_parallel, keep_gathered, chunks, as for these two.

    x: (batch, s, embed_dim), the same on every rank -> (batch, s, embed_dim), on every rank.
    Sends one all-reduce of x's size forward and one backward. With sequence_parallel x and the result are this rank's
    positions, and the all-reduces become halves (sequence_parallel.py).

    Raises ValueError where n does not divide num_heads or num_kv_heads: a head stays whole.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        num_kv_heads=None,
        *,
        bias=True,
        causal=True,
        dropout=0.0,
        group=None,
        device=None,
        dtype=None,
        **options,
    ):
        super().__init__()
        like = {"bias": bias, "causal": causal, "dropout": dropout, "device": device, "dtype": dtype}
        whole = Attention(embed_dim, num_heads, num_kv_heads, **like)
        self._split(whole, whole.qkv, whole.out, group, options)

    @classmethod
    def from_module(cls, module, group=None, **options):
        """Split the heads of the group's first rank's `Attention` or nn.MultiheadAttention, exactly.

        An nn.MultiheadAttention becomes a ParallelMultiheadAttention, which is called as it is. Raises ValueError for
        any other module, and for heads or options that do not split.
        """
        check_plain(module, [Attention, nn.MultiheadAttention], cls.__name__)
        kind = cls if isinstance(module, Attention) else ParallelMultiheadAttention
        split = kind.__new__(kind)
        nn.Module.__init__(split)
        split._split(module, *split._linears(module), group, options)
        return split.train(module.training)

    def _split(self, whole, qkv, out, group, options):
        check_group(group, type(self).__name__)
        _, n = rank_and_size(group)
        self.embed_dim, self.num_heads, self.dropout = whole.embed_dim, whole.num_heads, whole.dropout
        self.num_kv_heads = getattr(whole, "num_kv_heads", whole.num_heads)
        self.causal, self.group = getattr(whole, "causal", False), group
        check_heads(self.num_heads, self.num_kv_heads, n, self.embed_dim)
        self.heads, self.kv_heads = self.num_heads // n, self.num_kv_heads // n
        self.qkv = ColumnParallelLinear.from_module(_rows(qkv, self._order()), group, **options)
        options = {name: value for name, value in options.items() if name != "keep_gathered"}
        self.out = RowParallelLinear.from_module(out, group, **options)

    def _order(self):
        """The rows of the whole qkv in the order of ranks: first all of rank 0, its queries, keys and values."""
        n, d = rank_and_size(self.group)[1], self.embed_dim // self.num_heads
        kinds = [self.num_heads * d, self.num_kv_heads * d, self.num_kv_heads * d]
        parts = [rows.tensor_split(n) for rows in torch.arange(sum(kinds)).split(kinds)]
        return torch.cat([part for of_rank in zip(*parts, strict=True) for part in of_rank])

    def _whole_linears(self):
        """(qkv, out) as two nn.Linear with all heads."""
        return _rows(self.qkv.to_module(), self._order().argsort()), self.out.to_module()

    def _linears(self, module):
        return module.qkv, module.out

    def to_module(self):
        """The whole `Attention`, exactly, on every rank: one all-gather for each parameter that is split."""
        like = {"causal": self.causal, "dropout": self.dropout, "device": "meta"}
        whole = Attention(self.embed_dim, self.num_heads, self.num_kv_heads, **like)
        whole.qkv, whole.out = self._whole_linears()
        return whole.train(self.training)

    def forward(self, x, sizes=None):
        """sizes: every rank's positions, where they differ (with sequence_parallel only)."""
        return self._attend(x, self.causal, None, sizes)

    def _attend(self, x, causal, mask, sizes=None):
        if x.dim() != 3:
            raise ValueError(f"{briefly(self)}: x has to be (batch, s, {self.embed_dim}), its shape is {list(x.shape)}")
        dropout = self.dropout if self.training else 0.0
        qkv = self.qkv(x, sizes)  # (b, s, e) -> (b, s, (heads + 2·kv_heads)·d)
        with random_per_rank(self.group) if dropout else nullcontext():  # other heads, other places to drop
            y = attend(qkv, self.heads, self.kv_heads, causal=causal, mask=mask, dropout=dropout)
        return self.out(y)  # (b, s, heads·d) -> (b, s, e)

    def extra_repr(self):
        text = f"{self.heads} of {self.num_heads} heads"
        return text + (f", {self.kv_heads} of {self.num_kv_heads} key-value heads" * (self.kv_heads != self.heads))


class ParallelMultiheadAttention(ParallelAttention):
    """An nn.MultiheadAttention with its heads split: called with its arguments, for self-attention.

    query, key and value are one and the same tensor. Returns (result, None): the attention weights of all heads are
    on no rank.
    """

    in_proj_bias = None  # tells nn.TransformerEncoderLayer to call forward, also where it has a short cut

    def _linears(self, module):
        if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
            raise ValueError("an nn.MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn does not split")
        self.batch_first = module.batch_first
        qkv = nn.Linear(module.embed_dim, 3 * module.embed_dim, module.in_proj_bias is not None, device="meta")
        qkv.weight, qkv.bias = module.in_proj_weight, module.in_proj_bias
        return qkv, module.out_proj

    def to_module(self):
        like = {"bias": self.out.bias is not None, "batch_first": self.batch_first, "device": "meta"}
        whole = nn.MultiheadAttention(self.embed_dim, self.num_heads, self.dropout, **like)
        qkv, out = self._whole_linears()
        whole.in_proj_weight, whole.in_proj_bias = qkv.weight, qkv.bias
        whole.out_proj.weight, whole.out_proj.bias = out.weight, out.bias
        return whole.train(self.training)

    def forward(
        self,
        query,
        key=None,
        value=None,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        check_self_attention(self, query, key, value, attn_mask, is_causal)
        x = query.unsqueeze(0) if query.dim() == 2 else query if self.batch_first else query.transpose(0, 1)
        y = self._attend(x, False, self._mask(attn_mask, key_padding_mask, x))
        return (y.squeeze(0) if query.dim() == 2 else y if self.batch_first else y.transpose(0, 1)), None

    def _mask(self, mask, padding, x):
        """nn.MultiheadAttention's two masks, where True means "not this one", as one that is added."""
        masks = []
        if mask is not None:
            if mask.dim() == 3:  # (batch · all heads, s, s): those of this rank
                first = rank_and_size(self.group)[0] * self.heads
                mask = mask.unflatten(0, (-1, self.num_heads))[:, first : first + self.heads]
            masks.append(mask)
        if padding is not None:  # (batch, s)
            masks.append(padding.view(-1, 1, 1, padding.size(-1)))
        zero = x.new_zeros(())
        masks = [zero.masked_fill(m, -torch.inf) if m.dtype == torch.bool else m.to(x.dtype) for m in masks]
        return sum(masks[1:], masks[0]) if masks else None


def _rows(linear, order):
    """An nn.Linear with the rows of another one in this order."""
    other = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    for name, p in linear.named_parameters():
        setattr(other, name, parameter(p.detach()[order.to(p.device)], p))
    return other.train(linear.training)
