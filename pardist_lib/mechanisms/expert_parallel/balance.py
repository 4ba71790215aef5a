"""What keeps experts equally busy: a loss that pushes the router, or a bias that moves the choice without a gradient.

Sources: Fedus et al., "Switch Transformers" (2021), section 2.2, equations 4 to 6, for the loss; DeepSeek-AI,
"DeepSeek-V3" (2024), section 2.1.2, for the bias.
"""

import torch
import torch.distributed as dist

from ..collectives.autograd import copy_to_group, reduce_from_group
from ..group import rank_and_size
from .checks import check_loss
from .routing import Router, count


def load_balancing_loss(probabilities, chosen, group=None, *, alpha=1.0):
    """α·E·Σ f·P over the experts: f is an expert's share of all choices, P its mean probability. α where all are equal.

    probabilities: (T, E), chosen: (T, k), as in a `Routing`; f counts choices before any is dropped, and has no
    gradient. Shares of choices, counts/(T·k), as Megatron and DeepSeek have it: Mixtral's published code leaves out k.

    group: the data-parallel ranks. f and P are then means over the tokens of all of them, the loss is the same number
    on each, and the mean of their gradients is one process's. With None it is the *local* loss, of this rank's tokens
    alone, here unlike elsewhere in this library: the mean of local losses is another number, since each is a product
    of two means. Sends an all-reduce of 2E + 1 numbers forward, and one backward. Raises ValueError for other shapes
    and for experts that there are not.
    """
    check_loss(probabilities, chosen)
    experts = probabilities.size(1)
    sums = torch.cat([probabilities.sum(0), count(chosen, experts), probabilities.new_tensor([len(chosen)])])
    if group is not None:
        sums = copy_to_group(reduce_from_group(sums, group), group)  # each rank's loss is a loss of all ranks' sums
    p, visits, tokens = sums.split([experts, experts, 1])
    tokens = tokens.detach().clamp(min=1)
    return alpha * experts * (visits.detach() / (chosen.size(1) * tokens) * p / tokens).sum()


@torch.no_grad()
def update_expert_bias(model, group=None):
    """b += γ·sign(mean load − load) for every router of `model` that has a bias: once for each step of the optimizer.

    A load is how often an expert was chosen, before any dropping, in training since the last call: in all micro-batches
    of the step, and by the tokens of all ranks of `group`. group: all data-parallel ranks; None for all there are, or
    this process where torch.distributed is not in use. Sends an all-reduce of the E's of all routers.
    Raises ValueError where no router has a bias.
    """
    routers = [m for m in model.modules() if isinstance(m, Router) and m.expert_bias is not None]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no router with a bias: give its layers bias_update_rate=0.001")
    loads = torch.cat([router.loads for router in routers])
    if dist.is_initialized() and rank_and_size(group)[1] > 1:
        dist.all_reduce(loads, group=group)
    for router, load in zip(routers, loads.split([router.experts for router in routers]), strict=True):
        router.expert_bias += router.bias_update_rate * torch.sign(load.sum() - router.experts * load)
        router.loads.zero_()
