"""Messages between two ranks: all that the collectives of this folder are made of.

A message is a contiguous run of elements. `exchange` starts some (torch's isend and irecv), `wait` ends them;
`overlap` keeps several journeys of messages going at once, so that one piece of a tensor travels while another
is being added up. Sizes and peers follow from the arguments that all ranks share: a message carries no header
of ours, so the bytes sent are the elements' bytes and nothing else.
"""

import math
import threading
from collections import deque
from contextlib import contextmanager

import torch
import torch.distributed as dist

# Long tensors travel in pieces of at most this size. Shorter ones overlap better, but with gloo on two cores every
# message costs about 0.2 ms of processor time, whatever its size: while the main thread holds a connection to write
# to it, gloo's own thread asks for it again and again. Between machines, where a byte costs more, use less.
PIECE_BYTES = 8 << 20
DEPTH = 2  # pieces under way at a time: one travels while the other is added up

_ADD_UP = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.AVG: torch.add,  # and a division at the end
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.PRODUCT: torch.mul,
}


def exchange(sends=(), receives=(), group=None):
    """Start messages, each (tensor, peer's number within the group), without waiting; returns what to `wait` for.

    The tensors are contiguous and stay untouched until then. Empty ones are left out, here as on the other side.
    All go out as one batch: nccl starts a batch's sends and receives together, so two ranks that send to each
    other do not wait for each other.
    """
    wanted = [(dist.irecv, *message) for message in receives] + [(dist.isend, *message) for message in sends]
    wanted = [(call, tensor, peer) for call, tensor, peer in wanted if tensor.numel()]
    if not wanted:
        return []
    if _gloo_on_gpu(wanted[0][1], group):
        return _through_the_host(wanted, group)
    return dist.batch_isend_irecv([dist.P2POp(c, t, group=group, group_peer=p) for c, t, p in wanted])


def wait(works):
    for work in works:
        work.wait()


_ARRIVED = object()


def overlap(journeys, depth=DEPTH):
    """Run generators, `depth` of them at a time, each to its next `yield` in turn.

    A journey yields after it has started messages and waits for them when it is resumed; meanwhile the others
    do their arithmetic. Every rank takes the turns in the same order.
    """
    journeys, under_way = iter(journeys), deque()
    while True:
        while len(under_way) < depth and (journey := next(journeys, None)):
            under_way.append(journey)
        if not under_way:
            return
        journey = under_way.popleft()
        if next(journey, _ARRIVED) is not _ARRIVED:
            under_way.append(journey)


def relay(steps, rank, n, group=None):
    """Messages round the ring, one step after the other: (leaving, to rank + 1; arriving, from rank − 1; what to do
    then or None), whose tensors are known beforehand.

    Each receipt is asked for one step ahead: gloo's sender waits until there is a place for its message, and a process
    that waits for its turn on a core says so late. For the same reason a step does not wait for its own message to
    be gone, only for the one before. (nccl has to start a step's sending and receiving together.)
    """
    steps = iter(steps)
    step, asked, leaves = next(steps, None), [], []
    ahead = step is not None and not (step[0].is_cuda and not _gloo_on_gpu(step[0], group))
    if ahead:
        asked = exchange(receives=[(step[1], (rank - 1) % n)], group=group)
    while step is not None:
        leaving, arriving, then = step
        left, coming, step = leaves, asked, next(steps, None)
        leaves = exchange([(leaving, (rank + 1) % n)], [] if ahead else [(arriving, (rank - 1) % n)], group)
        if ahead and step is not None:
            asked = exchange(receives=[(step[1], (rank - 1) % n)], group=group)
        wait([*coming, *left] if ahead else leaves)
        if then:
            then()
    wait(leaves)


# ---- a tensor, its rows, its pieces ---------------------------------------------------------------------------


@contextmanager
def flat(tensor):
    """The elements of `tensor` in one contiguous line, written back at the end where that had to be a copy."""
    data = tensor.detach()
    line = data.contiguous().view(-1)
    yield line
    if line.data_ptr() != data.data_ptr():
        data.copy_(line.view_as(data))


