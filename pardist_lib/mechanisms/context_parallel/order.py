"""Who has which tokens: a sequence dealt out over the ranks of a group, and put together again.

With causal attention a late token has many keys to look at, an early one few. In the plain order, "contiguous", rank i
of n has the i-th of n chunks: the last rank works while the first has nothing left to do. "zigzag" cuts 2n chunks and
gives rank i an early one and a late one, i and 2n − 1 − i:

    contiguous     0 0 0 0 1 1 1 1 2 2 2 2 3 3 3 3
    zigzag         0 0 1 1 2 2 3 3 3 3 2 2 1 1 0 0

Whatever has to do with places (causality, masks, position embeddings, the next token as label) has to ask for the
position in the whole sequence, `own_positions`, for a rank's tokens are not neighbours any more.

Chunks are those of torch.tensor_split, so the sequence need not be divisible; a rank may get no token at all.
Source: Llama Team, "The Llama 3 Herd of Models" (2024), section 3.3.2 (2·CP chunks).
"""

import math

import torch

from ..collectives.autograd import gathered
from ..group import rank_and_size, split_sizes
from .checks import ORDERS, check_dealt, check_group, check_length, check_order, dimension, lengths_of_all


def shares(length, n, order="zigzag"):
    """[rank] → its positions of a sequence of `length` tokens, as a list of ranges, from early to late."""
    check_order(order)
    sizes = split_sizes(length, 2 * n if order == "zigzag" else n)
    chunks = [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    if order == "contiguous":
        return [[chunk] for chunk in chunks]
    return [[chunks[i], chunks[2 * n - 1 - i]] for i in range(n)]


def deal(sequence, group=None, dim=1, order="zigzag"):
    """This rank's tokens of a sequence that every rank has whole.

    sequence: tokens, labels, activations, … with the sequence along `dim`, the same on every rank. Returns as much of
    it as `shares` says, in memory of its own. order: "zigzag" or "contiguous".
    Sends nothing forward. Backward all-gathers the ranks' gradients, so that every rank has that of the whole.
    Raises ValueError for a dimension or an order that is not there, and outside the group.
    """
    check_group(group, "deal")
    rank, n = rank_and_size(group)
    dim = dimension(sequence, dim, "deal")
    return _Deal.apply(sequence, dim, shares(sequence.size(dim), n, order), rank, group)


def collect(own, group=None, dim=1, order="zigzag", length=None):
    """The whole sequence, on every rank, from each rank's own tokens: the way back from `deal`.

    own: this rank's tokens along `dim`; the other dimensions are the same on every rank. length: tokens of the whole
    sequence; without it the ranks ask each other (`lengths_of_all`).
    Sends one all-gather forward; nothing backward, where a rank takes its own tokens' gradient of the whole one: right
    for ranks that all go on to the same work with the whole sequence.
    Raises ValueError where the ranks' tokens are not what `order` deals.
    """
    check_group(group, "collect")
    rank, _ = rank_and_size(group)
    dim = dimension(own, dim, "collect")
    facts = {"numbers to a token": math.prod(own.shape[:dim] + own.shape[dim + 1 :])}
    everyones = shares_of_all(own, dim, group, order, length, "collect", facts)
    return _Collect.apply(own, dim, everyones, rank, group)


def own_positions(length, group=None, order="zigzag", device=None):
    """Where this rank's tokens stand in a sequence of `length` tokens: (own tokens), int64, ascending.

    For position embeddings (`table[own_positions(s)]`), for rotary angles, for anything that `deal` does not carry.
    """
    check_group(group, "own_positions")
    check_length(length, "own_positions")
    rank, n = rank_and_size(group)
    return places(shares(length, n, order)[rank], device)


# ---- for those who know the shares ----------------------------------------------------------------------------


def shares_of_all(own, dim, group, order, length, who, facts=None):
    """`shares` of the sequence of which this rank has `own` tokens along `dim`.

    length: tokens of the whole sequence; None: the ranks ask each other (`lengths_of_all`, with these facts).
    Raises ValueError where this is not what `order` deals.
    """
    rank, n = rank_and_size(group)
    check_order(order)
    lengths, mine = None, own.size(dim)
    if length is None:
        lengths = lengths_of_all(mine, {"order": order} | (facts or {}), group, who, own.device)
        length = sum(lengths)
    check_length(length, who)
    dealt = {name: [tokens(share) for share in shares(length, n, name)] for name in ORDERS}
    check_dealt(mine, lengths, rank, length, order, dealt, who)
    return shares(length, n, order)


def tokens(share):
    """How many tokens a share has."""
    return sum(map(len, share))


def places(share, device=None):
    """The positions of a share, as a tensor."""
    return torch.cat([torch.arange(run.start, run.stop, device=device) for run in share])


def taken(whole, dim, share):
    """The tokens of a share out of the whole sequence."""
    return torch.cat([whole.narrow(dim, run.start, len(run)) for run in share], dim)


def in_order(parts, dim, everyones):
    """The whole sequence out of all shares, one after the other along `dim`."""
    runs = [run for share in everyones for run in share]
    pieces = zip(runs, parts.split([len(run) for run in runs], dim), strict=True)
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0].start)], dim)


def _whole(own, dim, everyones, group):
    return in_order(gathered(own, dim, [tokens(share) for share in everyones], group), dim, everyones)


class _Deal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, dim, everyones, rank, group):
        ctx.how = dim, everyones, rank, group
        return taken(whole, dim, everyones[rank])

    @staticmethod
    def backward(ctx, grad):
        return _Collect.apply(grad, *ctx.how), None, None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, dim, everyones, rank, group):
        ctx.how = dim, everyones, rank, group
        return _whole(own, dim, everyones, group)

    @staticmethod
    def backward(ctx, grad):
        dim, everyones, rank, _ = ctx.how
        return taken(grad, dim, everyones[rank]), None, None, None, None
