"""A step's micro-batches on one rank; and what is refused, with what to do instead."""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from ..group import rank_and_size


class Batch:
    """The micro-batches of one step, as far as this rank has them, and what it finds for them.

    x is wanted where `first`, the rank of the first stage, target where `last`; without a loss there is none.
    inputs, targets: [([tensors], whether they are a tuple)], one for each micro-batch, or none; results: {micro-batch:
    what the last stage gives}; input_gradients: {micro-batch: those of x}.
    """

    def __init__(self, m, x, target, loss, seed, first, last):
        self.training, self.loss, self.seed = torch.is_grad_enabled(), loss, seed
        self.inputs = micro_batches(x, m, "x", "first") if first else []
        self.targets = micro_batches(target, m, "target", "last") if last and loss else []
        self.rows = [len(tensors[0]) for tensors, _ in self.inputs] or [0] * m
        self.results, self.input_gradients = {}, {}

    def kinds(self):
        """All of the input that decides on shapes, but for the number of rows."""
        tensors = [t for tensors, _ in self.inputs for t in tensors]
        return [self.loss is None, *((t.shape[1:], t.dtype, t.requires_grad) for t in tensors)]

    def weigh(self, rows, scale, reduction):
        """The share of each micro-batch in loss and gradients, now that this rank knows everybody's rows."""
        if self.targets and (theirs := [len(tensors[0]) for tensors, _ in self.targets]) != rows:
            raise ValueError(f"the micro-batches of target have {theirs} rows, those of x {rows}")
        self.weights = [scale * (r / sum(rows) if reduction == "mean" else 1.0) for r in rows]

    def loss_of(self, i):
        """Output of the last stage → loss of micro-batch i; None where there is none."""
        if not self.targets:
            return None
        tensors, packed = self.targets[i]
        return partial(_single_number, self.loss, tuple(tensors) if packed else tensors[0])

    def total(self, device):
        """Of the losses that are here: [their sum, which of KINDS it is]."""
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for i, ([one], _) in self.results.items():
            total[0] += one.double().squeeze() * self.weights[i]
            total[1] = KINDS.index(one.dtype)
        return total

    def output(self):
        """What the last stage gave, as one batch's; None where it is not here."""
        if not self.results:
            return None
        parts = [self.results[i] for i in sorted(self.results)]
        tensors = [torch.cat(ts) for ts in zip(*(ts for ts, _ in parts), strict=True)]
        return tuple(tensors) if parts[0][1] else tensors[0]

    def hand_on_input_gradients(self):
        """To x, where it requires one, and to what it was computed from."""
        pairs = []
        for i, found in self.input_gradients.items():
            pairs += zip([t for t in self.inputs[i][0] if t.requires_grad], found, strict=True)
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))


def agree(batch, changed, group, device):
    """(the rows of every micro-batch, which only the first stage's rank knows; whether `changed` is so on any rank)."""
    told = torch.tensor([changed, batch.training, not batch.training, *batch.rows], device=device)
    rank, n = rank_and_size(group)
    if n > 1:
        dist.all_reduce(told, dist.ReduceOp.MAX, group)
    changed, some_train, some_do_not, *rows = told.tolist()
    if some_train and some_do_not:
        how = "with" if batch.training else "under torch.no_grad(), without"
        raise ValueError(f"rank {rank} of the group calls this {how} gradients, and another does not")
    return rows, changed


KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # of a loss


def _single_number(loss, target, output):
    loss = loss(output, target)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shape = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
        raise ValueError(
            f"the loss of a micro-batch has to be a single number, and this one gives {shape}: take its mean, or its "
            'sum with reduction="sum"'
        )
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError("the loss requires no gradient: everything is frozen. Evaluate under torch.no_grad()")
    return loss


# ---- what is refused ------------------------------------------------------------------------------------------


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


def advice(error):
    """What to do about an error of torch's that is a pipeline's own."""
    if "leaf Variable" in str(error) and "in-place" in str(error):
        return ": its first layer works in place on what the stage before still needs: make it inplace=False"
    return ""
