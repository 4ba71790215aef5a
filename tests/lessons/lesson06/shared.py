"""What several banks of this lesson share."""

import torch.distributed as dist


def all_reduced(model, group, divide_by):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= divide_by
