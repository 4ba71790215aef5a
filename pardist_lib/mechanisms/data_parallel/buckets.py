"""Tensors that travel together: one message instead of many small ones; and equal models to begin with."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

__all__ = ["Bucket", "fill_buckets", "same_on_all_ranks", "synchronise"]


@dataclass(eq=False)
class Bucket:
    """Parameters whose gradients travel together. `flat` holds them in one line; `views[i]` is the part of `flat`
    that belongs to `parameters[i]`, in its shape and its order in memory (channels last, say), as autograd makes
    gradients: optimizers with fused=True count on it."""

    index: int
    parameters: list
    flat: torch.Tensor
    views: list
    missing: set = field(default_factory=set)  # parameters whose gradient has not arrived in this backward


def fill_buckets(tensors, bucket_mb=25, first_bucket_mb=None):
    """Put tensors, in this order, into `Bucket`s of one dtype and device each; a bucket is closed when it has
    reached its size. The same tensors give the same buckets on every rank."""
    closed, open_ones = [], {}
    for t in tensors:
        members = open_ones.setdefault((t.dtype, t.device), [])
        members.append(t)
        first = not closed and first_bucket_mb is not None
        if sum(m.numel() * m.element_size() for m in members) >= (first_bucket_mb if first else bucket_mb) * 2**20:
            closed.append(open_ones.pop((t.dtype, t.device)))
    buckets = []
    for index, members in enumerate([*closed, *open_ones.values()]):
        flat = torch.zeros(sum(m.numel() for m in members), dtype=members[0].dtype, device=members[0].device)
        parts = flat.split([m.numel() for m in members])
        views = [part.as_strided(m.shape, _strides(m)) for part, m in zip(parts, members, strict=True)]
        buckets.append(Bucket(index, members, flat, views))
    return buckets


def _strides(t):
    """The order of t's elements in memory, without gaps."""
    return torch.empty_like(t, device="meta").stride()


@torch.no_grad()
def synchronise(tensors, group=None, bucket_mb=25):
    """Set tensors (parameters, buffers) to those of the group's first rank, in place; a broadcast for each bucket."""
    for bucket in fill_buckets([t.detach() for t in tensors], bucket_mb):
        for t, view in zip(bucket.parameters, bucket.views, strict=True):
            view.copy_(t)
        dist.broadcast(bucket.flat.view(torch.uint8), group=group, group_src=0)  # gloo does not know every dtype
        for t, view in zip(bucket.parameters, bucket.views, strict=True):
            t.copy_(view)


def same_on_all_ranks(module, group):
    """Raise ValueError, on every rank, where the ranks' models cannot be averaged tensor by tensor."""
    kinds = [("parameter", module.named_parameters()), ("buffer", module.named_buffers())]
    mine = [(kind, name, f"{str(t.dtype)[6:]} {list(t.shape)}{_order(t)}" + ", to be trained" * t.requires_grad)
            for kind, tensors in kinds for name, t in tensors]  # fmt: skip
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        for (kind, name, what), other in zip(everyone[0], theirs, strict=False):
            if other != (kind, name, what):
                raise ValueError(f"the ranks' models differ: {kind} {name} is {what} on rank 0, where rank {rank} has "
                                 f"{other[0]} {other[1]}, {other[2]}")  # fmt: skip
        if len(theirs) != len(everyone[0]):
            counts = f"{len(everyone[0])} tensors on rank 0, {len(theirs)} on rank {rank}"
            raise ValueError(f"the ranks' models differ: {counts}")


def _order(t):
    like = torch.empty_like(t, device="meta")
    return "" if like.is_contiguous() else f" with strides {list(like.stride())}"
