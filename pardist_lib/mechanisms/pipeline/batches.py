"""What is refused, with what to do instead."""

import torch
import torch.distributed as dist
from torch import nn

from ..group import rank_and_size


def layers_as_list(layers):
    """nn.Sequential or a list of modules as a list."""
    if isinstance(layers, nn.Module) and not isinstance(layers, (nn.Sequential, nn.ModuleList)):
        raise TypeError(
            f"{type(layers).__name__} is one module: give its layers in order, as an nn.Sequential or a list, so that "
            "they can be dealt to stages"
        )
    layers = list(layers)
    for i, layer in enumerate(layers):
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer {i} is a {type(layer).__name__}, not an nn.Module")
    return layers


def fits(schedule, n, reduction):
    if schedule.ranks != n:
        raise ValueError(f"the schedule has rows for {schedule.ranks} ranks, and the group has {n}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction is "mean" or "sum", not {reduction!r}')


def same_everywhere(settings, group):
    """Raise ValueError, on every rank, where the ranks were given different settings."""
    everyone = [None] * rank_and_size(group)[1]
    dist.all_gather_object(everyone, settings, group=group)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise ValueError(f"rank {rank} of the group was given another schedule, cut or option than rank 0")


def micro_batches(value, m, name, stage):
    """A batch as m micro-batches: [([tensors], whether they are a tuple)]. Raises ValueError where it cannot be cut."""
    if value is None:
        raise ValueError(f"this rank has the {stage} stage: step() needs {name} here")
    if isinstance(value, list):
        if len(value) != m:
            raise ValueError(f"{name} is a list of {len(value)}, and the schedule has {m} micro-batches")
        parts = [(list(v), True) if isinstance(v, tuple) else ([v], False) for v in value]
    else:
        tensors = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(t, torch.Tensor) and t.dim() for t in tensors) or not tensors:
            raise ValueError(f"{name} has to be a tensor with rows, a tuple of such, or a list of {m} micro-batches")
        parts = [(list(ts), isinstance(value, tuple)) for ts in zip(*(t.tensor_split(m) for t in tensors), strict=True)]
    for i, (tensors, _) in enumerate(parts):
        if not all(isinstance(t, torch.Tensor) and t.dim() for t in tensors):
            raise ValueError(f"micro-batch {i} of {name} has to be a tensor with rows, or a tuple of such")
        lengths = [len(t) for t in tensors]
        if len({*lengths}) != 1:
            raise ValueError(f"the tensors of {name} have {lengths} rows in micro-batch {i}: as many in each")
        if not lengths[0]:
            rows = sum(len(ts[0]) for ts, _ in parts)
            raise ValueError(f"{rows} rows of {name} do not fill {m} micro-batches: each needs one at least")
    return parts


def targets_fit(targets, rows):
    theirs = [len(tensors[0]) for tensors, _ in targets]
    if theirs != rows:
        raise ValueError(f"the micro-batches of target have {theirs} rows, those of x {rows}")


def together(parts):
    """Micro-batches' outputs, [([tensors], whether they are a tuple)], as one batch's; None where there are none."""
    if not parts:
        return None
    tensors = [torch.cat(ts) for ts in zip(*(ts for ts, _ in parts), strict=True)]
    return tuple(tensors) if parts[0][1] else tensors[0]


def advice(error):
    """What to do about an error of torch's that is a pipeline's own."""
    if "leaf Variable" in str(error) and "in-place" in str(error):
        return ": its first layer works in place on what the stage before still needs: make it inplace=False"
    return ""
