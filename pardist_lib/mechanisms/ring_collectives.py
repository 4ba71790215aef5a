"""The ring: all-reduce, reduce-scatter and all-gather with the fewest bytes, each from neighbour to neighbour.

collectives.py says what holds for all collectives of this folder, and when another way is better.
Source: Patarasuk, Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations" (2009).
"""

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
    wait,
)
from .rooted_collectives import SUM


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
    if shards[rank].data_ptr() != tensor.data_ptr() or not tensor.is_contiguous():  # else it is in its place already
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
