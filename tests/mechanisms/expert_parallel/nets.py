"""What tests of experts share: layers, tokens that crowd where they are told to, and a small net."""

import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import group_of
from pardist_lib.mechanisms.expert_parallel import ExpertParallel, MoE, average_gradients, load_balancing_loss

HIDDEN = 6
ROWS = (3, 0, 5, 4)  # tokens of each rank


def layer(experts=5, top_k=2, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return MoE(HIDDEN, 7, experts, top_k, dtype=dtype, **options)


def tokens(rows, seed=1, dtype=torch.float64):
    """[each rank's tokens]. The first feature is 1, for a router to act on."""
    x = torch.randn(sum(rows), HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 0] = 1
    return x.to(dtype).split(list(rows))


def crowd(moe, favourites):
    """Every token chooses these experts, in this order."""
    with torch.no_grad():
        moe.router.weight.mul_(0.01)
        for place, expert in enumerate(favourites):
            moe.router.weight[expert, 0] = 5.0 - place
    return moe


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def groups_of(ep):
    """(the group of this rank's experts, the ranks with the same ones or None), of all ranks in groups of `ep`."""
    rank, n = dist.get_rank(), dist.get_world_size()
    if ep == n:
        return None, None
    experts = [group_of(range(first, first + ep)) for first in range(0, n, ep)]
    replicas = [group_of(range(place, n, ep)) for place in range(ep)]
    return experts[rank // ep], replicas[rank % ep]


class Net(nn.Module):
    """Two layers of experts, each beside its input, between linear layers."""

    def __init__(self, dtype=torch.float64, **options):
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN, dtype=dtype)
        self.layers = nn.ModuleList(layer(seed=seed, dtype=dtype, **options) for seed in (3, 4))
        self.last = nn.Linear(HIDDEN, 2, dtype=dtype)

    def forward(self, x, **senders):
        x = torch.tanh(self.first(x))
        for experts in self.layers:
            x = x + experts(x, **senders)
        return self.last(x)

    def balance(self, group=None):
        return sum(
            load_balancing_loss(m.routing.probabilities, m.routing.chosen, group, alpha=0.1) for m in self.layers
        )

    def over(self, group=None):
        """Its layers' experts shared out."""
        self.layers = nn.ModuleList(ExpertParallel.from_module(m, group) for m in self.layers)
        return self


def step_on_ranks(net, x, all_tokens, groups):
    """Backward of a rank's share of the mean over all tokens, and of the balance; gradients are one process's."""
    n = dist.get_world_size()
    y = net(x)
    (n * y.square().sum() / all_tokens + net.balance(dist.group.WORLD)).backward()
    average_gradients(net, None, groups[1])
    return y.detach()
