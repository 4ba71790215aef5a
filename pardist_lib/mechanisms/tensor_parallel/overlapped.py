"""The two matmuls of tensor parallelism, each with its messages under way while it goes on computing.

`column_linear` has a part of the output features on each rank, `row_linear` a part of the input features. With
`chunks` of the tokens the messages of one chunk travel while the next one is computed; and whatever the chunks, the
column's backward sends its input's gradient while it computes the weight's, which nobody else waits for. Both are for
the all-reduces. With sequence_dim each message is waited for at once (Megatron hides those, too).

n: ranks of the group; S: bytes of the whole input or output. Bytes do not depend on `chunks`.
Sources: Shoeybi et al., "Megatron-LM" (2019), section 3; Korthikanti et al. (2022), section 4.2.2, for the sequence's
own forms; Wang et al., "Overlap Communication with Dependent Computation via Decomposition" (2023), for the chunks.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..collectives.autograd import gathered, scattered_sum, wanted
from ..group import rank_and_size, split_sizes


def column_linear(x, weight, bias=None, group=None, *, chunks=1, sequence_dim=None, sizes=None, keep_gathered=True):
    """`F.linear(copy_to_group(x), weight, bias)`: this rank's output features, from an input that all ranks have.

    x: (…, in), the same on every rank; weight: (own out, in). Returns (…, own out).
    Sends nothing forward; one all-reduce of S backward, and none where x needs no gradient.

    With sequence_dim each rank has a part of x along that dimension (sizes: every rank's length there, where they
    differ): it is gathered first, an all-gather of (n − 1)/n·S; backward sends a reduce-scatter of as much. The
    gathered input is kept for backward, or with keep_gathered=False, as in Megatron, gathered again there: one
    all-gather more.
    """
    x, weight, bias = _cast(x, weight, bias)
    return _Column.apply(x, weight, bias, group, chunks, sequence_dim, sizes, keep_gathered)


def row_linear(x, weight, bias=None, group=None, *, chunks=1, sequence_dim=None):
    """`reduce_from_group(F.linear(x, weight)) + bias`: the whole output, from input features of which each has a part.

    x: (…, own in); weight: (out, own in); bias: (out), the same on every rank. Returns (…, out), the same on all.
    Sends one all-reduce of S forward; nothing backward.

    With sequence_dim each rank keeps only its part of the output along that dimension, as torch.tensor_split cuts it:
    a reduce-scatter of (n − 1)/n·S forward, an all-gather of as much backward. The bias's gradient is found from what
    was gathered, so it is whole on every rank without a message of its own.
    """
    x, weight, bias = _cast(x, weight, bias)
    return _Row.apply(x, weight, bias, group, chunks, sequence_dim)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, group, chunks, sequence_dim, sizes, keep_gathered):
        _, n = rank_and_size(group)
        ctx.group, ctx.chunks, ctx.dim, ctx.sizes = group, chunks, sequence_dim, sizes
        whole = x
        if sequence_dim is not None:
            ctx.dim = sequence_dim % x.dim()
            ctx.sizes = [x.size(ctx.dim)] * n if sizes is None else list(sizes)
            whole = gathered(x, ctx.dim, ctx.sizes, group)
        ctx.gather_again = sequence_dim is not None and not keep_gathered
        ctx.save_for_backward(x if ctx.gather_again else whole, weight)
        return F.linear(whole, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, *_ = wanted(ctx)
        grad_x = grad_weight = None
        works = []
        if for_x and ctx.dim is None:
            grad_x, works = summed_matmul(grad, weight, ctx.group, ctx.chunks)
        elif for_x:
            grad_x = scattered_sum(grad @ weight, ctx.dim, ctx.group)
        if for_weight:
            whole = gathered(x, ctx.dim, ctx.sizes, ctx.group) if ctx.gather_again else x
            grad_weight = rows(grad).t() @ rows(whole)
        grad_bias = rows(grad).sum(0) if for_bias else None
        for work in works:
            work.wait()
        return grad_x, grad_weight, grad_bias, *[None] * 5


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, group, chunks, sequence_dim):
        _, n = rank_and_size(group)
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.dim = group, None
        if sequence_dim is None:
            y, works = summed_matmul(x, weight.t(), group, chunks)
            for work in works:
                work.wait()
        else:
            ctx.dim = sequence_dim % x.dim()
            ctx.sizes = split_sizes(x.size(ctx.dim), n)
            y = scattered_sum(x @ weight.t(), ctx.dim, group)
        return y if bias is None else y.add_(bias)  # once, after the sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, *_ = wanted(ctx)
        if ctx.dim is not None:
            grad = gathered(grad, ctx.dim, ctx.sizes, ctx.group)
        grad_x = grad @ weight if for_x else None
        grad_weight = rows(grad).t() @ rows(x) if for_weight else None
        grad_bias = rows(grad).sum(0) if for_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None


def summed_matmul(x, matrix, group=None, chunks=1):
    """(x @ matrix, the works whose wait() makes it the sum over the ranks): all-reduced chunk by chunk of x's rows.

    x: (…, a); matrix: (a, b). A chunk travels while the next one is computed.
    """
    _, n = rank_and_size(group)
    tokens = rows(x)
    out = tokens.new_empty(len(tokens), matrix.size(1))
    works = []
    for part, result in zip(tokens.tensor_split(chunks), out.tensor_split(chunks), strict=True):
        torch.mm(part, matrix, out=result)
        if n > 1 and result.numel():
            works.append(dist.all_reduce(result, group=group, async_op=True))
    return out.view(*x.shape[:-1], matrix.size(1)), works


def rows(x):
    """x: (…, features) as (tokens, features)."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def _cast(*tensors):
    """As autocast would cast the arguments of F.linear, where it is on: it cannot look into what follows."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in tensors]
