"""One two-dimensional convolution on several ranks, cut along each of the dimensions it has.

x is (batch, in, height, width), weight (out, in, kernel height, kernel width), the result (batch, out, …); n ranks.

                     a rank holds                      and finds                 sent forward
    by out channels  all of x, some filters            its output channels       nothing
    by in channels   some channels of x and of all     a summand of everything   one all-reduce of the result
                     filters
    by batch         some images, all of weight        its images                nothing
    by height        some rows of every image, all of  its rows                  the halo: rows of x that a neighbour
                     weight                                                      has and this rank's filter reaches

The first two are `split_matmul`'s columns and inner dimension: a convolution is a matrix product over channels.
Everything is differentiable; what a rank gives to backward is the gradient of what the function returned to it.
stride, padding, dilation: as torch's conv2d takes them. group: a process group, None for all ranks.

Sources for height: Jin, Ginsburg, Keutzer, "Spatially Parallel Convolutions" (2018); Dryden et al., "Improving
Strong-Scaling of CNN Training by Exploiting Finer-Grained Parallelism" (2019).
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..collectives.autograd import copy_to_group, gather_from_group, reduce_from_group
from ..collectives.buffers import checked_sizes
from ..collectives.point_to_point import exchange, wait
from ..group import rank_and_size, split_sizes


def conv2d_by_output_channels(
    x, weight, bias=None, stride=1, padding=0, dilation=1, group=None, *, gather=False, sizes=None
):
    """This rank's output channels of conv2d, from all of x and its filters; with `gather`, all channels.

    x: (batch, in, height, width), the same on every rank; weight: (this rank's filters, in, …); bias: its filters'.
    sizes: every rank's filters, where they differ. Raises ValueError where shapes do not fit.
    Forward sends nothing, with `gather` (n − 1)/n of the result's bytes; backward one all-reduce of x's.
    """
    _check_filter("conv2d_by_output_channels", x, weight)
    y = F.conv2d(copy_to_group(x, group), weight, bias, stride, padding, dilation)
    return gather_from_group(y, 1, group, sizes) if gather else y


def conv2d_by_input_channels(x, weight, bias=None, stride=1, padding=0, dilation=1, group=None):
    """All of conv2d, from this rank's channels of x and of every filter: a sum over the ranks.

    x: (batch, this rank's channels, height, width); weight: (out, this rank's channels, …); bias: (out,), the same on
    every rank, added once, after the sum. Raises ValueError where shapes do not fit.
    Forward sends one all-reduce of the result's bytes, backward nothing.
    """
    _check_filter("conv2d_by_input_channels", x, weight)
    y = reduce_from_group(F.conv2d(x, weight, None, stride, padding, dilation), group)
    return y if bias is None else y + bias.view(-1, 1, 1)


def conv2d_by_batch(x, weight, bias=None, stride=1, padding=0, dilation=1, group=None, *, gather=False, sizes=None):
    """This rank's images of conv2d, from its images and all of weight; with `gather`, all images.

    x: (this rank's images, in, height, width); weight, bias: whole, the same on every rank. sizes: every rank's
    images, where they differ. Raises ValueError where shapes do not fit.
    Forward sends nothing, with `gather` (n − 1)/n of the result's bytes; backward one all-reduce of weight's bytes
    and one of bias's.
    """
    _check_filter("conv2d_by_batch", x, weight)
    weight, bias = copy_to_group(weight, group), bias if bias is None else copy_to_group(bias, group)
    y = F.conv2d(x, weight, bias, stride, padding, dilation)
    return gather_from_group(y, 0, group, sizes) if gather else y


def conv2d_by_height(x, weight, bias=None, stride=1, padding=0, dilation=1, group=None, *, heights=None, gather=False):
    """This rank's rows of conv2d, from its rows of every image and all of weight; with `gather`, all rows.

    x: (batch, in, this rank's rows, width); weight, bias: whole, the same on every rank. heights: every rank's rows
    of x, where they differ. The rows of the result are dealt out as torch.tensor_split cuts them, so that the next
    convolution can go on; a rank may have no row, and a filter may reach beyond the neighbour into the next rank.
    Raises ValueError where shapes do not fit, or where the filter is taller than the image.
    Forward sends the halo: those of this rank's rows that others need, see `halo_plan`; with `gather`, (n − 1)/n of
    the result's bytes more. Backward sends the halo's gradient the other way, and an all-reduce of weight and bias.
    """
    _check_filter("conv2d_by_height", x, weight)
    rank, n = rank_and_size(group)
    heights = checked_sizes(heights, x.shape[2], rank, n)
    stride, dilation = _pair(stride), _pair(dilation)
    top, bottom, left, right = _margins(padding, weight, stride, dilation)
    plan = halo_plan(heights, weight.shape[2], stride[0], (top, bottom), dilation[0])
    mine, made = plan[rank], [rows.result.stop - rows.result.start for rows in plan]
    weight, bias = copy_to_group(weight, group), bias if bias is None else copy_to_group(bias, group)

    reached = F.pad(_Halo.apply(x, plan, heights, group), (left, right, mine.above, mine.below))
    if made[rank]:
        y = F.conv2d(reached, weight, bias, stride, 0, dilation)
    else:  # nothing to compute, but the others count on this rank in backward: the result hangs on all it would need
        wide = (reached.shape[3] - dilation[1] * (weight.shape[3] - 1) - 1) // stride[1] + 1
        nothing = sum(t.flatten()[:0] for t in (reached, weight, bias) if t is not None)
        y = nothing.view(x.shape[0], weight.shape[0], 0, wide)
    return gather_from_group(y, 2, group, made) if gather else y


# ---- the halo -------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What one rank computes and needs, in rows of the whole image."""

    result: slice  # its rows of the result
    reach: slice  # the rows of x that its filter reaches, its own and its halo
    above: int  # rows of zeros that the padding adds to them
    below: int


def halo_plan(heights, kernel, stride=1, padding=0, dilation=1):
    """Which rows every rank computes and needs: a list of `Rows`.

    heights: every rank's rows of x; kernel: the filter's height; padding: rows of zeros above and below, or a pair.
    Raises ValueError where the filter is taller than the padded image.
    """
    (top, bottom), whole, reach = _pair(padding), sum(heights), dilation * (kernel - 1) + 1
    made = (whole + top + bottom - reach) // stride + 1
    if made < 1:
        raise ValueError(
            f"conv2d_by_height: a filter that reaches over {reach} rows is too tall for {whole} rows and padding "
            f"({top}, {bottom})"
        )
    plan, ends = [], list(accumulate(split_sizes(made, len(heights))))
    for first, last in zip([0, *ends], ends, strict=False):
        low, high = first * stride - top, (last - 1) * stride - top + reach
        if first == last:
            low = high = 0
        inside = slice(min(max(low, 0), whole), max(min(high, whole), 0))
        inside = slice(inside.start, max(inside.start, inside.stop))
        above = max(0, min(-low, high - low))
        plan.append(Rows(slice(first, last), inside, above, high - low - above - (inside.stop - inside.start)))
    return plan


def crossings(plan, heights, rank):
    """(its own rows, [(peer, rows it lends to the peer or None, rows it borrows or None)]), in rows of the image."""
    ends = list(accumulate(heights))
    own = [slice(end - height, end) for end, height in zip(ends, heights, strict=True)]
    peers = [peer for peer in range(len(heights)) if peer != rank]
    pairs = [(p, _common(own[rank], plan[p].reach), _common(own[p], plan[rank].reach)) for p in peers]
    return own[rank], [(p, lent, borrowed) for p, lent, borrowed in pairs if lent or borrowed]


def _common(a, b):
    """The rows that two slices share, None where there are none."""
    first, last = max(a.start, b.start), min(a.stop, b.stop)
    return slice(first, last) if first < last else None


def _counted_from(rows, start):
    """The same rows, counted from row `start`."""
    return slice(rows.start - start, rows.stop - start)


class _Halo(torch.autograd.Function):
    """This rank's rows and its halo. Backward gives the halo's gradient back to the ranks it came from."""

    @staticmethod
    def forward(ctx, x, plan, heights, group):
        rank, _ = rank_and_size(group)
        ctx.how, ctx.shape = (plan, heights, group, rank), x.shape
        own, peers = crossings(plan, heights, rank)
        reach = plan[rank].reach
        held = x.new_empty(*x.shape[:2], reach.stop - reach.start, x.shape[3])
        if kept := _common(own, reach):
            held[:, :, _counted_from(kept, reach.start)] = x[:, :, _counted_from(kept, own.start)]
        lent = [(x[:, :, _counted_from(rows, own.start)].contiguous(), peer) for peer, rows, _ in peers if rows]
        halo = [(held[:, :, _counted_from(rows, reach.start)], peer) for peer, _, rows in peers if rows]
        arriving = [(torch.empty_like(part, memory_format=torch.contiguous_format), peer) for part, peer in halo]
        wait(exchange(lent, arriving, group))
        for (part, _), (arrived, _) in zip(halo, arriving, strict=True):
            part.copy_(arrived)
        return held

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        plan, heights, group, rank = ctx.how
        own, peers = crossings(plan, heights, rank)
        reach, x_grad = plan[rank].reach, grad.new_zeros(ctx.shape)
        if kept := _common(own, reach):
            x_grad[:, :, _counted_from(kept, own.start)] = grad[:, :, _counted_from(kept, reach.start)]
        halo = [(grad[:, :, _counted_from(rows, reach.start)].contiguous(), peer) for peer, _, rows in peers if rows]
        lent = [(x_grad[:, :, _counted_from(rows, own.start)], peer) for peer, rows, _ in peers if rows]
        arriving = [(torch.empty_like(part, memory_format=torch.contiguous_format), peer) for part, peer in lent]
        wait(exchange(halo, arriving, group))
        for (part, _), (arrived, _) in zip(lent, arriving, strict=True):
            part += arrived  # these rows served this rank's filter and a neighbour's
        return x_grad, None, None, None


# ---- arguments ------------------------------------------------------------------------------------------------


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _margins(padding, weight, stride, dilation):
    """Zeros to add (above, below, left, right), for all that torch's `padding` may be."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding != "same":
        down, across = _pair(padding)
        return down, down, across, across
    if stride != (1, 1):
        raise ValueError(f"padding='same' goes with stride 1, not with stride {stride}")
    across = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return across[0] // 2, across[0] - across[0] // 2, across[1] // 2, across[1] - across[1] // 2


def _check_filter(name, x, weight):
    """Raise ValueError unless weight is a filter for the images x."""
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: x (batch, in, height, width) has shape {tuple(x.shape)}, weight (out, in, height, width) "
            f"{tuple(weight.shape)}: four dimensions each, and as many input channels, are needed"
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"{name}: x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}")
    if 0 in weight.shape:
        raise ValueError(f"{name}: weight {tuple(weight.shape)} is empty: there are more ranks than channels to cut")
