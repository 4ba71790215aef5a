"""What several banks of this lesson share."""

import torch
import torch.distributed as dist


def gathered(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts
