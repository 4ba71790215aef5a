"""What lesson 01's picture of the collectives needs besides the calls themselves: who brings what, who receives."""

import torch
import torch.distributed as dist


def frames(ranks, calls):
    """A picture for each of `calls`, {collective's name: function of (mine, received)}, run on the ranks.

    mine      what a rank brings: its number in the tens and 0 to n - 1 in the ones; of scatter, rank 0 alone has a
              list of n tensors; to gather and all_gather each rank brings one number. None where it brings nothing.
    received  zeros to write into, as long as what the rank shall have; of gather, rank 0's list of tensors; None
              where the call leaves its result in `mine`, or the rank receives nothing.
    """
    from pardist_lib.pictures import collective  # here: ranks import this file, too, and draw nothing

    pictures = []
    for name, call in calls.items():
        before, after = zip(*ranks.run(_around, name, call, quiet=True), strict=True)
        pictures.append(collective(name, before, after))
    return pictures


def _around(name, call):
    """On a rank: (what it had before the call, what it has after it)."""
    rank, n = dist.get_rank(), dist.get_world_size()
    mine, received, first = 10 * rank + torch.arange(n), None, rank == 0
    if name == "scatter":
        mine, received = list(mine.split(1)) if first else None, torch.zeros(1, dtype=torch.int64)
    elif name in ("gather", "all_gather"):
        mine, room = mine[:1].clone(), torch.zeros(n, dtype=torch.int64)
        received = room if name == "all_gather" else list(room.split(1)) if first else None
    elif name in ("reduce_scatter", "all_to_all"):
        received = torch.zeros(n if name == "all_to_all" else 1, dtype=torch.int64)
    before = _joined(mine)
    call(mine, received)
    if name == "reduce" or name == "gather":
        return before, _joined(mine if name == "reduce" else received) if first else None
    return before, _joined(mine if received is None else received)


def _joined(tensors):
    """A copy, of a list as one tensor; None where there is nothing."""
    return torch.cat(tensors) if isinstance(tensors, list) else None if tensors is None else tensors.clone()
