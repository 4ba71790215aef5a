"""What several banks of this lesson share."""

import torch
import torch.distributed as dist


def place(group=None):
    return dist.get_rank(group), dist.get_world_size(group)


def function(forward, backward):
    """A torch.autograd.Function of two functions, applied."""
    parts = {"forward": staticmethod(lambda ctx, x: forward(x)), "backward": staticmethod(lambda ctx, g: backward(g))}
    return type("Made", (torch.autograd.Function,), parts).apply


def summed(g, group=None, op=dist.ReduceOp.SUM):
    total = g.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op=op, group=group)
    return total
