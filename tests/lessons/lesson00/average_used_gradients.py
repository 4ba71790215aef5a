"""Wrong answers to average_used_gradients, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist

from tests.lessons.planted import mistake, right


@mistake("average_used_gradients", "the ranks do not make the same calls: where p.grad is None")
def skips_none(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)


@mistake("average_used_gradients", "unused.weight had no gradient on any rank (no rank used it) and now has one")
def zeros_for_all_that_is_trainable(model, group=None):
    for p in model.parameters():
        if p.requires_grad:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)


@mistake("average_used_gradients", "divided by the number of ranks that used it, 2, not by 4")
def divides_by_the_users(model, group=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    dist.all_reduce(used, group=group)
    for p, ranks in zip(parameters, used.tolist(), strict=True):
        if ranks:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad, group=group)
            p.grad /= ranks


@mistake("average_used_gradients", "no gradient for extra.weight, which another rank used")
def leaves_none_where_it_was(model, group=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    dist.all_reduce(used, group=group)
    for p, ranks in zip(parameters, used.tolist(), strict=True):
        if ranks:
            g = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(g, group=group)
            g /= dist.get_world_size(group)


@mistake("average_used_gradients", "was not divided by 4")
def flags_right_mean_forgotten(model, group=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    dist.all_reduce(used, group=group)
    for p, ranks in zip(parameters, used.tolist(), strict=True):
        if ranks:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad, group=group)


@mistake("average_used_gradients", "it was zero, which is not the same as None")
def takes_zero_for_unused(model, group=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p) if g.any() else None


@mistake("average_used_gradients", "it calls all_gather")
def gathers_flags_as_objects(model, group=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    flags = [None] * dist.get_world_size(group)
    dist.all_gather_into_tensor(
        torch.empty(len(flags) * len(parameters)), torch.tensor([float(p.grad is not None) for p in parameters]), group
    )


def averaged_where(used, parameters, group):
    for p, ranks in zip(parameters, used.tolist(), strict=True):
        if ranks > 0:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)


@mistake("average_used_gradients", "the flags are summed over all ranks: `group` is missing from that all_reduce")
def flags_of_all_ranks(model, group=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    dist.all_reduce(used)
    averaged_where(used, parameters, group)


@mistake("average_used_gradients", "zero gradients were skipped, zero is not None")
def zero_flags_for_zeros(model, group=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([p.grad is not None and bool(p.grad.any()) for p in parameters], dtype=torch.int32)
    dist.all_reduce(used, group=group)
    averaged_where(used, parameters, group)


@mistake("average_used_gradients", "averaged only where every rank used it: extra.weight")
def flags_by_min(model, group=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    dist.all_reduce(used, dist.ReduceOp.MIN, group=group)
    averaged_where(used, parameters, group)


@mistake("average_used_gradients", "pickles what it sends: make a tensor of it, and send that")
def agrees_by_objects(model, group=None):
    flags = [None] * dist.get_world_size(group)
    dist.all_gather_object(flags, [p.grad is not None for p in model.parameters()], group)


@mistake("average_used_gradients", "the ranks do not make the same calls")
def asks_the_others_in_its_own_group_only(model, group=None):
    used = [p for p in model.parameters() if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in used])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for p, g in zip(used, flat.split([p.numel() for p in used]), strict=True):
        p.grad.copy_(g.view_as(p))


@right("average_used_gradients")
def flags_in_the_flat_tensor(model, group=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    used = torch.tensor([float(p.grad is not None) for p in parameters], dtype=parts[0].dtype)
    flat = torch.cat([*parts, used])
    dist.all_reduce(flat, group=group)
    *means, used = (flat / dist.get_world_size(group)).split([*(p.numel() for p in parameters), len(parameters)])
    for p, mean, share in zip(parameters, means, used.tolist(), strict=True):
        if share > 0:
            p.grad = mean.view_as(p).clone()


@right("average_used_gradients")
def bytes_and_max(model, group=None):
    parameters = list(model.parameters())
    used = torch.tensor([p.grad is not None for p in parameters]).byte()
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
    for p, anyone in zip(parameters, used.tolist(), strict=True):
        if anyone:
            g = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(g, group=group)
            p.grad = g / dist.get_world_size(group)
