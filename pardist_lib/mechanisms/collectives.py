"""Collectives from send and receive: what `torch.distributed` and NCCL do, in Python, one function each.

Here are all-reduce, reduce-scatter and all-gather. Those with a root (broadcast, reduce, gather, scatter) are in
rooted_collectives.py, all-to-all is in all_to_all.py: both can be imported from here too.

Ways to do the same thing, with α seconds for a message, β seconds for a byte, S bytes of the whole tensor, n ranks:

                         time on one rank (arithmetic left out)      why
    naive                (n − 1)·(α + S·β) on the root, twice         easy to get right
    tree                 2·⌈log₂ n⌉·(α + S·β)                         few steps
    recursive doubling   log₂ n·(α + S·β)                             fewest steps: short tensors
    halving, doubling    2·log₂ n·α + 2·(n−1)/n·S·β                   few steps and few bytes, but far partners
    ring                 2·(n − 1)·α + 2·(n−1)/n·S·β                  fewest bytes, near partners: long tensors

Chunk i of a tensor is what torch.tensor_split(n)[i] cuts, so n need not divide anything. In-place functions return
their tensor, which need not be contiguous. `group`: a process group, None for all ranks; ValueError outside it.
`op`: dist.ReduceOp SUM, AVG (not of integers), MAX, MIN, PRODUCT. What a docstring says a rank sends is the bytes of
the tensors that it gives to isend; a message longer than `piece_bytes` goes as several.

Sources: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (2005);
Patarasuk, Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations" (2009).
"""

import torch

from .all_to_all import bruck_all_to_all, naive_all_to_all, pairwise_all_to_all
from .point_to_point import (
    DEPTH,
    PIECE_BYTES,
    check_op,
    combine,
    exchange,
    finish,
    flat,
    overlap,
    pieces,
    place,
    place_for,
    room_for_all,
    rows,
    scratch,
    split_sizes,
    wait,
)
from .rooted_collectives import (
    SUM,
    binomial,
    broadcast_along,
    chain_broadcast,
    gather_along,
    naive_broadcast,
    naive_gather,
    naive_reduce,
    naive_scatter,
    reduce_along,
    scatter_along,
    star,
    tree_broadcast,
    tree_gather,
    tree_reduce,
    tree_scatter,
)

__all__ = [
    "naive_broadcast", "chain_broadcast", "tree_broadcast", "naive_reduce", "tree_reduce",
    "naive_gather", "tree_gather", "naive_scatter", "tree_scatter",
    "naive_all_reduce", "tree_all_reduce", "ring_all_reduce",
    "recursive_doubling_all_reduce", "halving_doubling_all_reduce",
    "naive_reduce_scatter", "ring_reduce_scatter",
    "naive_all_gather", "ring_all_gather", "bruck_all_gather",
    "naive_all_to_all", "pairwise_all_to_all", "bruck_all_to_all", "split_sizes",
]  # fmt: skip

# ---- the ring -------------------------------------------------------------------------------------------------


def ring_all_reduce(tensor, op=SUM, group=None, *, piece_bytes=PIECE_BYTES):
    """The sum (or `op`) of all ranks' tensors, in place on every rank; returned.

    A reduce-scatter, then an all-gather: 2·(n − 1) steps, in each of which a rank sends one chunk to the next rank.
    Sends 2·(n − 1)/n·S where n divides the elements; else 2·S − (chunk r) − (chunk r + 1) for rank r.
    """
    rank, n = place(group)
    check_op(op, tensor)

    def journey(k):
        yield from _ring_reduce(k, parts, spare, op, rank, n, group)
        yield from _ring_gather(k, parts, rank, n, group)

    with flat(tensor) as line:
        parts = pieces(line.tensor_split(n), piece_bytes)
        spare = _spare(parts, 1)
        overlap(journey(k) for k in range(len(parts[0])))
    return tensor


def ring_reduce_scatter(tensor, op=SUM, out=None, group=None, *, piece_bytes=PIECE_BYTES):
    """Chunk `rank` (along dimension 0) of the sum of all ranks' tensors; `tensor` stays as it is.

    tensor: (rows, …), the same shape on every rank. Returns (split_sizes(rows, n)[rank], …), in `out` if given.
    Sends S minus its own chunk, (n − 1)/n·S where n divides the rows, in n − 1 steps.
    """
    rank, n = place(group)
    check_op(op, tensor)
    chunks = rows(tensor).tensor_split(n)
    out = place_for(out, chunks[rank].shape, like=tensor)
    parts = pieces(chunks, piece_bytes)
    results, spare = out.view(-1).tensor_split(len(parts[0])), _spare(parts, 2)
    overlap(_ring_reduce(k, parts, spare, op, rank, n, group, results[k]) for k in range(len(results)))
    return out


