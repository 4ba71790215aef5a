"""Attention of a sequence that is dealt out over ranks: keys and values go round the ring.

Queries stay where they are. In step t = 0 … n − 1 a rank has the keys and values of rank i − t: it passes them on to
the next rank and, while they travel, takes its own queries' attention to them. The parts are merged by their
log-sum-exp (online_softmax.py), so that the result is that of the whole sequence, exactly.

    forward     K and V make n − 1 hops
    backward    K and V make them again; dK and dV follow one step behind them, each rank adding its part, and the last
                hop brings them home: n − 1 hops, too

For backward a rank keeps its own q, k, v, its result and one number per query, never what came by: all that is kept
falls as 1/n. While backward works, a rank has K and V twice (here, arriving) and dK and dV four times (its own, found,
leaving, arriving), however many ranks there are; all keys and values gathered, with their gradients, are n times that
of one rank.

Sources: Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context" (2023); Li et al., "Sequence
Parallelism: Long Sequence Training from System Perspective" (2021), for the ring; Dao et al. (2022) for backward.
"""

import torch
from torch.autograd.function import once_differentiable

from ..collectives.point_to_point import exchange, wait
from ..group import rank_and_size
from .checks import check_attention, facts_of, place
from .online_softmax import attend, attend_backward, merge
from .order import shares_of_all, tokens
from .visible import Visible


def ring_attention(q, k, v, group=None, causal=True, order="zigzag", *, mask=None, documents=None, length=None):
    """softmax(q·kᵀ/√d)·v of the whole sequence, for this rank's queries.

    q: (batch, heads, own tokens, d); k: (batch, kv heads, own tokens, d); v: (batch, kv heads, own tokens, e), where
    kv heads divides heads (grouped-query heads: neighbours share a head of keys and values). Returns (batch, heads, own
    tokens, e). All of one dtype; 16 bits are computed in float32.

    order       how the tokens were dealt; see `deal`
    mask        f(query position, key position) → bool, True where the query sees the key: of int64 positions in the
                whole sequence, (r, 1) and (1, keys), to (r, keys). In addition to `causal`.
    documents   which document each token of the *whole* sequence is of, (s) or (batch, s), the same on every rank: a
                token sees its own document only.
    length      tokens of the whole sequence, where the caller knows it. Without it the ranks ask each other (one
                all-gather of 96 bytes a rank), and check on the way that they were called alike.

    A query that sees no key gets 0, and gives no gradient.

    Sends forward K and V of all ranks but the next one, (n − 1)·(K + V) where shares are equal; backward the same again
    and dK and dV of all other ranks, 2·(n − 1)·(K + V) in all (dK and dV of 16-bit tensors travel in float32). Every
    rank has to go through backward, also one without tokens.
    Raises ValueError for shapes that do not fit, and for tokens that are not those of `order`. An order that is wrong
    but gives every rank as many tokens cannot be told from the right one.
    """
    who = "ring_attention"
    check_attention(q, k, v, group, mask, who)
    everyones = shares_of_all(q, 2, group, order, length, who, facts_of(q, k, v, causal, mask, documents))
    visible = Visible.checked(causal, mask, documents, sum(map(tokens, everyones)), q, place(who, group))
    return RingAttention.apply(q, k, v, visible, everyones, rank_and_size(group)[0], group)


def _without_autocast(function):
    """For forward and backward of a torch.autograd.Function: dtypes in it are as they are written."""

    def called(ctx, x, *more):
        with torch.autocast(x.device.type, enabled=False):
            return function(ctx, x, *more)

    return called


class RingAttention(torch.autograd.Function):
    """everyones: the ranks' shares, [rank]. One share is a ring of one, without a group."""

    @staticmethod
    @_without_autocast
    def forward(ctx, q, k, v, visible, everyones, rank, group):
        queries = q.unflatten(1, (k.size(1), -1))  # (b, kv, g, s, d)
        like = {"dtype": torch.promote_types(q.dtype, torch.float32), "device": q.device}
        out = torch.zeros(*queries.shape[:-1], v.size(-1), **like)
        lse = torch.full((*queries.shape[:-1], 1), -torch.inf, **like)

        for source, (keys, values) in passed_round((k, v), everyones, rank, group):
            keys, values = keys.to(out.dtype), values.to(out.dtype)
            for rows, upto, seen in visible.blocks(everyones[rank], everyones[source], q.device):
                more = attend(queries[..., rows, :], keys[..., upto, :], values[..., upto, :], seen)
                merge(out[..., rows, :], lse[..., rows, :], *more)

        out = out.flatten(1, 2).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = visible, everyones, rank, group
        return out

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx, grad):
        (q, k, v, out, lse), (visible, everyones, rank, group) = ctx.saved_tensors, ctx.how
        n = len(everyones)
        queries, grad = q.unflatten(1, lse.shape[1:3]), grad.to(lse.dtype)
        delta = (grad * out).sum(-1, keepdim=True).view_as(lse)
        grad = grad.unflatten(1, lse.shape[1:3])
        dq, own, travelling = torch.zeros_like(queries, dtype=lse.dtype), None, None

        for source, (keys, values) in passed_round((k, v), everyones, rank, group):
            keys, values = keys.to(lse.dtype), values.to(lse.dtype)
            dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
            for rows, upto, seen in visible.blocks(everyones[rank], everyones[source], q.device):
                of_rows = (x[..., rows, :] for x in (queries, lse, grad, delta, dq))
                of_keys = (x[..., upto, :] for x in (keys, values, dk, dv))
                attend_backward(*of_rows, *of_keys, seen)
            if source == rank:
                own = dk, dv  # stay: what the others find comes home at the end
            else:
                travelling = _sent_on(_added((dk, dv), travelling), everyones[(source - 1) % n], rank, n, group)

        dk, dv = _added(own, travelling)
        return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *[None] * 4


def passed_round(tensors, everyones, rank, group):
    """Yield (rank, its tensors): this rank's own first, then each other rank's, as they come round the ring.

    tensors: (batch, heads, own tokens, …) each. While the caller works on what was yielded, it travels on to the next
    rank and the ones after it arrive.
    """
    n = len(everyones)
    tensors = [t.contiguous() for t in tensors]
    for step in range(n):
        source = (rank - step) % n
        if step == n - 1:
            yield source, tensors
            return
        arriving = _empty_like(tensors, everyones[(source - 1) % n])
        works = _to_the_next(tensors, arriving, rank, n, group)
        yield source, tensors
        wait(works)
        tensors = arriving


# ---- gradients on their way -----------------------------------------------------------------------------------


def _sent_on(found, next_share, rank, n, group):
    """Start what was found on its way to the next rank, and a receive of what the rank before has found for the
    next_share: what `_added` takes. The tensors that leave are held until they are gone."""
    arriving = _empty_like(found, next_share)
    return _to_the_next(found, arriving, rank, n, group), found, arriving


def _added(found, travelling):
    if travelling is not None:
        works, _, arrived = travelling
        wait(works)
        for mine, theirs in zip(found, arrived, strict=True):
            mine += theirs
    return found


def _to_the_next(leaving, arriving, rank, n, group):
    to, source = (rank + 1) % n, (rank - 1) % n
    return exchange([(t, to) for t in leaving], [(t, source) for t in arriving], group)


def _empty_like(tensors, share):
    """Where tensors like these arrive, with the tokens of another share."""
    return [t.new_empty((*t.shape[:2], tokens(share), *t.shape[3:])) for t in tensors]
