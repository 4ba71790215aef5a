"""All-to-all from send and receive: every rank has a chunk for every other one.

n: ranks of the group; S: bytes of a rank's tensor. The package's docstring says what holds for all.
Sources: Bruck et al., "Efficient Algorithms for All-to-All Communications in Multiport Message-Passing Systems"
(1997); Thakur, Rabenseifner, Gropp (2005), section 4.3, for when which one is better.
"""

import torch

from ..group import rank_and_size, split_sizes
from .buffers import out_or_new, rows
from .point_to_point import exchange, pipelined, wait
from .rooted import gather_along, scatter_along, star


def pairwise_all_to_all(tensor, send_sizes=None, receive_sizes=None, out=None, group=None):
    """Chunk i of `tensor` to rank i, for every i; returns what arrived, in the order of ranks.

    tensor: (rows, …). send_sizes: rows for each rank, by default as torch.tensor_split cuts; receive_sizes: rows
    from each rank, by default as many as are sent to this rank from here (right where all tensors have as many
    rows). Returns (sum of receive_sizes, …). Raises ValueError where the sizes do not fit.
    In step i = 1 … n − 1 a rank sends to the rank i after it and receives from the rank i before it. Sends S minus
    its own chunk, (n − 1)/n·S where all are equal: every byte travels once.
    """
    rank, n = rank_and_size(group)
    whole = rows(tensor)
    send_sizes = split_sizes(len(whole), n) if send_sizes is None else list(send_sizes)
    receive_sizes = [send_sizes[rank]] * n if receive_sizes is None else list(receive_sizes)
    if len(send_sizes) != n or sum(send_sizes) != len(whole) or receive_sizes[rank] != send_sizes[rank]:
        raise ValueError(f"send_sizes {send_sizes}, receive_sizes {receive_sizes} do not fit {len(whole)} rows")
    out = out_or_new(out, (sum(receive_sizes), *whole.shape[1:]), like=tensor)
    leaving, arriving = whole.split(send_sizes), out.split(receive_sizes)

    def step(i):
        to, source = (rank + i) % n, (rank - i) % n
        works = exchange([(leaving[to], to)], [(arriving[source], source)], group)
        yield
        wait(works)

    arriving[rank].copy_(leaving[rank])
    pipelined(step(i) for i in range(1, n))
    return out


def naive_all_to_all(tensor, out=None, group=None):
    """As `pairwise_all_to_all` of equally long tensors: through the group's first rank, which has to hold n·S.

    Every other rank sends S; the first one sends what every rank gets, in all n·S minus its own part.
    """
    rank, n = rank_and_size(group)
    whole = rows(tensor)
    sizes = split_sizes(len(whole), n)
    gathered, dealt = gather_along(star, whole, 0, None, group), None
    if rank == 0:
        columns = gathered.view(n, *whole.shape).split(sizes, 1)  # (sender, rows for one receiver, …)
        dealt = torch.cat([column.flatten(0, 1) for column in columns])
    out = out_or_new(out, (n * sizes[rank], *whole.shape[1:]), like=tensor)
    return scatter_along(star, out, dealt, 0, [n * size for size in sizes], group)


def bruck_all_to_all(tensor, out=None, group=None):
    """As `pairwise_all_to_all` of n equal chunks, in ⌈log₂ n⌉ steps instead of n − 1: for short messages (Bruck).

    A chunk for the rank d after this one travels d's binary digits: in step i all chunks whose d has digit i move
    2^i ranks on. Sends about n/2 chunks a step, S/2·log₂ n in all. ValueError where n does not divide the rows.
    """
    rank, n = rank_and_size(group)
    whole = rows(tensor)
    if len(whole) % n:
        raise ValueError(f"bruck_all_to_all needs equal chunks: {n} ranks do not divide {len(whole)} rows")
    chunks = whole.view(n, len(whole) // n, *whole.shape[1:])
    held = chunks.roll(-rank, 0)  # held[d] is for the rank d after this one
    step = 1
    while step < n:
        moving = [d for d in range(n) if d & step]
        leaving = held[moving]
        arriving = torch.empty_like(leaving)
        wait(exchange([(leaving, (rank + step) % n)], [(arriving, (rank - step) % n)], group))
        held[moving] = arriving
        step *= 2
    # held[d] came from the rank d before this one
    result = out_or_new(out, whole.shape, like=tensor)
    result.view_as(held).copy_(held.flip(0).roll(rank + 1, 0))
    return result
