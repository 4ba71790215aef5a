"""A part of a tensor for every rank: how the split layers of this folder take their weights from an ordinary module.

All ranks come with a module of the same shape; the values are those of the group's first rank, so seeds may differ.
"""

import torch
from torch import nn

from ..collectives.agreement import take_from_first
from ..collectives.point_to_point import exchange, wait
from ..group import rank_and_size, split_sizes


def first_ranks_part(whole, dim, group=None):
    """This rank's part along `dim` of the first rank's tensor, as torch.tensor_split cuts; whole: of the same shape on
    every rank. The first rank sends S bytes minus its own part, the others nothing."""
    rank, n = rank_and_size(group)
    if whole.is_meta or n == 1:
        return whole.detach().tensor_split(n, dim)[rank].clone()
    rows = whole.detach().movedim(dim, 0)
    if rank == 0:
        part, *others = rows.contiguous().tensor_split(n)
        wait(exchange([(other, peer) for peer, other in enumerate(others, 1)], group=group))
        part = part.clone()
    else:
        part = rows.new_empty((split_sizes(len(rows), n)[rank], *rows.shape[1:]))
        wait(exchange(receives=[(part, 0)], group=group))
    return part.movedim(0, dim).contiguous()


def first_ranks_copy(whole, group=None):
    """The first rank's tensor, as a new one on every rank: it broadcasts S bytes."""
    copy = whole.detach().clone(memory_format=torch.contiguous_format)
    if not whole.is_meta and rank_and_size(group)[1] > 1:
        take_from_first([copy], group)
    return copy


def parameter(tensor, like):
    return nn.Parameter(tensor, requires_grad=like.requires_grad)
