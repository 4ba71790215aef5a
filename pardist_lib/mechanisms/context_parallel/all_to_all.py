"""Attention of a sequence that is dealt out over ranks: for its length each rank takes whole sequences of some heads.

All but attention works token by token, and no head looks at another. So an all-to-all before attention turns a rank's
part of the sequence, with all heads, into its part of the heads, with the whole sequence; and one after it turns the
result back. In between attention is that of one process.

    q, k, v    (batch, heads, own tokens, d)     → all-to-all →    (batch, heads / n, tokens, d)
    result     (batch, heads, own tokens, d)     ← all-to-all ←    (batch, heads / n, tokens, d)

Source: Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence
Transformer Models" (2023), section 3.
"""

import torch
from torch.nn import functional as F

from ..collectives.all_to_all import pairwise_all_to_all
from ..group import rank_and_size
from .checks import check_attention, check_heads, facts_of, place
from .order import in_order, shares_of_all, taken, tokens
from .ring import RingAttention
from .visible import Visible


def all_to_all_attention(q, k, v, group=None, causal=True, order="zigzag", *, mask=None, documents=None, length=None):
    """softmax(q·kᵀ/√d)·v of the whole sequence, for this rank's queries: as `ring_attention`, argument for argument.

    n ranks have to divide the heads, those of keys and values too. Sends four all-to-alls forward, of q, k, v and the
    result, (n − 1)/n of each: 4·N·h·(n − 1)/n² elements a rank for N tokens of h numbers (batch · heads · d), fewer
    where there are fewer heads of keys and values; backward the same. That falls as 1/n, where a ring's bytes do not.
    (Where the ranks' tokens are not equally many: each minus the part that stays.)

    In between works torch's scaled_dot_product_attention; with `mask` or `documents` a ring of one rank, which makes
    the mask block by block and never the whole square.

    Raises ValueError as `ring_attention`, and for heads that do not divide, with what would fit.
    """
    who = "all_to_all_attention"
    check_attention(q, k, v, group, mask, who)
    check_heads(q.size(1), k.size(1), rank_and_size(group)[1], who)
    everyones = shares_of_all(q, 2, group, order, length, who, facts_of(q, k, v, causal, mask, documents))
    whole = sum(map(tokens, everyones))
    visible = Visible.checked(causal, mask, documents, whole, q, place(who, group))

    q, k, v = (_whole_sequence(x, everyones, group) for x in (q, k, v))  # (b, h, own, d) → (b, h/n, s, d)
    if not visible.depends_on_more:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.size(1) != k.size(1))
    else:  # a ring of one rank
        y = RingAttention.apply(q, k, v, visible, [[range(whole)]], 0, None)
    return _all_heads(y, everyones, group)  # (b, h/n, s, e) → (b, h, own, e)


def _whole_sequence(x, everyones, group):
    n = len(everyones)
    x = _AllToAll.apply(x, 1, [x.size(1) // n] * n, 2, [tokens(share) for share in everyones], group)
    return in_order(x, 2, everyones)


def _all_heads(x, everyones, group):
    x = torch.cat([taken(x, 2, share) for share in everyones], 2)  # rank by rank
    return _AllToAll.apply(x, 2, [tokens(share) for share in everyones], 1, [x.size(1)] * len(everyones), group)


class _AllToAll(torch.autograd.Function):
    """Cut x along one dimension, a piece for each rank, and join what arrives along another.

    cut_sizes: the rows for each rank; join_sizes: the rows of each rank, this one's those of x.
    """

    @staticmethod
    def forward(ctx, x, cut, cut_sizes, join, join_sizes, group):
        ctx.back = join, join_sizes, cut, cut_sizes, group
        rank, _ = rank_and_size(group)
        leaving = [piece.reshape(-1) for piece in x.split(cut_sizes, cut)]
        shapes = [list(x.shape) for _ in join_sizes]
        for shape, size in zip(shapes, join_sizes, strict=True):
            shape[cut], shape[join] = cut_sizes[rank], size
        sizes = [piece.numel() for piece in leaving], [torch.Size(shape).numel() for shape in shapes]
        arrived = pairwise_all_to_all(torch.cat(leaving), *sizes, group=group).split(sizes[1])
        return torch.cat([piece.view(shape) for piece, shape in zip(arrived, shapes, strict=True)], join)

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, *ctx.back), None, None, None, None, None
