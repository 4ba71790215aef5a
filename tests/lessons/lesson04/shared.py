"""What several banks of this lesson share."""

import torch
import torch.distributed as dist


def me():
    return dist.get_rank(), dist.get_world_size()


def edges(vocabulary):
    rank, n = me()
    words = torch.arange(vocabulary).tensor_split(n)[rank]
    return int(words[0]), int(words[-1]) + 1
