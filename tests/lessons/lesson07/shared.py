"""What several banks of this lesson share."""

import torch
import torch.distributed as dist


def mine(parameters):
    return parameters.chunk(dist.get_world_size())[dist.get_rank()]


def whole(shard, out_features):
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, shard)
    return torch.cat(shards).view(out_features, -1)
