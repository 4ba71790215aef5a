"""Collectives that know their own backward: what the layers of tensor and sequence parallelism are joined with.

Each comes with a conjugate, and the backward of the one is the forward of the other:

    copy_to_group            nothing forward          all-reduce backward        "f" of tensor parallelism
    reduce_from_group        all-reduce forward       nothing backward           "g" of 2019, "f̄" of 2022
    scatter_to_group         own slice forward        all-gather backward
    gather_from_group        all-gather forward       own slice backward
    all_gather_from_group    all-gather forward       reduce-scatter backward    "g" of sequence parallelism
    reduce_scatter_to_group  reduce-scatter forward   all-gather backward        "ḡ"
    all_to_all_in_group      all-to-all forward       all-to-all backward        its own conjugate, sizes exchanged

The letters are those in the figures of Megatron's papers. Its functions are called copy_to_tensor_model_parallel_region
and so on, the last two gather_from_ and reduce_scatter_to_sequence_parallel_region. torch's own gathers with a backward
(torch.distributed.nn, all_gather_tensor_autograd) are `all_gather_from_group`.

Which one is right depends on what the ranks do next. `copy_to_group` and `all_gather_from_group` are for ranks that
go on to *different* work with the same tensor: each finds a part of its gradient, and the parts are added.
`gather_from_group` is for ranks that all go on to the *same* work: each finds the whole gradient by itself, and adding
would count it n times.

n: ranks of the group; S: bytes of the whole tensor. A tensor is cut along `dim` as torch.tensor_split cuts, so n need
not divide it. `group`: a process group, None for all ranks; ValueError outside it. Inputs stay as they are.
all-reduce is torch.distributed's. All-gather and reduce-scatter are those of ring.py, or nccl's own where
the sizes are equal; either way a rank sends (n − 1)/n·S. With one rank nothing is sent.

Sources: Shoeybi et al., "Megatron-LM" (2019), section 3; Korthikanti et al., "Reducing Activation Recomputation in
Large Transformer Models" (2022), section 4.2.2.
"""

import torch
import torch.distributed as dist

from ..group import rank_and_size, split_sizes
from .point_to_point import on_nccl
from .ring import ring_all_gather, ring_reduce_scatter


def copy_to_group(x, group=None):
    """`x` itself, whose gradient is the sum of what the ranks find: goes before layers that each rank has a part of.

    x: any shape, the same on every rank. Sends nothing forward; one all-reduce of S backward.
    """
    rank_and_size(group)
    return _Copy.apply(x, group)


def reduce_from_group(x, group=None):
    """The sum of all ranks' `x`, on every rank: goes after layers whose outputs are summands.

    x: any shape, the same on every rank. Sends one all-reduce of S forward; nothing backward.
    """
    rank_and_size(group)
    return _Reduce.apply(x, group)


def scatter_to_group(x, dim=-1, group=None):
    """This rank's slice of `x` along `dim`; the ranks' slices put together are the gradient of `x`.

    x: any shape, the same on every rank. Returns `x.tensor_split(n, dim)[rank]`, in memory of its own.
    Sends nothing forward; one all-gather backward, (n − 1)/n·S.
    """
    rank_and_size(group)
    return _Scatter.apply(x, _dimension(x, dim), group)


def gather_from_group(x, dim=-1, group=None, sizes=None):
    """All ranks' `x` put together along `dim`, for ranks that all go on to the same work with it.

    x: the same shape on every rank but along `dim`; sizes: every rank's length there, where they differ.
    Raises ValueError where sizes do not fit. Sends one all-gather forward, (n − 1)/n·S; nothing backward: a rank's
    gradient is its slice of the whole one, which every rank finds by itself.
    """
    dim = _dimension(x, dim)
    return _Gather.apply(x, dim, group, _lengths(x, dim, group, sizes))


def all_gather_from_group(x, dim=0, group=None, sizes=None):
    """All ranks' `x` put together along `dim`, for ranks that go on to different work with it.

    As `gather_from_group`, but each rank finds only a part of the whole one's gradient: backward adds the parts up
    and leaves each rank its slice, a reduce-scatter of (n − 1)/n·S. Raises ValueError where sizes are not what
    torch.tensor_split would cut.
    """
    dim = _dimension(x, dim)
    sizes = _lengths(x, dim, group, sizes)
    cut = split_sizes(sum(sizes), len(sizes))
    if sizes != cut:
        raise ValueError(
            f"all_gather_from_group's backward deals out slices as torch.tensor_split cuts them, {cut} along dimension "
            f"{dim}, not {sizes}"
        )
    return _AllGather.apply(x, dim, group, sizes)


def reduce_scatter_to_group(x, dim=0, group=None):
    """This rank's slice along `dim` of the sum of all ranks' `x`.

    x: any shape, the same on every rank. Returns a tensor of the shape of `x.tensor_split(n, dim)[rank]`.
    Sends one reduce-scatter forward and one all-gather backward, (n − 1)/n·S each.
    """
    rank_and_size(group)
    return _ReduceScatter.apply(x, _dimension(x, dim), group)


