"""Gradients that travel together: one message instead of many small ones."""

from dataclasses import dataclass, field

import torch

__all__ = ["Bucket", "fill_buckets"]


@dataclass(eq=False)
class Bucket:
    """Parameters whose gradients travel together, one after the other in a tensor, `flat`. `views[i]` is the part of it
    that belongs to `parameters[i]`, with its shape and its order in memory (channels last, say), on which optimizers
    with fused=True count."""

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
