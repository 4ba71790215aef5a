"""Averaging parameters instead of gradients: once, every k steps, or after every step; and local SGD.

Each rank trains by itself; now and then all take θ = Σ wᵢ·θᵢ, with wᵢ = 1/n or a rank's share of the rows. n: ranks,
S: bytes of the parameters. Averaging every k steps sends 1/k of what averaging after every step does.

SGD equals one process on the whole batch, with momentum and weight decay too, where all ranks start alike and average
after every step. It is linear in the gradients: the mean of the ranks' steps is the step of the mean gradient. Not even
the momentum buffers need be exchanged: their mean is the momentum of one process (with weights, as long as these stay
the same). Adam is not linear: it divides by the root of a mean of squares, and the mean over ranks of g² is not the
square of the mean. It trains, but differently, with its state averaged or not.

Sources: Zinkevich et al., "Parallelized Stochastic Gradient Descent" (2010), for one average at the end; McMahan et
al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (2017), algorithm 1, for weights and
for averaging now and then; Stich, "Local SGD Converges Fast and Communicates Little" (2019); Douillard et al., "DiLoCo"
(2023), algorithm 1, for the outer optimizer.
"""

import math
import zlib

import torch
import torch.distributed as dist

from .collectives.agreement import sum_over_ranks, take_from_first
from .group import check_optimizer, rank_and_size


def average_parameters(module, weights=None, group=None, optimizer=None):
    """Replace every trainable parameter by its mean over the ranks, in place, on every rank of the group.

    module     on every rank the same; frozen parameters and buffers are left alone. A shared one counts once.
    weights    a number: this rank's own weight (its rows, say), which may differ from rank to rank and from call to
               call; or a list with every rank's, the same on all. None: all count alike. They need not add up to 1.
               Nothing is taken from a rank that weighs 0, not even its NaN.
    optimizer  its state is averaged too, with the same weights: whatever has its parameter's shape (momentum, Adam's
               two means); the step counts stay, and so do Adafactor's means over rows and columns.

    Called once after training it is one-shot averaging. All-reduces S bytes, and 8 where each rank knows only its own
    weight; with an optimizer also the bytes of its state, and 16 to compare what state the ranks have.
    Raises ValueError, on every rank, for weights that are negative, not finite, all 0 or not as many as ranks, for an
    optimizer of other parameters, and where the optimizer's state is not of the same kind on all ranks (one that has
    not stepped yet has none).
    """
    tensors = [p.detach() for p in module.parameters() if p.requires_grad]
    device = tensors[0].device if tensors else None
    share = _share(weights, group, device)
    if optimizer is not None:
        check_optimizer(module, optimizer)
        state = _state(module, optimizer)
        _check_same_state([kind for kind, _ in state], group, device)
        tensors += [t for _, t in state]
    with torch.no_grad():
        for t, mean in zip(tensors, sum_over_ranks(tensors, group, scale=share), strict=True):
            t.copy_(mean)


