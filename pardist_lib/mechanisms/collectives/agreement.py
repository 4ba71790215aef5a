"""What ranks need alike before and while they work together: one model, the first rank's values, sums of many tensors.

n: ranks of the group; S: bytes of all tensors together. `group`: a process group, None for all ranks.
"""

from collections import defaultdict
from itertools import zip_longest

import torch
import torch.distributed as dist

from ..group import rank_and_size


def check_same_model(named, group=None):
    """Raise ValueError, on every rank, where the ranks' tensors differ in anything but their values.

    named: [(what it is called, tensor)], in the module's order: ("parameter fc.weight", p). What has to agree: names,
    number, dtype, shape, order in memory, requires_grad. Gives about 60 bytes a tensor to all_gather_object.
    """
    everyone = [None] * rank_and_size(group)[1]
    dist.all_gather_object(everyone, described(named), group=group)
    compare(everyone, group)


def compare(everyone, group=None):
    """The second half of `check_same_model`: everyone[r] is what rank r of the group has `described`."""
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    for member, theirs in zip(members, everyone, strict=True):
        for first, other in zip_longest(everyone[0], theirs, fillvalue="nothing more"):
            if first != other:
                raise ValueError(
                    f"the ranks' models differ: where rank {members[0]} has {first}, rank {member} has {other}. Build "
                    "the same model on every rank"
                )


def described(named):
    """A line of text for each of [(what it is called, tensor)]: all but the values."""
    return [f"{name}, {_kind(t)}" for name, t in named]


def named_tensors(module):
    """[(name, tensor)] of a module's parameters and buffers, as `check_same_model` takes them."""
    parameters = [(f"parameter {name}", p) for name, p in module.named_parameters()]
    return parameters + [(f"buffer {name}", b) for name, b in module.named_buffers()]


@torch.no_grad()
def take_from_first(tensors, group=None, bucket_mb=25, *, counted=True):
    """Set tensors (parameters, buffers) to those of the group's first rank, in place, on every rank.

    counted: autograd counts it as a change, and refuses a backward that was to come and has saved one of them.

    Of any dtype and layout in memory; shapes the same on all ranks. The first rank broadcasts S bytes, in one call for
    each `bucket_mb` MB of one dtype and device.
    """
    for t in tensors:
        if any(step == 0 and size > 1 for size, step in zip(t.shape, t.stride(), strict=True)):
            t.data = t.detach().clone(memory_format=torch.contiguous_format)  # an expanded one cannot be written to
    for bucket in _buckets([t.detach() if counted else t.data for t in tensors], bucket_mb * 2**20):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.broadcast(flat.view(torch.uint8), group=group, group_src=0)  # gloo does not know every dtype
        for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(part.view(t.shape))


@torch.no_grad()
def sum_over_ranks(tensors, group=None, *, scale=1.0, dtype=None):
    """[Σ over the ranks of scale · tensor], as new tensors, in the order given. tensors: a list, of floating point.

    scale: this rank's factor, applied before the sum; with 0 nothing is taken from this rank, not even its NaN.
    dtype: the precision in which they travel and are added up; None: each in its own.
    All-reduces S bytes (of `dtype`), in one call for each dtype and device.
    """
    sums = {}
    for bucket in _buckets(tensors):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        flat = (flat.mul_(scale) if scale else flat.zero_()).to(dtype or flat.dtype)  # 0 times NaN is NaN
        dist.all_reduce(flat, group=group)
        for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            sums[id(t)] = part.view(t.shape)
    return [sums[id(t)] for t in tensors]


def _buckets(tensors, most_bytes=float("inf")):
    """`tensors` in lists of one dtype and device each, each full once it has `most_bytes`. The same tensors give the
    same lists on every rank."""
    full, filling, held = [], defaultdict(list), defaultdict(int)
    for t in tensors:
        kind = t.dtype, t.device
        filling[kind].append(t)
        held[kind] += t.nbytes
        if held[kind] >= most_bytes:
            full.append(filling.pop(kind))
            held[kind] = 0
    return [*full, *filling.values()]


def _kind(t):
    like = torch.empty_like(t, device="meta")
    order = "" if like.is_contiguous() else f" with strides {list(like.stride())}"
    frozen = ", frozen" if isinstance(t, torch.nn.Parameter) and not t.requires_grad else ""
    return f"{str(t.dtype)[6:]} {list(t.shape)}{order}{frozen}"
