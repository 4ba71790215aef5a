"""The ring: all-reduce, reduce-scatter and all-gather with the fewest bytes, each from neighbour to neighbour.

The package's docstring says what holds for all, and when another way is better.
Source: Patarasuk, Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations" (2009).
"""

from itertools import chain, cycle

import torch.distributed as dist

from ..group import rank_and_size
from .buffers import all_gather_out, check_op, combine, finish, flattened, out_or_new, pieces, rows, scratch
from .point_to_point import exchange, on_nccl, wait

# Long chunks go round in pieces of at most this size, one after the other: it bounds the memory that a ring needs
# beside the tensor, 2 to 4 pieces. Smaller ones cost time: each message takes processor time, whatever its size.
RING_PIECE_BYTES = 32 << 20


def ring_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, *, piece_bytes=RING_PIECE_BYTES):
    """The sum (or `op`) of all ranks' tensors, in place on every rank; returned.

    A reduce-scatter, then an all-gather: 2·(n − 1) steps, in each of which a rank sends one chunk to the next rank.
    Sends 2·(n − 1)/n·S where n divides the elements; else 2·S − (chunk r) − (chunk r + 1) for rank r.
    """
    rank, n = rank_and_size(group)
    check_op(op, tensor)
    with flattened(tensor) as flat:
        parts = pieces(flat.tensor_split(n), piece_bytes)
        buffers = _buffers(parts, 2)
        steps = []
        for k in range(len(parts[0])):
            steps += [_reduce_steps(k, parts, buffers, op, rank, n), _gather_steps(k, parts, rank, n)]
        _run_ring(chain.from_iterable(steps), rank, n, group)
    return tensor


def ring_reduce_scatter(tensor, op=dist.ReduceOp.SUM, out=None, group=None, *, piece_bytes=RING_PIECE_BYTES):
    """Chunk `rank` (along dimension 0) of the sum of all ranks' tensors; `tensor` stays as it is.

    tensor: (rows, …), the same shape on every rank. Returns (split_sizes(rows, n)[rank], …), in `out` if given.
    Sends S minus its own chunk, (n − 1)/n·S where n divides the rows, in n − 1 steps.
    """
    rank, n = rank_and_size(group)
    check_op(op, tensor)
    chunks = rows(tensor).tensor_split(n)
    out = out_or_new(out, chunks[rank].shape, like=tensor)
    parts = pieces(chunks, piece_bytes)
    results, buffers = out.view(-1).tensor_split(len(parts[0])), _buffers(parts, 4 if n > 2 else 2)
    if n == 1:
        out.copy_(chunks[0])
    steps = (_reduce_steps(k, parts, buffers, op, rank, n, result) for k, result in enumerate(results))
    _run_ring(chain.from_iterable(steps), rank, n, group)
    return out


def ring_all_gather(tensor, sizes=None, out=None, group=None, *, piece_bytes=RING_PIECE_BYTES):
    """All ranks' rows, in the order of ranks, on every rank.

    tensor: (rows, …); sizes: every rank's rows, where they differ. Returns (sum of sizes, …), in `out` if given.
    Rank r sends the result's bytes minus those of rank r + 1's rows, (n − 1)/n·S where all are equal, in n − 1 steps.
    """
    rank, n = rank_and_size(group)
    shards, out = all_gather_out(tensor, sizes, out, rank, n)
    if shards[rank].data_ptr() != tensor.data_ptr() or not tensor.is_contiguous():  # else it is in its place already
        shards[rank].copy_(tensor.detach().view_as(shards[rank]))
    parts = pieces(shards, piece_bytes)
    steps = (_gather_steps(k, parts, rank, n) for k in range(len(parts[0])))
    _run_ring(chain.from_iterable(steps), rank, n, group)
    return out


# ---- steps: (what leaves to rank + 1, what arrives from rank − 1, what to do then or None) --------------------


def _reduce_steps(k, parts, buffers, op, rank, n, result=None):
    """Piece k of every chunk goes once round the ring: chunk c starts at rank c + 1, visits every rank, ends at c.

    On its way each rank adds its own numbers, so what ends at rank c is complete. The sums overwrite this rank's own
    numbers; or, where the last one goes into `result`, they leave them alone.
    """
    arrivals, sums = buffers
    leaving = parts[(rank - 1) % n][k]
    for step in range(n - 1):
        own, last = parts[(rank - 2 - step) % n][k], step == n - 2
        arriving = next(arrivals)[: own.numel()]
        total = own if result is None else result if last else next(sums)[: own.numel()]

        def add_own(own=own, arriving=arriving, total=total, last=last):
            combine(op, own, arriving, out=total)
            if last:
                finish(op, total, n)

        yield leaving, arriving, add_own
        leaving = total


def _gather_steps(k, parts, rank, n):
    """Piece k of every chunk goes once round the ring: chunk c starts at rank c, and every rank keeps a copy."""
    for step in range(n - 1):
        yield parts[(rank - step) % n][k], parts[(rank - step - 1) % n][k], None


def _buffers(parts, count):
    """Where pieces arrive, in turn: two buffers, for one is being added up while another comes. And where sums go that
    must not overwrite anything: two, for the last one may still be leaving."""
    spare = scratch(parts[0][0], count, max(chunk[0].numel() for chunk in parts))
    return cycle(spare[:2]), cycle(spare[2:])


def _run_ring(steps, rank, n, group):
    """One step after the other.

    Each receive is posted one step ahead: gloo's sender waits until there is a place for its message, and a process
    that waits for its turn on a core says so late. For the same reason a step does not wait for its own message to
    be gone, only for the one before. (nccl has to start a step's sending and receiving together.)
    """
    to, source = (rank + 1) % n, (rank - 1) % n
    steps = iter(steps)
    step, receiving, sending = next(steps, None), [], []
    ahead = step is not None and not on_nccl(step[0], group)
    if ahead:
        receiving = exchange(receives=[(step[1], source)], group=group)
    while step is not None:
        (leaving, arriving, then), step = step, next(steps, None)
        sent_before, received = sending, receiving
        sending = exchange([(leaving, to)], [] if ahead else [(arriving, source)], group)
        if ahead and step is not None:
            receiving = exchange(receives=[(step[1], source)], group=group)
        wait([*received, *sent_before] if ahead else sending)
        if then:
            then()
    wait(sending)