class LocalSGD:
    """Every rank trains by itself for `every` steps, then all average their parameters; and so on.

        local = LocalSGD(model, torch.optim.SGD(model.parameters(), lr=0.1), every=8)
        for x, y in batches:
            local.zero_grad()
            loss(model(x), y).backward()
            local.step()

    module, optimizer   each rank's own; any torch optimizer of the module's parameters. At the start parameters and
                        buffers are set to those of the group's first rank (S bytes and the buffers', broadcast).
    every               steps between two averages; None: never by itself. `average()` at the end is one-shot averaging.
    weights             as for `average_parameters`: a number, this rank's own, or a list of all ranks'.
    average_state       average the optimizer's state too, whenever the parameters are.
    outer               a function from a list of parameters to a torch optimizer, as in
                        lambda ps: torch.optim.SGD(ps, lr=0.7, momentum=0.9, nesterov=True). It starts where the last
                        average ended and takes the way from the mean back to there for a gradient (DiLoCo). Without
                        momentum and with lr=1 it would end at the mean itself. Needs S bytes of memory and its state;
                        sends nothing, as every rank computes the same.

    A checkpoint is taken right after an average. To go on from it, load module and optimizer before this object is
    made, since the outer optimizer starts from what the module holds then; and afterwards the outer optimizer's state
    (`outer.load_state_dict`).

    In `every` steps sends what one average sends: all-reduces S bytes. Raises ValueError for every < 1, for a module
    that has nothing to train, and for an optimizer of other parameters.
    """

    def __init__(self, module, optimizer, every, weights=None, group=None, *, average_state=False, outer=None):
        if every is not None and (not isinstance(every, int) or every < 1):
            raise ValueError(f"every is a number of steps, 1 or more, or None, not {every!r}")
        rank_and_size(group)
        self.module, self.optimizer, self.every, self.weights, self.group = module, optimizer, every, weights, group
        self.average_state, self.steps, self.averages = average_state, 0, 0
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("this module has no parameter that requires a gradient: there is nothing to train")
        check_optimizer(module, optimizer)
        take_from_first([*module.parameters(), *module.buffers()], group)
        self.start = [p.detach().clone() for p in self.parameters] if outer else []  # where the last average ended
        self.outer = outer(self.start) if outer else None

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self):
        """One step of this rank's own optimizer, and after every `every` of them `average()`."""
        self.optimizer.step()
        self.steps += 1
        if self.every and self.steps % self.every == 0:
            self.average()

    @torch.no_grad()
    def average(self):
        """All ranks' parameters become their mean, or where the outer optimizer steps towards it."""
        state_of = self.optimizer if self.average_state else None
        average_parameters(self.module, self.weights, self.group, state_of)
        self.averages += 1
        if self.outer:
            for start, p in zip(self.start, self.parameters, strict=True):
                start.grad = start - p.detach()  # it points away from the mean, as a gradient does from the minimum
            self.outer.step()
            for start, p in zip(self.start, self.parameters, strict=True):
                p.copy_(start)


# ---- weights and state ----------------------------------------------------------------------------------------


def _share(weights, group, device):
    """This rank's weight, such that all of them add up to 1."""
    rank, n = rank_and_size(group)
    if weights is None:
        return 1 / n
    weights = weights.tolist() if hasattr(weights, "tolist") else weights  # NumPy's and torch's numbers and arrays
    if isinstance(weights, (int, float)):
        mine = float(weights) if 0 <= weights < math.inf else math.nan  # NaN tells all ranks of a wrong one
        total = torch.tensor([mine], dtype=torch.float64, device=device)
        dist.all_reduce(total, group=group)
        total, whose = total.item(), " (or what another rank gave)"
    else:
        weights = [float(w) for w in weights]
        if len(weights) != n:
            raise ValueError(f"{len(weights)} weights for {n} ranks: give every rank's, or this rank's own as a number")
        mine, total, whose = weights[rank], math.nan if min(weights) < 0 else sum(weights), ""
    if not math.isfinite(total):
        raise ValueError(f"a weight is a number of rows, or another share, 0 or more and finite, not {weights}{whose}")
    if not total:
        raise ValueError("all weights are 0: somebody has to count")
    return mine / total


def _state(module, optimizer):
    """[(what it is, tensor)] of the optimizer's tensors that are shaped like their parameter."""
    return [
        ((i, name, str(value.dtype)), value)
        for i, p in enumerate(p for p in module.parameters() if p.requires_grad)
        for name, value in sorted(optimizer.state.get(p, {}).items())
        if isinstance(value, torch.Tensor) and value.shape == p.shape and name != "step"
    ]


def _check_same_state(kinds, group, device):
    """Raise ValueError, on every rank, where the ranks' optimizers hold different state: the all-reduce would add up
    what does not belong together."""
    mark = zlib.crc32(repr(kinds).encode())
    extremes = torch.tensor([mark, -mark], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    if extremes[0] != -extremes[1]:
        raise ValueError(
            f"the optimizer's state differs in kind between ranks (here {len(kinds)} tensors): "
            "all of them have to have made a step with a gradient for the same parameters"
        )
