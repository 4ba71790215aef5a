"""What every rank has whole and uses on a part of its own: its gradients are summands, its dropout draws apart."""

import copy
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.func import functional_call

from ..collectives.autograd import copy_to_group
from ..group import rank_and_size
from .checks import check_group
from .splitting import first_ranks_copy


def replicated(*parameters, group=None):
    """Parameters that are the same on every rank, for use on this rank's positions only.

    Each rank then finds the part of their gradient that its positions give: backward adds the parts up, in one
    all-reduce of as many bytes as the trainable ones have together; forward sends nothing. Returns a tuple; None stays
    None. Without this, ranks would take different steps and their copies would drift apart.
    """
    trained = [p for p in parameters if p is not None and p.requires_grad]
    if not trained or rank_and_size(group)[1] == 1:
        return parameters
    flat = copy_to_group(torch.cat([p.reshape(-1) for p in trained]), group)
    parts = iter(flat.split([p.numel() for p in trained]))
    return tuple(next(parts).view_as(p) if p is not None and p.requires_grad else p for p in parameters)


@contextmanager
def random_per_rank(group=None):
    """Inside, each rank draws other random numbers; outside, ranks seeded alike go on drawing the same ones.

    For dropout on what is split (heads, positions): with the same stream everywhere, each rank would drop the same
    places of its part. What is whole on every rank (after an all-reduce) needs the common stream instead, or the
    copies differ. The common stream (torch's global one, on the CPU) moves on by one draw, the same on every rank,
    from which the ranks' own streams are seeded: the numbers follow from torch.manual_seed alone, and a checkpoint of
    the global state is enough. A group of one rank changes nothing.
    """
    rank, n = rank_and_size(group)
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
    ranks what they find of its parameters' gradients, in one all-reduce of their bytes; forward sends nothing. Values
    are those of the group's first rank.
    """

    def __init__(self, module, group=None):
        super().__init__()
        check_group(group, type(self).__name__)
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
