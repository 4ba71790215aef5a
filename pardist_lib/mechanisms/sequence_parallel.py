"""Sequence parallelism: what tensor parallelism leaves whole on every rank is split along the sequence.

Between the split matrices, tensor parallelism has every rank do the same norm and the same dropout on the same whole
activations, after an all-reduce that brought them there. But an all-reduce is a reduce-scatter and an all-gather: put
norm, dropout and residual between the two, and each rank keeps only its n-th of the sequence there. The bytes are the
same, the activations a fraction.

    tensor parallel          copy ─ matmuls ─ all-reduce ─ norm, dropout on all positions
    and sequence parallel    all-gather ─ matmuls ─ reduce-scatter ─ norm, dropout on one n-th of the positions

Two forms, an option of the layers in parallel_linear.py and of those that are made of them; in halves of an all-reduce
of S (the bytes of the whole activations), (n − 1)/n·S each, for a pair of column- and row-parallel layers:

    sequence_parallel=False                      four halves: an all-reduce forward, an all-reduce backward
    sequence_parallel=True                       four halves; each matmul keeps its whole, gathered input
    sequence_parallel=True, keep_gathered=False  five: backward gathers the input again, so only one n-th is kept

and the gradients of what every rank has whole and uses on its own positions (norms, position embeddings), which
`replicated` adds up. A row-parallel bias is none of these here: its gradient comes from the gathered gradient.

n: ranks of the group. Activations are cut along the sequence as torch.tensor_split cuts, so n need not divide it.
Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4.2.
"""

import copy
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from .autograd_collectives import copy_to_group
from .point_to_point import place
from .splitting import first_ranks_copy, parameter, place_of, said

# ---- what every rank has whole, and uses on its own positions -------------------------------------------------


def replicated(*parameters, group=None):
    """Parameters that are the same on every rank, for use on this rank's positions only.

    Each rank then finds the part of their gradient that its positions give: backward adds the parts up, in one
    all-reduce for all of them together. Returns a tuple; None stays None. Without this, ranks would take different
    steps and their copies would drift apart.
    """
    trained = [p for p in parameters if p is not None and p.requires_grad]
    if not trained or place(group)[1] == 1:
        return parameters
    flat = copy_to_group(torch.cat([p.reshape(-1) for p in trained]), group)
    parts = iter(flat.split([p.numel() for p in trained]))
    return tuple(next(parts).view_as(p) if p is not None and p.requires_grad else p for p in parameters)


class SequenceParallelLayerNorm(nn.LayerNorm):
    """nn.LayerNorm on this rank's positions: (…, this rank's positions, features), the same shape back.

    Forward sends nothing: a position's norm needs no other position. Backward adds the gradients of weight and bias
    over the ranks, in one all-reduce of both together. Weights start as the first rank's.
    """

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, *, group=None, **options):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, **options)
        _start_alike(self, group)

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
        _start_alike(self, group)

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
    raise ValueError(f"nn.LayerNorm and nn.RMSNorm can work on a part of the sequence, not {said(module)}")


def _start_alike(norm, group):
    """Give a norm its group, and every rank the first rank's weights."""
    place_of(group, type(norm).__name__)
    norm.group = group
    for name, p in list(norm.named_parameters()):
        setattr(norm, name, parameter(first_ranks_copy(p, group), p))


def _split_norm(cls, kind, module, group):
    place_of(group, cls.__name__)
    if type(module) is not kind:
        raise ValueError(f"{cls.__name__}.from_module takes an ordinary nn.{kind.__name__}, not {said(module)}")
    return norm_of(cls, module, lambda p: first_ranks_copy(p, group), group=group)


def norm_of(cls, norm, values=torch.clone, **options):
    """A norm of class `cls` with the sizes of another one, and with values(p) in the place of each parameter p."""
    bias = getattr(norm, "bias", None)
    options |= {"bias": bias is not None} if issubclass(cls, nn.LayerNorm) else {}
    other = cls(norm.normalized_shape, norm.eps, norm.weight is not None, device="meta", **options)
    for name, p in norm.named_parameters():
        setattr(other, name, parameter(values(p.detach()), p))
    return other.train(norm.training)


# ---- random numbers -------------------------------------------------------------------------------------------


@contextmanager
def random_per_rank(group=None):
    """Inside, each rank draws other random numbers; outside, ranks seeded alike go on drawing the same ones.

    For dropout on what is split (heads, positions): with the same stream everywhere, each rank would drop the same
    places of its part. What is whole on every rank (after an all-reduce) needs the common stream instead, or the
    copies differ. The common stream (torch's global one, on the CPU) moves on by one draw, the same on every rank,
    from which the ranks' own streams are seeded: the numbers follow from torch.manual_seed alone, and a checkpoint of
    the global state is enough. A group of one rank changes nothing.
    """
    rank, n = place(group)
    if n == 1:
        yield
        return
    seed = int(torch.randint(2**62, ())) + rank
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed(seed)
        yield


class OnPart(nn.Module):
    """Any module that every rank has whole and uses on a part of its own: of the heads, the features, the positions.

    For what stands between split layers, such as the norm of each head's queries, or a dropout; and for a norm that
    SequenceParallelLayerNorm does not know. Each rank draws its own random numbers in it, and backward adds up over the
    ranks what they find of its parameters' gradients, in one all-reduce. Values are those of the group's first rank.
    """

    def __init__(self, module, group=None):
        super().__init__()
        place_of(group, type(self).__name__)
        self.module, self.group = copy.deepcopy(module), group
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            tensor.data = first_ranks_copy(tensor, group)
        self.draws = any(isinstance(part, nn.modules.dropout._DropoutNd) for part in module.modules())
        self.train(module.training)

    def to_module(self):
        """The module as it was, with these values."""
        return copy.deepcopy(self.module)

    def forward(self, *args, **kwargs):
        names, parameters = [*dict(self.module.named_parameters())], self.module.parameters()
        weights = dict(zip(names, replicated(*parameters, group=self.group), strict=True))
        with random_per_rank(self.group) if self.draws and self.training else nullcontext():
            return functional_call(self.module, weights, args, kwargs)
