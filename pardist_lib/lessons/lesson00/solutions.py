"""Reference solutions of lesson 00. Their signatures and docstrings are the blanks of the notebook."""

import torch
import torch.distributed as dist


def shard_rows(n: int, rank: int, world_size: int) -> range:
    """The rows of a data set that belong to one rank.

    n: how many rows there are, 0 or more. rank: 0 to world_size - 1.
    Returns a range: every row belongs to exactly one rank, and no rank has two rows more than
    another (10 rows on 4 ranks: three, three, two and two, whoever gets which).
    """
    return range(n * rank // world_size, n * (rank + 1) // world_size)


def average_gradients(model: torch.nn.Module, group=None) -> None:
    """Replace every gradient by its mean over the ranks. Called after backward(), on every rank.

    model: the same parameters on every rank; the gradients are each rank's own. A gradient is None
    on every rank or on none: where it is None (frozen, unused) it stays None.
    group: the ranks that average; None means all of them.
    In place: afterwards `p.grad` holds the mean, for each p of model.parameters(); the weights
    stay as they are.
    Sends: one dist.all_reduce of each gradient, or one of all gradients laid end to end; no
    other message.
    """
    n = dist.get_world_size(group)
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)  # the sum over the ranks, on every rank
            p.grad /= n


def average_used_gradients(model: torch.nn.Module, group=None) -> None:
    """average_gradients for models of which a rank may use only a part.

    A gradient may be None on some ranks only: those did not use the parameter, and count as zeros
    in the mean.
    In place: a parameter that at least one rank used has the mean as its `.grad` on every rank; one
    that no rank used keeps None; frozen parameters (requires_grad is False) keep None. The weights
    are not touched.
    Sends: as average_gradients, and one small all_reduce (at most 8 bytes a parameter) by which the
    ranks first agree on what was used.
    """
    n = dist.get_world_size(group)
    parameters = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    dist.all_reduce(used, group=group)  # by how many ranks
    for p, ranks in zip(parameters, used.tolist(), strict=True):
        if ranks > 0:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad, group=group)
            p.grad /= n
