"""What several banks of this lesson share."""

import torch
import torch.distributed as dist


def put_means(model, share, group=None):
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.requires_grad:
                mean = p.data * share
                dist.all_reduce(mean, group=group)
                setattr(module, name, torch.nn.Parameter(mean))
