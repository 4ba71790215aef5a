"""Who am I, how many are we, who has which share: what every mechanism asks of a process group.

This file imports only torch; every room of this folder may import it.
"""

import torch.distributed as dist


def rank_and_size(group=None):
    """(this rank's number within the group, ranks in the group). Raises ValueError outside the group.

    group: a process group; None for all ranks.
    """
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in this group: only its members may call its collectives")
    return rank, dist.get_world_size(group)


def within(group, root):
    """The number within the group of the global rank `root`. Raises ValueError where it is not in the group."""
    rank_and_size(group)
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    if root not in members:
        raise ValueError(f"rank {root} is not in the group of ranks {members}")
    return members.index(root)


def split_sizes(length, n):
    """Rows in each of the `n` chunks that `torch.tensor_split` cuts: the first ones may have one more."""
    return [length // n + (i < length % n) for i in range(n)]


def check_optimizer(module, optimizer):
    """Raise ValueError where the optimizer holds parameters that are not the module's: what is averaged, or served,
    would not be what it steps with."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if strangers := held - {id(p) for p in module.parameters()}:
        raise ValueError(
            f"{len(strangers)} of the optimizer's {len(held)} parameters are not the module's: make it of "
            "module.parameters()"
        )
