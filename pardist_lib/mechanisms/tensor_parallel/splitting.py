"""A part of a tensor for every rank: how the split layers of this folder take their weights from an ordinary module.

All ranks come with a module of the same shape; the values are those of the group's first rank, so seeds may differ.
`SplitModule` is what these layers have in common, and `clip_grad_norm_` what knows which gradients are parts.
"""

import torch
import torch.distributed as dist
from torch import nn

from ..collectives.agreement import take_from_first
from ..collectives.parts import has_part, load_parts, replaced, save_parts
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
    """`tensor` as a parameter that a module will have in the place of `like`."""
    new = nn.Parameter(tensor, requires_grad=like.requires_grad)
    replaced(like, new)
    return new


class SplitModule(nn.Module):
    """A module with this rank's part of a weight, over the ranks of `group`. A bias is split with the output features,
    where these are dimension 0 of the weight."""

    group = None
    split_dim = None  # along which the weight is cut; None: every rank has all of it

    def cut_of(self, name):
        """The dimension along which the parameter `name` is cut, None where every rank has it whole."""
        return self.split_dim if name == "weight" or self.split_dim == 0 else None

    def register_parameter(self, name, param):
        super().register_parameter(name, param)
        self._tell(name)

    def __setstate__(self, state):  # of a copy
        super().__setstate__(state)
        for name in self._parameters:
            self._tell(name)

    def _tell(self, name):
        p = self._parameters[name]
        rank, n = rank_and_size(self.group)
        if p is not None and self.cut_of(name) is not None and n > 1:
            clip, save = (f"tensor_parallel.{name}" for name in ("clip_grad_norm_(model, …)", "full_state_dict(model)"))
            has_part(p, self, clip, (self.cut_of(name), rank, n), save)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_parts(self, destination, prefix)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        load_parts(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def clip_grad_norm_(model, max_norm, norm_type=2.0):
    """As torch.nn.utils.clip_grad_norm_ of the unsplit model's parameters, the same on every rank; returns their norm.

    Of a gradient that is split all ranks' parts count, of one that every rank has whole, its own. norm_type: a number
    above 0, or inf. All-reduces one number in each group over which something is split.
    """
    if not float(norm_type) > 0:
        raise ValueError(f"norm_type is a number above 0, or inf, not {norm_type}")
    groups = {}  # {parameter that is split: its group}
    for module in model.modules():
        if isinstance(module, SplitModule):
            groups |= {p: module.group for name, p in module.named_parameters() if module.cut_of(name) is not None}
    gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
    device = next(model.parameters()).device
    highest = float(norm_type) == float("inf")

    def norm_of(tensors):
        each = [torch.linalg.vector_norm(t, norm_type).double().to(device) for t in tensors if t.numel()]
        return torch.linalg.vector_norm(torch.stack(each or [torch.zeros((), device=device).double()]), norm_type)

    norms = [norm_of([g for p, g in gradients.items() if p not in groups])]
    for group in dict.fromkeys(groups.values()):
        part = norm_of([g for p, g in gradients.items() if p in groups and groups[p] is group])
        power = part if highest else part**norm_type
        dist.all_reduce(power, dist.ReduceOp.MAX if highest else dist.ReduceOp.SUM, group)
        norms.append(power if highest else power ** (1 / norm_type))
    total = norm_of(norms)
    for g in gradients.values():
        g.mul_((max_norm / (total + 1e-6)).clamp(max=1.0).to(g.device, g.dtype))
    return total