def rows(tensor):
    """`tensor` as contiguous rows along dimension 0; a single number is one row."""
    tensor = tensor.detach().contiguous()
    return tensor.view(1) if tensor.dim() == 0 else tensor


def sizes_of_all(sizes, mine, rank, n):
    """Check the caller's list of every rank's rows; without one, all ranks have as many as this one."""
    sizes = [mine] * n if sizes is None else list(sizes)
    if len(sizes) != n or sizes[rank] != mine:
        raise ValueError(f"sizes {sizes} do not fit: {n} ranks, of which rank {rank} has {mine} rows")
    return sizes


def place_for(out, shape, like):
    """`out` (checked), or a new tensor of this shape, where the caller gave none."""
    if out is None:
        return like.new_empty(shape)
    if out.shape != torch.Size(shape) or out.dtype != like.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous {like.dtype} tensor of shape {list(shape)}, not {out.dtype} {list(out.shape)}"
        )
    return out.detach()


def room_for_all(tensor, sizes, out, rank, n):
    """(every rank's place in an all-gather's result, the result)"""
    shard = rows(tensor)
    sizes = sizes_of_all(sizes, len(shard), rank, n)
    out = place_for(out, (sum(sizes), *shard.shape[1:]), like=tensor)
    return out.split(sizes), out


def pieces(chunks, piece_bytes=PIECE_BYTES):
    """Cut every chunk into the same number of flat pieces, the largest about `piece_bytes`: [chunk][piece]."""
    largest = max(chunk.numel() * chunk.element_size() for chunk in chunks)
    count = max(1, -(-largest // piece_bytes))
    return [chunk.view(-1).tensor_split(count) for chunk in chunks]


def scratch(like, *shape):
    """Uninitialised memory for one collective, of the type of `like`; kept for the next one of the same thread.

    A new buffer of 8 MB takes the kernel 2,000 page faults to fill: a tenth of the time of a 16 MB all-reduce here.
    (nccl keeps its buffers, too. On a GPU torch's allocator already does, stream by stream.)
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    size = math.prod(shape) * like.element_size()
    if _kept.memory.numel() < size:
        _kept.memory = torch.empty(size, dtype=torch.uint8)
    return _kept.memory[:size].view(like.dtype).view(shape)


class _Kept(threading.local):
    memory = torch.empty(0, dtype=torch.uint8)


_kept = _Kept()

# ---- adding up ------------------------------------------------------------------------------------------------


def check_op(op, tensor):
    """Raises ValueError for an operation that these collectives do not have, or not for this dtype."""
    if op not in _ADD_UP:
        raise ValueError(f"{op} is not one of SUM, AVG, MAX, MIN, PRODUCT")
    if op == dist.ReduceOp.AVG and not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"AVG of {tensor.dtype} is not a {tensor.dtype}: use SUM and divide, or floating point")


def combine(op, a, b, out):
    """Two ranks' numbers into one, elementwise; returns `out`, which may be a or b."""
    return _ADD_UP[op](a, b, out=out)


def finish(op, total, n):
    """The sum of n ranks into their mean, in place, where the operation is AVG."""
    if op == dist.ReduceOp.AVG:
        total.div_(n)


# ---- ranks that share one GPU ---------------------------------------------------------------------------------


def _gloo_on_gpu(tensor, group):
    return tensor.is_cuda and "cuda:gloo" in dist.get_backend_config(group)


def _through_the_host(wanted, group):
    """gloo's sends and receives know only the host's memory: each message passes through a copy there."""
    works = []
    for call, tensor, peer in wanted:
        host = tensor.cpu() if call is dist.isend else torch.empty_like(tensor, device="cpu")
        work = dist.batch_isend_irecv([dist.P2POp(call, host, group=group, group_peer=peer)])[0]
        works.append(work if call is dist.isend else _Landing(work, host, tensor))
    return works


class _Landing:
    """A receipt in the host's memory, copied to where it belongs once it has arrived."""

    def __init__(self, work, host, tensor):
        self.work, self.host, self.tensor = work, host, tensor

    def wait(self):
        self.work.wait()
        self.tensor.copy_(self.host)
