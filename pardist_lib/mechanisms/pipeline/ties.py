"""Parameters that layers on several ranks share, an embedding and the head as a rule: one parameter in several places.

Each rank that has one computes the part of its gradient that its own layers give. The parts are added up once a step,
whatever the schedule, in the same order on every rank, so that the copies stay equal to the bit.

Source: Narayanan et al. (2021); Megatron-LM all-reduces the embedding's gradient between first and last stage.
"""

import torch
import torch.distributed as dist

from ..collectives.point_to_point import exchange, wait


class Ties:
    """Those of a network on this rank. layers: all of it; owners: the rank of each layer. Every rank of the group makes
    one, and the first that has a shared parameter gives the others its values."""

    def __init__(self, layers, owners, rank, group=None):
        holders = {}  # {id: (parameter, the ranks that have it)}
        for layer, owner in zip(layers, owners, strict=True):
            for p in layer.parameters():
                _, ranks = holders.setdefault(id(p), (p, []))
                if owner not in ranks:
                    ranks.append(owner)
        self.rank, self.group = rank, group
        self.shared = [(p, sorted(ranks)) for p, ranks in holders.values() if len(ranks) > 1 and rank in ranks]
        self.before = []
        for p, ranks in self.shared:
            self._to_all(p.detach(), ranks, first=True)

    def set_aside(self):
        """Before a step: what earlier ones have left in .grad is added up already."""
        self.before = [p.grad for p, _ in self.shared]
        for p, _ in self.shared:
            p.grad = None

    def add_up(self):
        """After a step: the sum of all parts into .grad, beside what was there. Each rank that has a shared parameter
        sends its part to each other one: S for an embedding on two."""
        for (p, ranks), before in zip(self.shared, self.before, strict=True):
            if not p.requires_grad:
                p.grad = before
                continue
            mine = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            parts = self._to_all(mine, ranks)
            total = sum(parts[1:], parts[0].clone())
            p.grad = total if before is None else before.add_(total)

    def norm(self, parameters, norm_type, device):
        """The norm of all ranks' gradients, a shared parameter's counted by the first rank that has it."""
        elsewhere = {id(p) for p, ranks in self.shared if ranks[0] != self.rank}
        gradients = [p.grad for p in parameters if id(p) not in elsewhere]
        own = torch.nn.utils.get_total_norm(gradients, norm_type)  # by this name it refuses parts: tensor parallelism's
        own = own.to(device, torch.float64)
        if norm_type == float("inf"):
            dist.all_reduce(own, dist.ReduceOp.MAX, self.group)
            return own
        powers = own**norm_type
        dist.all_reduce(powers, group=self.group)
        return powers ** (1 / norm_type)

    def _to_all(self, tensor, ranks, first=False):
        """Every rank's tensor, in the order of the ranks; with first=True the first one's, into `tensor`."""
        others = [r for r in ranks if r != self.rank]
        if first:
            sends = [(tensor, r) for r in others] if self.rank == ranks[0] else []
            wait(exchange(sends, [] if sends else [(tensor, ranks[0])], self.group))
            return tensor
        parts = {r: torch.empty_like(tensor) for r in others}
        wait(exchange([(tensor, r) for r in others], [(parts[r], r) for r in others], self.group))
        return [(parts | {self.rank: tensor})[r] for r in ranks]
