"""Experts of one module to the ranks that own them, and back; what every rank has, from the group's first."""

import copy

import torch
import torch.distributed as dist
from torch import nn

from ..collectives.agreement import take_from_first
from ..collectives.parts import has_part, replaced
from ..collectives.point_to_point import exchange, wait
from ..group import rank_and_size


def deal(experts, owned, group=None):
    """This rank's experts, {number: a copy with the first rank's values}. owned: how many each rank has.

    The first rank sends every other one its experts' bytes. Shapes are the same on all ranks."""
    rank, _ = rank_and_size(group)
    own, sends, receives = nn.ModuleDict(), [], []
    for number, owner in enumerate(_owners(owned)):
        if owner == rank:
            own[str(number)] = _copied(experts[number])
        if owner != 0 and rank == 0:
            sends += [(t.contiguous(), owner) for t in _tensors(experts[number])]
        elif owner == rank != 0:
            receives += [
                (t, torch.empty_like(t, memory_format=torch.contiguous_format)) for t in _tensors(own[str(number)])
            ]
    wait(exchange(sends, [(message, 0) for _, message in receives], group))
    for t, message in receives:
        t.copy_(message)
    return own


def of_first_rank(module, group=None):
    """A copy of `module` (or None) with the values of the group's first rank."""
    new = _copied(module)
    take_from_first(_tensors(new), group)
    return new


def whole_experts(own, owned, group=None):
    """[every expert, whole, as a new module], on every rank; own: {number: expert}. Each is broadcast by its owner."""
    mine = {number: unsplit(expert) for number, expert in own.items()}
    like = next(iter(mine.values()))
    experts = []
    for number, owner in enumerate(_owners(owned)):
        expert = mine.get(str(number)) or _copied(like)
        for t in _tensors(expert):
            message = t.contiguous()
            dist.broadcast(message.reshape(-1).view(torch.uint8), group=group, group_src=owner)
            t.copy_(message)
        experts.append(expert)
    return experts


def unsplit(module):
    """A copy of `module` (or None) in which all that is split by tensor parallelism is whole again."""
    if hasattr(module, "to_module"):
        return module.to_module()
    new = _copied(module)
    for name, child in () if module is None else module.named_children():
        new.add_module(name, unsplit(child))
    return new


def mark(layer):
    """Let torch's norms of gradients refuse this rank's experts. Those split by tensor parallelism are marked there."""
    if layer.n > 1:
        for module in layer.experts.modules():
            if not hasattr(module, "to_module"):
                for p in module.parameters(recurse=False):
                    has_part(p, layer, "expert_parallel.clip_grad_norm_(model, …)")


def _owners(owned):
    """[rank of each expert]"""
    return [rank for rank, many in enumerate(owned) for _ in range(many)]


def _tensors(module):
    if module is None:
        return []
    return [t.detach() for t in [*module.parameters(), *module.buffers()] if not t.is_meta]


def _copied(module):
    """A deep copy, but for its process groups. An optimizer that has the old one's parameters will notice."""
    if module is None:
        return None
    groups = {id(v): v for m in module.modules() for v in vars(m).values() if isinstance(v, dist.ProcessGroup)}
    new = copy.deepcopy(module, groups)
    for old_p, new_p in zip(module.parameters(), new.parameters(), strict=True):
        replaced(old_p, new_p)
    return new
