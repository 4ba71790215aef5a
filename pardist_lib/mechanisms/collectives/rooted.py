"""Collectives with a root: broadcast, reduce, gather and scatter from send and receive.

Who talks to whom is a tree with the root on top; its shape is all that tells the variants apart:

    naive     a star: the root talks to everybody          one step, but everything crosses the root's link
    tree      binomial: whoever has it helps to spread it  ⌈log₂ n⌉ steps: good for short messages
    chain     a line: each rank passes pieces on           each rank sends S at most once: good for long messages

`src` and `dst` are global ranks, as torch's are, also in a subgroup. n: ranks of the group; S: bytes of the tensor.
Every function raises ValueError on a rank outside the group, and where the root is not in the group.

Sources: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (2005),
section 4; Träff, Ripke, "Optimal Broadcast for Fully Connected Processor-Node Networks" (2008) for pieces in a line.
"""

import torch
import torch.distributed as dist

from ..group import rank_and_size, within
from .buffers import check_op, checked_sizes, combine, finish, flattened, pieces, rows
from .point_to_point import PIECE_BYTES, exchange, pipelined, wait

# ---- the trees: who is above and who is below `seat`, counted from the root's seat 0 --------------------------


def star(seat, n):
    return (None, list(range(1, n))) if seat == 0 else (0, [])


def chain(seat, n):
    return seat - 1 if seat else None, [seat + 1] if seat + 1 < n else []


def binomial(seat, n):
    """A seat's parent lacks the seat's lowest set bit; its children have one lower bit more."""
    low = seat & -seat or 1 << (n - 1).bit_length()
    steps = [1 << bit for bit in range(low.bit_length() - 1)]
    return seat - low if seat else None, [seat + step for step in steps if seat + step < n]


def branch(tree, seat, n):
    """How many seats a star's or a binomial tree's branch has: `seat` itself and those that follow it."""
    if seat == 0:
        return n
    return 1 if tree is star else min(seat & -seat, n - seat)


def neighbours(tree, rank, root, n):
    """(parent or None, children) of `rank` in a tree with `root` on top, as numbers within the group."""
    parent, children = tree((rank - root) % n, n)
    return parent if parent is None else (parent + root) % n, [(child + root) % n for child in children]


# ---- broadcast ------------------------------------------------------------------------------------------------


def naive_broadcast(tensor, src=0, group=None, *, piece_bytes=PIECE_BYTES):
    """`tensor` of rank `src` to every rank; in place and returned.

    The root sends (n − 1)·S in n − 1 messages a piece, the others nothing.
    """
    return broadcast_along(star, tensor, within(group, src), group, piece_bytes)


def chain_broadcast(tensor, src=0, group=None, *, piece_bytes=PIECE_BYTES):
    """As `naive_broadcast`, from each rank to the next, piece by piece.

    Every rank but the last sends S. With p pieces the last one arrives after n − 2 + p steps of S/p: about the time
    of one S however many ranks, where the pieces are many. The step's latency counts n − 2 + p times.
    """
    return broadcast_along(chain, tensor, within(group, src), group, piece_bytes)


def tree_broadcast(tensor, src=0, group=None, *, piece_bytes=PIECE_BYTES):
    """As `naive_broadcast`, in ⌈log₂ n⌉ steps: in each one all ranks that have the tensor send it on.

    The root sends ⌈log₂ n⌉·S, a rank with c children c·S, a leaf nothing; all ranks together (n − 1)·S.
    """
    return broadcast_along(binomial, tensor, within(group, src), group, piece_bytes)


def broadcast_along(tree, tensor, root, group, piece_bytes=PIECE_BYTES):
    rank, n = rank_and_size(group)
    parent, children = neighbours(tree, rank, root, n)

    def pass_on(piece):
        if parent is not None:
            arriving = exchange(receives=[(piece, parent)], group=group)
            yield
            wait(arriving)
        leaving = exchange(sends=[(piece, child) for child in reversed(children)], group=group)  # largest branch first
        yield
        wait(leaving)

    with flattened(tensor) as flat:
        pipelined(pass_on(piece) for piece in pieces([flat], piece_bytes)[0])
    return tensor


# ---- reduce ---------------------------------------------------------------------------------------------------


def naive_reduce(tensor, dst=0, op=dist.ReduceOp.SUM, group=None, *, piece_bytes=PIECE_BYTES):
    """The sum (or `op`) of all ranks' tensors, in place on rank `dst`; returned. Elsewhere nothing changes.

    Every rank but the root sends S; the root receives (n − 1)·S and does all the additions.
    """
    return reduce_along(star, tensor, within(group, dst), op, group, piece_bytes)


def tree_reduce(tensor, dst=0, op=dist.ReduceOp.SUM, group=None, *, piece_bytes=PIECE_BYTES):
    """As `naive_reduce`, in ⌈log₂ n⌉ steps: a rank adds what its children send and passes the sum up.

    Every rank but the root sends S; the root receives ⌈log₂ n⌉·S.
    """
    return reduce_along(binomial, tensor, within(group, dst), op, group, piece_bytes)


