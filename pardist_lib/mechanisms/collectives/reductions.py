"""All-reduce, reduce-scatter and all-gather, other ways than by a ring.

The package's docstring compares them and says what holds for all of them.
"""

import torch
import torch.distributed as dist

from ..group import rank_and_size, split_sizes
from .buffers import all_gather_out, check_op, combine, finish, flattened, out_or_new, rows
from .point_to_point import PIECE_BYTES, exchange, wait
from .rooted import binomial, broadcast_along, gather_along, reduce_along, scatter_along, star

# ---- all-reduce, other ways -----------------------------------------------------------------------------------


def naive_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, *, piece_bytes=PIECE_BYTES):
    """As `ring_all_reduce`: everybody's tensor to the group's first rank, the sum back to everybody.

    The first rank sends (n − 1)·S and receives as much, the others send S: its link is the bottleneck.
    """
    reduce_along(star, tensor, 0, op, group, piece_bytes)
    return broadcast_along(star, tensor, 0, group, piece_bytes)


def tree_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, *, piece_bytes=PIECE_BYTES):
    """As `ring_all_reduce`: up a binomial tree to the group's first rank and down again, 2·⌈log₂ n⌉ steps.

    The first rank sends ⌈log₂ n⌉·S, a rank with c children (1 + c)·S.
    """
    reduce_along(binomial, tensor, 0, op, group, piece_bytes)
    return broadcast_along(binomial, tensor, 0, group, piece_bytes)


def recursive_doubling_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
    """As `ring_all_reduce`, in log₂ n steps: swap the whole tensor with a partner at distance 1, 2, 4, …

    After each step a rank has the sum of twice as many ranks. Sends log₂ n·S: for tensors so short that only the
    number of messages counts. Where n is no power of two, see `_power_of_two`.
    """

    def swap_all(flat, seat, size, rank_of):
        theirs, distance = torch.empty_like(flat), 1
        while distance < size:
            partner = rank_of(seat ^ distance)
            wait(exchange([(flat, partner)], [(theirs, partner)], group))
            combine(op, flat, theirs, out=flat)
            distance *= 2

    return _power_of_two(swap_all, tensor, op, group)


def halving_doubling_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
    """As `ring_all_reduce`, with as few bytes in fewer steps: Rabenseifner's recursive halving, then doubling.

    Partners swap halves of what they both still care for, and each adds up one: after log₂ n steps a rank has the
    sum of one n-th. The same steps backwards spread the sums. Sends 2·(n − 1)/n·S where n is a power of two and
    divides the elements; where n is no power of two, see `_power_of_two`.
    """

    def halve_then_double(flat, seat, size, rank_of):
        theirs, mine, distance, steps = torch.empty_like(flat[len(flat) // 2 :]), flat, size // 2, []
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
    rank, n = rank_and_size(group)
    check_op(op, tensor)
    size = 1 << n.bit_length() - 1
    extra = n - size
    paired = rank < 2 * extra
    with flattened(tensor) as flat:
        if paired and rank % 2 == 0:
            wait(exchange(sends=[(flat, rank + 1)], group=group))
            wait(exchange(receives=[(flat, rank + 1)], group=group))
            return tensor
        if paired:
            theirs = torch.empty_like(flat)
            wait(exchange(receives=[(theirs, rank - 1)], group=group))
            combine(op, flat, theirs, out=flat)
        seat = rank // 2 if paired else rank - extra
        all_reduce(flat, seat, size, lambda s: 2 * s + 1 if s < extra else s + extra)
        finish(op, flat, n)
        if paired:
            wait(exchange(sends=[(flat, rank - 1)], group=group))
    return tensor


# ---- reduce-scatter and all-gather, other ways ----------------------------------------------------------------


def naive_reduce_scatter(tensor, op=dist.ReduceOp.SUM, out=None, group=None):
    """As `ring_reduce_scatter`: a reduce to the group's first rank, which deals out the sum's chunks.

    Every other rank sends S, the first one S minus its own chunk; the first one receives (n − 1)·S.
    """
    rank, n = rank_and_size(group)
    whole = rows(tensor)
    sizes = split_sizes(len(whole), n)
    out = out_or_new(out, (sizes[rank], *whole.shape[1:]), like=tensor)
    total = reduce_along(star, whole.clone() if rank == 0 else whole, 0, op, group)
    return scatter_along(star, out, total if rank == 0 else None, 0, sizes, group)


def naive_all_gather(tensor, sizes=None, out=None, group=None):
    """As `ring_all_gather`: gather on the group's first rank, then broadcast the whole.

    Every other rank sends its own rows, the first one (n − 1)·S, S being the result's bytes.
    """
    rank, n = rank_and_size(group)
    shards, out = all_gather_out(tensor, sizes, out, rank, n)
    whole = gather_along(star, tensor, 0, [len(shard) for shard in shards], group)
    return broadcast_along(star, out if whole is None else out.copy_(whole), 0, group)


def bruck_all_gather(tensor, sizes=None, out=None, group=None):
    """As `ring_all_gather`, in ⌈log₂ n⌉ steps for any n: each step doubles what a rank has (Bruck et al.).

    In step i a rank sends the 2^i shards that it has (in the last step what is still wanted) to the rank 2^i before
    it. Sends (n − 1)/n·S where all are equal, as the ring, in fewer but longer messages; one copy of S at the end.
    """
    rank, n = rank_and_size(group)
    shards, out = all_gather_out(tensor, sizes, out, rank, n)
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
