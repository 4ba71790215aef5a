"""A mixture-of-experts layer whose experts are shared out among ranks.

Sources: Lepikhin et al., "GShard" (2020), sections 2 and 3; Fedus et al., "Switch Transformers" (2021), section 5;
Megatron-LM's token dispatcher by all-to-all.
"""

import torch
import torch.distributed as dist

from ..collectives.autograd import all_to_all_in_group
from ..group import rank_and_size, split_sizes
from .checks import check_group, check_input, check_moe, same_everywhere
from .dealing import deal, mark, of_first_rank, unsplit, whole_experts
from .experts import through_experts
from .moe import Layer, MoE
from .routing import combine, count, kept_visits, sort_by_expert
from .traffic import Traffic


class ExpertParallel(Layer):
    """An `MoE` over the ranks of a group: every rank has tokens of its own and some of the experts.

    Rank r has the experts that torch.tensor_split(n)[r] gives it, by their own numbers; router and shared experts are
    on every rank. The ranks of the group are data-parallel ranks as well: each comes with other tokens, as many as it
    likes. When backward returns, an expert's gradient is the sum over the tokens of the whole group, all others have
    this rank's tokens only: `average_gradients` makes one process's of both.

    An expert may itself be split by tensor parallelism: split the MoE's experts first, over ranks that have the same
    tokens, then deal them out over ranks that have the same parts.

    Sends an all-to-all of T·k·hidden elements to the experts and one back, minus what stays on this rank: T·k·hidden·
    (1 − 1/n) where all experts are as busy. As much again backward, whether or not the input needs a gradient, so
    backward has to pass through this layer on all ranks. Before them one of E whole numbers, how many tokens will come,
    which each rank reads: a GPU is waited for here. `traffic` has the true numbers.

    Making one gives about 60 bytes a parameter to all_gather_object; the group's first rank sends each expert to its
    owner and the rest to all. Raises ValueError for a module that is no MoE, for more ranks than experts (some would
    compute nothing), for ranks whose modules differ, and outside the group.
    """

    def __init__(self, moe, group=None):
        check_group(group)
        check_moe(moe, group)
        same_everywhere(moe, group)
        rank, n = rank_and_size(group)
        owned = split_sizes(len(moe.experts), n)
        router, shared = of_first_rank(moe.router, group), of_first_rank(moe.shared, group)
        super().__init__(router, deal(moe.experts, owned, group), shared, moe.capacity_factor)
        self.rank, self.n, self.group, self.owned = rank, n, group, owned  # owned: experts on each rank
        self.router.loads.zero_()
        self._last = (
            None  # of the last forward: visits to each expert, what was chosen, bytes of an element there and back
        )
        mark(self)
        self.train(moe.training)

    @classmethod
    def from_module(cls, moe, group=None):
        """The layer that gives what the `moe` of the group's first rank gives; the module itself stays as it is. Also a
        style for `parallelize`, whose group is then the experts'."""
        return cls(moe, group)

    def to_module(self):
        """The whole `MoE`, exactly, on every rank: each expert is broadcast by its owner. All ranks have to call it."""
        experts = whole_experts(self.experts, self.owned, self.group)
        return MoE.of(unsplit(self.router), experts, unsplit(self.shared), self.capacity_factor).train(self.training)

    def forward(self, x):
        """x: (…, hidden), this rank's own tokens → the same shape."""
        check_input(self, x)
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # else a rank with nothing to train here would be missed in backward
        rows = x.reshape(-1, self.hidden)  # (T, hidden)
        self.routing = self.router(rows)  # route
        kept = kept_visits(self.routing.chosen, self.router.experts, self.capacity_factor)
        visits = sort_by_expert(self.routing.chosen, self.router.experts, kept)  # sort

        arriving = self._arriving(visits.counts)  # (n, own experts)
        to_ranks = torch.stack([part.sum() for part in visits.counts.split(self.owned)]).tolist()
        from_ranks = arriving.sum(1).tolist()
        arrived = all_to_all_in_group(rows[visits.token], to_ranks, from_ranks, self.group)  # send
        order, counts = _by_expert(arriving)
        outputs = through_experts(self.experts.values(), arrived[order], counts)  # compute
        returned = all_to_all_in_group(outputs[order.argsort()], from_ranks, to_ranks, self.group)  # send back

        y = combine(returned, self.routing, visits, rows)  # combine
        if self.shared is not None:
            y = y + self.shared(rows)
        self._last = visits.counts, self.routing.chosen, rows.element_size(), returned.element_size()
        return y.view(x.shape)

    def traffic(self):
        """The `Traffic` of the group in its last forward; all ranks have to call it. All-gathers 2E numbers."""
        if self._last is None:
            raise ValueError(f"rank {self.rank}: no forward yet, so there is no traffic to tell of")
        kept, chosen, *elements = self._last
        dropped = count(chosen, len(kept)) - kept
        mine = torch.cat([kept, dropped])
        everyone = [torch.empty_like(mine) for _ in range(self.n)]
        dist.all_gather(everyone, mine, group=self.group)
        visits, dropped = torch.stack(everyone).cpu().split(len(kept), 1)
        return Traffic(visits, dropped, tuple(self.owned), *(self.hidden * element for element in elements))

    def _arriving(self, counts):
        """(n, own experts): visits that each rank sends to each of this rank's experts. counts: (E,), this rank's."""
        own = self.owned[self.rank]
        arriving = counts.new_empty(self.n, own)
        dist.all_to_all_single(arriving.view(-1), counts, [own] * self.n, self.owned, self.group)
        return arriving

    def __setstate__(self, state):  # of a copy
        super().__setstate__(state)
        mark(self)


def _by_expert(arriving):
    """What arrives lies rank after rank, each rank's in the order of experts. ((rows,) which ones to take so that they
    lie expert after expert, [visits to each expert])."""
    experts = torch.arange(arriving.size(1), device=arriving.device).repeat(arriving.size(0))
    return experts.repeat_interleave(arriving.flatten()).argsort(stable=True), arriving.sum(0).tolist()