def all_to_all_in_group(x, send_sizes, receive_sizes, group=None):
    """The first send_sizes[0] rows of `x` to rank 0, the next send_sizes[1] to rank 1, and so on; returns what arrives,
    in the order of ranks. Backward takes every row's gradient back to where the row came from.

    x: (sum of send_sizes, …), the same on every rank but for the rows; receive_sizes[r]: what rank r sends to this one.
    Returns (sum of receive_sizes, …). Raises ValueError where the sizes do not fit. Sends x minus the rows for this
    rank, and backward as many bytes as it has received: one call each, on every rank, also with no rows at all.
    """
    rank, n = rank_and_size(group)
    send_sizes, receive_sizes = list(send_sizes), list(receive_sizes)
    fits = len(send_sizes) == len(receive_sizes) == n and send_sizes[rank] == receive_sizes[rank]
    if not fits or sum(send_sizes) != len(x) or min(send_sizes + receive_sizes) < 0:
        raise ValueError(
            f"rank {rank}: send_sizes {send_sizes} and receive_sizes {receive_sizes} do not fit {n} ranks and "
            f"{len(x)} rows: one size for each rank, the same in both for this rank itself, {len(x)} sent in all"
        )
    return _AllToAll.apply(x, send_sizes, receive_sizes, group)


def wanted(ctx):
    """Which inputs of a torch.autograd.Function need a gradient in *this* backward: [bool of each], for its backward.

    ctx.needs_input_grad says what was so in forward. A backward that is asked for some gradients only
    (torch.autograd.grad, or `inputs=`; the two halves of a pipeline's backward) may need fewer.
    """
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # one for each that needed it in forward
    return [needed and _reached(next(nodes)) for needed in ctx.needs_input_grad]


def _reached(node):
    try:
        return torch._C._will_engine_execute_node(node)  # as torch.autograd.graph does, too
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return True


# ---- forward and backward -------------------------------------------------------------------------------------


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _Reduce.apply(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return sum_of(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _Copy.apply(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        rank, n = rank_and_size(group)
        ctx.dim, ctx.group, ctx.sizes = dim, group, split_sizes(x.size(dim), n)
        return x.tensor_split(n, dim)[rank].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, ctx.dim, ctx.group, ctx.sizes), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group, sizes):
        ctx.dim, ctx.sizes, ctx.rank = dim, sizes, rank_and_size(group)[0]
        return gathered(x, dim, sizes, group)

    @staticmethod
    def backward(ctx, grad):
        return grad.split(ctx.sizes, ctx.dim)[ctx.rank], None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group, sizes):
        ctx.dim, ctx.group = dim, group
        return gathered(x, dim, sizes, group)

    @staticmethod
    def backward(ctx, grad):
        return _ReduceScatter.apply(grad, ctx.dim, ctx.group), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group, ctx.sizes = dim, group, split_sizes(x.size(dim), rank_and_size(group)[1])
        return scattered_sum(x, dim, group)

    @staticmethod
    def backward(ctx, grad):
        return _AllGather.apply(grad, ctx.dim, ctx.group, ctx.sizes), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send_sizes, receive_sizes, group):
        ctx.sizes, ctx.group = (send_sizes, receive_sizes), group
        if len(send_sizes) == 1:
            return x.clone(memory_format=torch.contiguous_format)
        arrived = x.new_empty((sum(receive_sizes), *x.shape[1:]))
        dist.all_to_all_single(arrived, x.contiguous(), receive_sizes, send_sizes, group)
        return arrived

    @staticmethod
    def backward(ctx, grad):
        sent, received = ctx.sizes
        return _AllToAll.apply(grad, received, sent, ctx.group), None, None, None


# ---- the messages, without autograd ---------------------------------------------------------------------------


def sum_of(x, group=None):
    """The sum of all ranks' `x`, as a new tensor."""
    total = x.clone(memory_format=torch.contiguous_format)
    if rank_and_size(group)[1] > 1:
        dist.all_reduce(total, group=group)
    return total


def gathered(x, dim, sizes, group=None):
    """All ranks' `x` along `dim`, as a new tensor; sizes: every rank's length there."""
    if len(sizes) == 1:
        return x.clone(memory_format=torch.contiguous_format)
    shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
    counts = [torch.Size(shape).numel() for shape in shapes]
    flat = x.contiguous().view(-1)
    if on_nccl(x, group) and len(set(sizes)) == 1:
        whole = flat.new_empty(sum(counts))
        dist.all_gather_into_tensor(whole, flat, group=group)
    else:
        whole = ring_all_gather(flat, counts, group=group)
    if dim == 0 or torch.Size(x.shape[:dim]).numel() == 1:  # the slices lie one after the other already
        return whole.view(*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :])
    parts = whole.split(counts)
    return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim)


def scattered_sum(x, dim, group=None):
    """This rank's slice along `dim` of the sum of all ranks' `x`, as a new tensor."""
    _, n = rank_and_size(group)
    if n == 1:
        return x.clone(memory_format=torch.contiguous_format)
    first = x.movedim(dim, 0).contiguous()
    if on_nccl(x, group) and x.size(dim) % n == 0:
        slice_ = first.new_empty((x.size(dim) // n, *first.shape[1:]))
        dist.reduce_scatter_tensor(slice_, first, group=group)
    else:
        slice_ = ring_reduce_scatter(first, group=group)
    return slice_.movedim(0, dim).contiguous()


# ---- arguments ------------------------------------------------------------------------------------------------


def _dimension(x, dim):
    """`dim` counted from the front. Raises ValueError where x has no such dimension."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"a tensor of shape {list(x.shape)} has no dimension {dim} to be cut or put together along")
    return dim % x.dim()


def _lengths(x, dim, group, sizes):
    """Every rank's length along `dim`: the caller's list, checked, or this rank's own for all."""
    rank, n = rank_and_size(group)
    sizes = [x.size(dim)] * n if sizes is None else list(sizes)
    if len(sizes) != n or sizes[rank] != x.size(dim):
        raise ValueError(
            f"sizes {sizes} do not fit: {n} ranks, of which rank {rank} has {x.size(dim)} along dimension {dim} "
            f"of {list(x.shape)}"
        )
    return sizes