def ring_all_gather(tensor, sizes=None, out=None, group=None, *, piece_bytes=PIECE_BYTES):
    """All ranks' rows, in the order of ranks, on every rank.

    tensor: (rows, …); sizes: every rank's rows, where they differ. Returns (sum of sizes, …), in `out` if given.
    Rank r sends the result's bytes minus those of rank r + 1's rows, (n − 1)/n·S where all are equal, in n − 1 steps.
    """
    rank, n = place(group)
    shards, out = room_for_all(tensor, sizes, out, rank, n)
    shards[rank].copy_(tensor.detach().view_as(shards[rank]))
    parts = pieces(shards, piece_bytes)
    overlap(_ring_gather(k, parts, rank, n, group) for k in range(len(parts[0])))
    return out


def _ring_reduce(k, parts, spare, op, rank, n, group, result=None):
    """Piece k of every chunk goes once round the ring: chunk c starts at rank c + 1, visits every rank, ends at c.

    On its way it takes up each rank's own numbers, so what ends at rank c is complete. The sums overwrite this rank's
    own numbers; or, where `result` has room for the last one, they leave them alone.
    """
    carried = parts[(rank - 1) % n][k]
    for step in range(n - 1):
        own = parts[(rank - 2 - step) % n][k]
        arriving, *room = spare[k % DEPTH, :, : own.numel()]
        works = exchange([(carried, (rank + 1) % n)], [(arriving, (rank - 1) % n)], group)
        yield
        wait(works)
        total = own if result is None else result if step == n - 2 else room[0]
        carried = combine(op, own, arriving, out=total)
    if n == 1 and result is not None:
        result.copy_(carried)
    finish(op, carried, n)


def _spare(parts, count):
    """Room for `count` pieces in each journey under way."""
    largest = max(chunk[0].numel() for chunk in parts)
    return scratch(parts[0][0], min(DEPTH, len(parts[0])), count, largest)


def _ring_gather(k, parts, rank, n, group):
    """Piece k of every chunk goes once round the ring: chunk c starts at rank c, and every rank keeps a copy."""
    for step in range(n - 1):
        leaving, arriving = parts[(rank - step) % n][k], parts[(rank - step - 1) % n][k]
        works = exchange([(leaving, (rank + 1) % n)], [(arriving, (rank - 1) % n)], group)
        yield
        wait(works)


# ---- all-reduce, other ways -----------------------------------------------------------------------------------


def naive_all_reduce(tensor, op=SUM, group=None, *, piece_bytes=PIECE_BYTES):
    """As `ring_all_reduce`: everybody's tensor to the group's first rank, the sum back to everybody.

    The first rank sends (n − 1)·S and receives as much, the others send S: its link is the bottleneck.
    """
    reduce_along(star, tensor, 0, op, group, piece_bytes)
    return broadcast_along(star, tensor, 0, group, piece_bytes)


def tree_all_reduce(tensor, op=SUM, group=None, *, piece_bytes=PIECE_BYTES):
    """As `ring_all_reduce`: up a binomial tree to the group's first rank and down again, 2·⌈log₂ n⌉ steps.

    The first rank sends ⌈log₂ n⌉·S, a rank with c children (1 + c)·S.
    """
    reduce_along(binomial, tensor, 0, op, group, piece_bytes)
    return broadcast_along(binomial, tensor, 0, group, piece_bytes)


def recursive_doubling_all_reduce(tensor, op=SUM, group=None):
    """As `ring_all_reduce`, in log₂ n steps: swap the whole tensor with a partner at distance 1, 2, 4, …

    After each step a rank has the sum of twice as many ranks. Sends log₂ n·S: for tensors so short that only the
    number of messages counts. Where n is no power of two, see `_power_of_two`.
    """

    def swap_all(line, seat, size, rank_of):
        theirs, distance = torch.empty_like(line), 1
        while distance < size:
            partner = rank_of(seat ^ distance)
            wait(exchange([(line, partner)], [(theirs, partner)], group))
            combine(op, line, theirs, out=line)
            distance *= 2

    return _power_of_two(swap_all, tensor, op, group)


