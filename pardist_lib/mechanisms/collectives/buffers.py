"""Tensors as messages need them: flat, in rows, in pieces; where results go; how two ranks' numbers are combined."""

import math
import threading
from contextlib import contextmanager

import torch
import torch.distributed as dist

# ---- a tensor, its rows, its pieces ---------------------------------------------------------------------------


@contextmanager
def flattened(tensor):
    """The elements of `tensor` as one contiguous vector, written back at the end where that had to be a copy."""
    data = tensor.detach()
    flat = data.contiguous().view(-1)
    yield flat
    if flat.data_ptr() != data.data_ptr():
        data.copy_(flat.view_as(data))


def rows(tensor):
    """`tensor` as contiguous rows along dimension 0; a single number is one row."""
    tensor = tensor.detach().contiguous()
    return tensor.view(1) if tensor.dim() == 0 else tensor


def pieces(chunks, piece_bytes):
    """Cut every chunk into the same number of flat pieces, the largest about `piece_bytes`: [chunk][piece]."""
    largest = max(chunk.numel() * chunk.element_size() for chunk in chunks)
    count = max(1, -(-largest // piece_bytes))
    return [chunk.view(-1).tensor_split(count) for chunk in chunks]


# ---- where results go -----------------------------------------------------------------------------------------


def out_or_new(out, shape, like):
    """The caller's `out`, or a new tensor of this shape where there is none. Raises ValueError where out does not fit.

    like: a tensor of the result's dtype and device.
    """
    if out is None:
        return like.new_empty(shape)
    if out.shape != torch.Size(shape) or out.dtype != like.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous {like.dtype} tensor of shape {list(shape)}, not {out.dtype} {list(out.shape)}"
        )
    return out.detach()


def all_gather_out(tensor, sizes, out, rank, n):
    """(every rank's rows in an all-gather's result, the result), from this rank's `tensor` and the caller's `out`."""
    shard = rows(tensor)
    sizes = checked_sizes(sizes, len(shard), rank, n)
    out = out_or_new(out, (sum(sizes), *shard.shape[1:]), like=tensor)
    return out.split(sizes), out


def checked_sizes(sizes, mine, rank, n):
    """The caller's list of every rank's rows; without one, all ranks have `mine`, as this one. Raises ValueError where
    it does not fit."""
    sizes = [mine] * n if sizes is None else list(sizes)
    if len(sizes) != n or sizes[rank] != mine:
        raise ValueError(f"sizes {sizes} do not fit: {n} ranks, of which rank {rank} has {mine} rows")
    return sizes


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

# ---- reduction operations -------------------------------------------------------------------------------------

_COMBINE = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.AVG: torch.add,  # and a division at the end
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.PRODUCT: torch.mul,
}


def combine(op, a, b, out):
    """Two ranks' numbers into one, elementwise; returns `out`, which may be a or b."""
    return _COMBINE[op](a, b, out=out)


def finish(op, total, n):
    """The sum of n ranks into their mean, in place, where the operation is AVG."""
    if op == dist.ReduceOp.AVG:
        total.div_(n)


def check_op(op, tensor):
    """Raises ValueError for an operation that these collectives do not have, or not for this dtype."""
    if op not in _COMBINE:
        raise ValueError(f"{op} is not one of SUM, AVG, MAX, MIN, PRODUCT")
    if op == dist.ReduceOp.AVG and not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"AVG of {tensor.dtype} is not a {tensor.dtype}: use SUM and divide, or floating point")
