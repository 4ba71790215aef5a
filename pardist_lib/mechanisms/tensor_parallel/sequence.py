"""Sequence parallelism: what tensor parallelism leaves whole on every rank is split along the sequence.

Between the split matrices, tensor parallelism has every rank do the same norm and the same dropout on the same whole
activations, after an all-reduce that brought them there. But an all-reduce is a reduce-scatter and an all-gather: put
norm, dropout and residual between the two, and each rank keeps only its n-th of the sequence there. The bytes are the
same, the activations a fraction.

    tensor parallel          copy ─ matmuls ─ all-reduce ─ norm, dropout on all positions
    and sequence parallel    all-gather ─ matmuls ─ reduce-scatter ─ norm, dropout on one n-th of the positions

Two forms, an option of the layers in linear.py and of those that are made of them; in halves of an all-reduce
of S (the bytes of the whole activations), (n − 1)/n·S each, for a pair of column- and row-parallel layers:

    sequence_parallel=False                      four halves: an all-reduce forward, an all-reduce backward
    sequence_parallel=True                       four halves; each matmul keeps its whole, gathered input
    sequence_parallel=True, keep_gathered=False  five: backward gathers the input again, so only one n-th is kept
                                                 (what Megatron does)

and the gradients of what every rank has whole and uses on its own positions (norms, position embeddings), which
`replicated` adds up in every backward (Megatron once a step, after the last micro-batch). A row-parallel bias is none
of these here: its gradient comes from the gathered gradient.

n: ranks of the group. Activations are cut along the sequence as torch.tensor_split cuts, so n need not divide it.
Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4.2.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .checks import briefly, check_group
from .on_part import replicated
from .splitting import first_ranks_copy, parameter


class SequenceParallelLayerNorm(nn.LayerNorm):
    """nn.LayerNorm on this rank's positions: (…, this rank's positions, features), the same shape back.

    Forward sends nothing: a position's norm needs no other position. Backward adds the gradients of weight and bias
    over the ranks, in one all-reduce of both together, 2·features numbers. Weights start as the first rank's.
    """

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, *, group=None, **options):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, **options)
        _take_first_ranks_weights(self, group)

    @classmethod
    def from_module(cls, module, group=None):
        """With the weights of the group's first rank's nn.LayerNorm. Raises ValueError for any other module."""
        return _split_norm(cls, nn.LayerNorm, module, group)

    def to_module(self):
        """An ordinary nn.LayerNorm with these weights."""
        return norm_of(nn.LayerNorm, self)

    def forward(self, x):
        weight, bias = replicated(self.weight, self.bias, group=self.group)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class SequenceParallelRMSNorm(nn.RMSNorm):
    """nn.RMSNorm on this rank's positions, as `SequenceParallelLayerNorm`."""

    def __init__(self, normalized_shape, eps=None, elementwise_affine=True, *, group=None, **options):
        super().__init__(normalized_shape, eps, elementwise_affine, **options)
        _take_first_ranks_weights(self, group)

    @classmethod
    def from_module(cls, module, group=None):
        """With the weights of the group's first rank's nn.RMSNorm. Raises ValueError for any other module."""
        return _split_norm(cls, nn.RMSNorm, module, group)

    def to_module(self):
        """An ordinary nn.RMSNorm with these weights."""
        return norm_of(nn.RMSNorm, self)

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, replicated(self.weight, group=self.group)[0], self.eps)


def parallel_norm(module, group=None):
    """The sequence-parallel form of an nn.LayerNorm or nn.RMSNorm. Raises ValueError for any other norm."""
    for kind, split in ((nn.LayerNorm, SequenceParallelLayerNorm), (nn.RMSNorm, SequenceParallelRMSNorm)):
        if type(module) is kind:
            return split.from_module(module, group)
    raise ValueError(f"nn.LayerNorm and nn.RMSNorm can work on a part of the sequence, not {briefly(module)}")


def _take_first_ranks_weights(norm, group):
    """Give a norm its group, and every rank the first rank's weights."""
    check_group(group, type(norm).__name__)
    norm.group = group
    for name, p in list(norm.named_parameters()):
        setattr(norm, name, parameter(first_ranks_copy(p, group), p))


def _split_norm(cls, kind, module, group):
    if type(module) is not kind:
        raise ValueError(f"{cls.__name__}.from_module takes an ordinary nn.{kind.__name__}, not {briefly(module)}")
    return norm_of(cls, module, lambda p: first_ranks_copy(p, group), group=group)


def norm_of(cls, norm, values=torch.clone, **options):
    """A norm of class `cls` with the sizes of another one, and with values(p) in the place of each parameter p."""
    bias = getattr(norm, "bias", None)
    options |= {"bias": bias is not None} if issubclass(cls, nn.LayerNorm) else {}
    other = cls(norm.normalized_shape, norm.eps, norm.weight is not None, device="meta", **options)
    for name, p in norm.named_parameters():
        setattr(other, name, parameter(values(p.detach()), p))
    return other.train(norm.training)