def reduce_along(tree, tensor, root, op, group, piece_bytes=PIECE_BYTES):
    rank, n = rank_and_size(group)
    check_op(op, tensor)
    parent, children = neighbours(tree, rank, root, n)

    def add_up(piece):
        theirs = [torch.empty_like(piece) for _ in children]
        arriving = exchange(receives=list(zip(theirs, children, strict=True)), group=group)
        yield
        wait(arriving)
        total = piece
        for part in theirs:
            total = combine(op, total, part, out=piece if parent is None else theirs[0])
        if parent is None:
            finish(op, piece, n)
            return
        leaving = exchange(sends=[(total, parent)], group=group)
        yield
        wait(leaving)

    with flattened(tensor) as flat:
        pipelined(add_up(piece) for piece in pieces([flat], piece_bytes)[0])
    return tensor


# ---- gather ---------------------------------------------------------------------------------------------------


def naive_gather(tensor, dst=0, sizes=None, group=None):
    """All ranks' rows, in the order of ranks, on rank `dst`; None elsewhere.

    tensor: (rows, …); sizes: every rank's rows, where they differ. Returns (sum of sizes, …).
    Every rank but the root sends its own rows, as one message; the root receives n − 1.
    """
    return gather_along(star, tensor, within(group, dst), sizes, group)


def tree_gather(tensor, dst=0, sizes=None, group=None):
    """As `naive_gather`, in ⌈log₂ n⌉ steps: a rank collects its branch and sends it on as one message.

    A rank sends its own rows and those of all ranks below it: rows may travel ⌈log₂ n⌉ times.
    The root receives ⌈log₂ n⌉ messages instead of n − 1, with the same bytes in all.
    """
    return gather_along(binomial, tensor, within(group, dst), sizes, group)


def gather_along(tree, tensor, root, sizes, group):
    rank, n = rank_and_size(group)
    shard = rows(tensor)
    sizes = checked_sizes(sizes, len(shard), rank, n)
    parent, children = neighbours(tree, rank, root, n)
    parts = cut_branch(tree, rank, root, sizes)
    held = shard.new_empty((sum(parts), *shard.shape[1:])) if children else shard
    own, *theirs = held.split(parts)
    own.copy_(shard)
    wait(exchange(receives=list(zip(theirs, children, strict=True)), group=group))
    if parent is None:
        return roll(held, sum(sizes[:root]))
    wait(exchange(sends=[(held, parent)], group=group))


def cut_branch(tree, rank, root, sizes):
    """Rows in the parts of a rank's branch, in the order of seats: its own, then its children's branches."""
    n, seat = len(sizes), (rank - root) % len(sizes)
    counts = sizes[root:] + sizes[:root]
    _, children = tree(seat, n)
    return [counts[seat]] + [sum(counts[c : c + branch(tree, c, n)]) for c in children]


def roll(held, first):
    """Rows in the order of seats, from the root on, into the order of ranks: the last `first` rows come first."""
    return torch.cat([held[len(held) - first :], held[: len(held) - first]]) if 0 < first < len(held) else held


# ---- scatter --------------------------------------------------------------------------------------------------


def naive_scatter(tensor, whole=None, src=0, sizes=None, group=None):
    """Deal out the rows of `whole`, which rank `src` has: each rank's rows into its `tensor`, which is returned.

    tensor: (rows, …); whole: (sum of sizes, …), on `src` only; sizes: every rank's rows, where they differ
    (`split_sizes(len(whole), n)` cuts as torch.tensor_split does). Raises ValueError where whole does not fit.
    The root sends S minus its own rows in n − 1 messages, the others nothing.
    """
    return scatter_along(star, tensor, whole, within(group, src), sizes, group)


def tree_scatter(tensor, whole=None, src=0, sizes=None, group=None):
    """As `naive_scatter`, in ⌈log₂ n⌉ steps: a rank receives its whole branch's rows and passes on the others'.

    The root sends the same bytes in ⌈log₂ n⌉ messages, a rank below it the rows of all ranks below itself.
    """
    return scatter_along(binomial, tensor, whole, within(group, src), sizes, group)


def scatter_along(tree, tensor, whole, root, sizes, group):
    rank, n = rank_and_size(group)
    shard = rows(tensor)
    sizes = checked_sizes(sizes, len(shard), rank, n)
    parent, children = neighbours(tree, rank, root, n)
    parts = cut_branch(tree, rank, root, sizes)
    shape = (sum(parts), *shard.shape[1:])
    if parent is None:
        if whole is None or whole.shape != shape or whole.dtype != shard.dtype:
            given = None if whole is None else f"{whole.dtype} {list(whole.shape)}"
            raise ValueError(f"the root needs the whole tensor, {shard.dtype} {list(shape)}, to scatter; got {given}")
        held = roll(rows(whole), sum(sizes[root:]))
    else:
        held = shard.new_empty(shape)
        wait(exchange(receives=[(held, parent)], group=group))
    own, *theirs = held.split(parts)
    leaving = exchange(sends=list(zip(theirs, children, strict=True))[::-1], group=group)
    tensor.detach().copy_(own.view(tensor.shape))
    wait(leaving)
    return tensor
