"""What banks of this lesson share."""

import torch
import torch.distributed as dist


def summed(value, group=None):
    value = torch.tensor([float(value)], dtype=torch.float64)
    dist.all_reduce(value, group=group)
    return value.item()
