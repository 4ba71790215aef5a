"""A part of a tensor for every rank: how the split layers of this folder take their weights from an ordinary module.

All ranks come with a module of the same shape; the values are those of the group's first rank, so seeds may differ.
"""

import torch
from torch import nn

from ..collectives.agreement import take_from_first
from ..collectives.rooted import scatter_along, star
from ..group import rank_and_size, split_sizes


def first_ranks_part(whole, dim, group=None):
    """This rank's part along `dim` of the tensor that the group's first rank has. Sends S minus the first part from
    there. Every rank gives a tensor of that shape, and only the first one's values count."""
    rank, n = rank_and_size(group)
    if whole.is_meta or n == 1:
        return whole.detach().tensor_split(n, dim)[rank].clone()
    first = whole.detach().movedim(dim, 0)
    part = first.new_empty((split_sizes(len(first), n)[rank], *first.shape[1:]))
    scatter_along(star, part, first if rank == 0 else None, 0, split_sizes(len(first), n), group)
    return part.movedim(0, dim).contiguous()


def first_ranks_copy(whole, group=None):
    """The tensor of the group's first rank, as a new one."""
    copy = whole.detach().clone(memory_format=torch.contiguous_format)
    if not whole.is_meta and rank_and_size(group)[1] > 1:
        take_from_first([copy], group)
    return copy


def parameter(tensor, like):
    return nn.Parameter(tensor, requires_grad=like.requires_grad)
