"""A part of a tensor for every rank: how the split layers of this folder take their weights from an ordinary module.

All ranks come with a module of the same shape; the values are those of the group's first rank, so seeds may differ.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

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


def place_of(group, who):
    """(rank, n) as `rank_and_size`. Raises ValueError, naming `who`, for what is no group of this rank's."""
    if not (group is None or isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER):
        advice = ": its get_group() gives one" if hasattr(group, "get_group") else ", or None for all ranks"
        raise ValueError(f"{who}: group is a {type(group).__name__}, but has to be a process group{advice}")
    try:
        return rank_and_size(group)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None


def check_plain(module, kinds, who):
    """Raises ValueError, naming `who`, unless module is of one of torch's `kinds` and does just what these do: what
    takes its place would know nothing of a forward of its own, of hooks or of parametrizations."""
    if hasattr(module, "to_module"):
        raise ValueError(f"{said(module)} is split already: its to_module() gives the whole one back")
    kind = next((kind for kind in kinds if isinstance(module, kind)), None)
    if kind is None:
        names = " and ".join(f"{'nn.' * (k.__module__.startswith('torch.nn'))}{k.__name__}" for k in kinds)
        raise ValueError(f"{who} splits {names}, not {said(module)}")
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    for lost, what in [
        (type(module).forward is not kind.forward or "forward" in vars(module), "a forward of its own"),
        (is_parametrized(module), "a parametrization"),
        (any(hooks), "hooks (a lazy module has them until it was called once)"),
    ]:
        if lost:
            raise ValueError(f"{said(module)} has {what}, which would be lost: {who} splits a plain {kind.__name__}")


def said(module):
    """A module in one line, for messages."""
    text = repr(module).split("\n")[0]
    return text if text.endswith(")") else f"{type(module).__name__}(…)"
