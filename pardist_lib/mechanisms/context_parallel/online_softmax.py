"""Attention piece by piece: some queries against some keys, and how results over different keys become one.

Softmax needs the sum over all keys, so a part of the keys seems not to be enough. It is, if one number per query is
kept beside the result: the logarithm of the sum of exponentials, lse = log Σ exp(score). Two results over different
keys are averages with the weights exp(lse₁) and exp(lse₂), and so is the result over both together. The same number is
all that backward needs to have any piece of the softmax again: weight = exp(score − lse).

b: batch; g: heads of queries to each of the kv heads of keys and values; r: queries; d: width of queries and keys,
e: of values.

Sources: Milakov, Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., "FlashAttention" (2022),
algorithms 1 and 4.
"""

import torch


def attend(q, k, v, visible=None):
    """softmax(q·kᵀ/√d)·v of some queries and some keys: (result, lse).

    q: (b, kv, g, r, d); k: (b, kv, keys, d); v: (b, kv, keys, e), in whose dtype all is computed; visible: bool,
    (r, keys) or (b, r, keys), None for all. Returns (b, kv, g, r, e) and (b, kv, g, r, 1). A query that sees none of
    these keys gets 0 and −inf: a part that counts nothing.
    """
    scores = _scores(_scaled(q, k), k, visible, q)
    top = _or_zero(scores.amax(-1, keepdim=True))
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights @ v).div_(total.clamp(min=1))  # a row that sees a key has the weight exp(0) among its own
    return _unfold(out, q), _unfold(total.log_().add_(top), q)


def merge(out, lse, more_out, more_lse):
    """Attention over some keys and over some others becomes attention over both: out and lse, in place."""
    both = torch.logaddexp(lse, more_lse)
    whole = _or_zero(both)
    out.mul_((lse - whole).exp_()).add_(more_out.mul_((more_lse - whole).exp_()))
    lse.copy_(both)


def attend_backward(q, lse, grad, delta, dq, k, v, dk, dv, visible=None):
    """Add what these queries and keys find to their gradients dq, dk and dv, in place.

    lse: of the queries over *all* keys, (b, kv, g, r, 1); grad: of the result, (b, kv, g, r, e); delta: Σ grad · result
    of each query, (b, kv, g, r, 1).
    """
    scaled, d_out = _scaled(q, k), _fold(grad)
    weights = _scores(scaled, k, visible, q).sub_(_or_zero(_fold(lse))).exp_()
    _add_product(dv, weights.mT, d_out)
    d_scores = (d_out @ v.mT).sub_(_fold(delta)).mul_(weights)
    _add_product(dk, d_scores.mT, scaled)
    dq += _unfold(d_scores @ k, q).mul_(q.size(-1) ** -0.5)


def _scaled(q, k):
    """q/√d, (b, kv, g·r, d)."""
    return _fold(q).to(k.dtype) * q.size(-1) ** -0.5


def _scores(scaled, k, visible, q):
    """(b, kv, g·r, keys), −inf where a key is not visible."""
    scores = scaled @ k.mT
    if visible is not None:
        hidden = ~(visible if visible.dim() == 2 else visible[:, None, None])
        _unfold(scores, q).masked_fill_(hidden, -torch.inf)
    return scores


def _add_product(total, a, b):
    """total += a @ b, without memory for the product."""
    total.view(-1, *total.shape[2:]).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))


def _or_zero(lse):
    """−inf, of queries that see no key, as 0: then exp(−inf − 0) is the 0 that it shall be, and no NaN."""
    return lse.masked_fill(lse == -torch.inf, 0)


def _fold(x):
    """(b, kv, g, r, …) as (b, kv, g·r, …): all queries of a key's head in one matrix."""
    return x.flatten(2, 3)


def _unfold(x, like):
    return x.unflatten(2, like.shape[2:4])
