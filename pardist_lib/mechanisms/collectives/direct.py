"""Reduce-scatter and all-gather in one round: every rank exchanges with every other one directly.

A ring passes chunks from neighbour to neighbour, in n − 1 steps of which each waits for the one before. Here no
message waits for another. The bytes are the same, as every byte travels once; but a rank talks to all others at
once, where a ring of nodes uses each link for one neighbour, and it needs memory for all ranks' chunks.

Starting and ending are functions of their own, so that a rank can compute in between without a thread.
The package's docstring says what holds for all.
Source: Thakur, Rabenseifner, Gropp (2005), on reduce-scatter by pairwise exchange.
"""

import torch.distributed as dist

from ..group import rank_and_size
from .buffers import all_gather_out, check_op, combine, finish, out_or_new, rows, scratch
from .point_to_point import exchange, wait


def direct_reduce_scatter(tensor, op=dist.ReduceOp.SUM, out=None, group=None):
    """Chunk `rank` (along dimension 0) of the sum of all ranks' tensors; `tensor` stays as it is.

    tensor: (rows, …), the same shape on every rank. Returns (split_sizes(rows, n)[rank], …), in `out` if given.
    Sends S minus its own chunk, (n − 1)/n·S where n divides the rows, in n − 1 messages at once.
    """
    rank, n = rank_and_size(group)
    chunks = rows(tensor).tensor_split(n)
    theirs = scratch(chunks[rank], n, chunks[rank].numel())
    return added_up(started_exchange(chunks, theirs, group), chunks, theirs, op, out, group)


def direct_all_gather(tensor, sizes=None, out=None, group=None):
    """All ranks' rows, in the order of ranks, on every rank.

    tensor: (rows, …); sizes: every rank's rows, where they differ. Returns (sum of sizes, …), in `out` if given.
    Sends its own rows n − 1 times, (n − 1)/n·S where all are equal, at once.
    """
    rank, n = rank_and_size(group)
    shards, out = all_gather_out(tensor, sizes, out, rank, n)
    wait(started_all_gather(tensor, shards, group))
    return out


def started_exchange(chunks, theirs, group):
    """The messages of a reduce-scatter, started; what to `wait` for. chunks: contiguous, one for each rank; theirs:
    (n, elements of this rank's chunk), where the other ranks' arrive. Both stay untouched until `added_up`."""
    rank, n = rank_and_size(group)
    others = _after(rank, n)
    return exchange([(chunks[to], to) for to in others], [(theirs[source], source) for source in others[::-1]], group)


def added_up(works, chunks, theirs, op, out, group):
    """Wait for `works`; this rank's chunk of the sum of all ranks' chunks, in `out` if given."""
    rank, n = rank_and_size(group)
    check_op(op, chunks[rank])
    out = out_or_new(out, chunks[rank].shape, like=chunks[rank])
    wait(works)
    total = chunks[rank]
    for source in _after(rank, n):
        total = combine(op, total, theirs[source].view_as(total), out=out)
    if n == 1:
        out.copy_(total)
    finish(op, out, n)
    return out


def started_all_gather(shard, shards, group):
    """The messages of an all-gather, started; what to `wait` for. shards: where every rank's belongs, contiguous;
    this rank's may be `shard` itself."""
    rank, _ = rank_and_size(group)
    mine = shards[rank]
    if mine.data_ptr() != shard.data_ptr() or not shard.is_contiguous():  # else it is in its place already
        mine.copy_(shard.detach().view_as(mine))
    return asked_for_shards(shards, group) + sent_shard(shards, group)


def asked_for_shards(shards, group):
    """The receives of an all-gather, started; what to `wait` for. gloo's sender waits until its receive is posted: one
    that is posted before this rank's shard is computed need not be waited for then."""
    rank, n = rank_and_size(group)
    return exchange(receives=[(shards[source], source) for source in reversed(_after(rank, n))], group=group)


def sent_shard(shards, group):
    """The sends of an all-gather, started; what to `wait` for."""
    rank, n = rank_and_size(group)
    return exchange([(shards[rank], to) for to in _after(rank, n)], group=group)


def _after(rank, n):
    """The other ranks, each rank's next ones first: not all send to the same rank at a time."""
    return [(rank + i) % n for i in range(1, n)]