def halving_doubling_all_reduce(tensor, op=SUM, group=None):
    """As `ring_all_reduce`, with as few bytes in fewer steps: Rabenseifner's recursive halving, then doubling.

    Partners swap halves of what they both still care for, and each adds up one: after log₂ n steps a rank has the
    sum of one n-th. The same steps backwards spread the sums. Sends 2·(n − 1)/n·S where n is a power of two and
    divides the elements; where n is no power of two, see `_power_of_two`.
    """

    def halve_then_double(line, seat, size, rank_of):
        theirs, mine, distance, steps = torch.empty_like(line[len(line) // 2 :]), line, size // 2, []
        while distance:
            keep, give = mine.tensor_split(2) if seat & distance == 0 else mine.tensor_split(2)[::-1]
            arriving, partner = theirs[: len(keep)], rank_of(seat ^ distance)
            wait(exchange([(give, partner)], [(arriving, partner)], group))
            mine = combine(op, keep, arriving, out=keep)
            steps.append((keep, give, partner))
            distance //= 2
        for keep, give, partner in reversed(steps):
            wait(exchange([(keep, partner)], [(give, partner)], group))

    return _power_of_two(halve_then_double, tensor, op, group)


def _power_of_two(all_reduce, tensor, op, group):
    """Run an all-reduce that needs 2^k ranks on n of them (Thakur et al., section 4.5).

    With e = n − 2^k ranks too many, the first 2·e ranks pair up: an even one sends S to its neighbour, which takes
    part for both and at the end sends S back. `all_reduce` gets the seat 0 … 2^k − 1 and who sits on a seat.
    """
    rank, n = place(group)
    check_op(op, tensor)
    size = 1 << n.bit_length() - 1
    extra = n - size
    paired = rank < 2 * extra
    with flat(tensor) as line:
        if paired and rank % 2 == 0:
            wait(exchange(sends=[(line, rank + 1)], group=group))
            wait(exchange(receives=[(line, rank + 1)], group=group))
            return tensor
        if paired:
            theirs = torch.empty_like(line)
            wait(exchange(receives=[(theirs, rank - 1)], group=group))
            combine(op, line, theirs, out=line)
        seat = rank // 2 if paired else rank - extra
        all_reduce(line, seat, size, lambda s: 2 * s + 1 if s < extra else s + extra)
        finish(op, line, n)
        if paired:
            wait(exchange(sends=[(line, rank - 1)], group=group))
    return tensor


# ---- reduce-scatter and all-gather, other ways ----------------------------------------------------------------


def naive_reduce_scatter(tensor, op=SUM, out=None, group=None):
    """As `ring_reduce_scatter`: a reduce to the group's first rank, which deals out the sum's chunks.

    Every other rank sends S, the first one S minus its own chunk; the first one receives (n − 1)·S.
    """
    rank, n = place(group)
    whole = rows(tensor)
    sizes = split_sizes(len(whole), n)
    out = place_for(out, (sizes[rank], *whole.shape[1:]), like=tensor)
    total = reduce_along(star, whole.clone() if rank == 0 else whole, 0, op, group)
    return scatter_along(star, out, total if rank == 0 else None, 0, sizes, group)


def naive_all_gather(tensor, sizes=None, out=None, group=None):
    """As `ring_all_gather`: gather on the group's first rank, then broadcast the whole.

    Every other rank sends its own rows, the first one (n − 1)·S, S being the result's bytes.
    """
    rank, n = place(group)
    shards, out = room_for_all(tensor, sizes, out, rank, n)
    whole = gather_along(star, tensor, 0, [len(shard) for shard in shards], group)
    return broadcast_along(star, out if whole is None else out.copy_(whole), 0, group)


def bruck_all_gather(tensor, sizes=None, out=None, group=None):
    """As `ring_all_gather`, in ⌈log₂ n⌉ steps for any n: each step doubles what a rank has (Bruck et al.).

    In step i a rank sends the 2^i shards that it has (in the last step what is still wanted) to the rank 2^i before
    it. Sends (n − 1)/n·S where all are equal, as the ring, in fewer but longer messages; one copy of S at the end.
    """
    rank, n = place(group)
    shards, out = room_for_all(tensor, sizes, out, rank, n)
    counts = [len(shards[(rank + i) % n]) for i in range(n)]  # my own rows first, then those of the ranks after me
    held = torch.empty_like(out)
    held[: counts[0]].copy_(tensor.detach().view_as(shards[rank]))
    have = 1
    while have < n:
        more = min(have, n - have)
        leaving = held[: sum(len(shards[(rank + i) % n]) for i in range(more))]
        start, end = sum(counts[:have]), sum(counts[: have + more])
        wait(exchange([(leaving, (rank - have) % n)], [(held[start:end], (rank + have) % n)], group))
        have += more
    for i, part in enumerate(held.split(counts)):
        shards[(rank + i) % n].copy_(part)
    return out
