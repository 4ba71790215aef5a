"""Wrong answers to weighted_gradients, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist

from tests.lessons.lesson06.shared import all_reduced
from tests.lessons.planted import mistake, right


def total_of(rows, group):
    total = torch.tensor(rows)
    dist.all_reduce(total, group=group)
    return total.item()


@mistake("weighted_gradients", "this is the mean of the ranks' means")
def plain_mean(model, rows, group=None):
    total_of(rows, group)
    all_reduced(model, group, dist.get_world_size(group))


@mistake("weighted_gradients", "4 times too small: the parts rows / total add up to 1")
def weighted_and_divided(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows / total
    all_reduced(model, group, dist.get_world_size(group))


@mistake("weighted_gradients", "not divided by all rows: it is the sum over all rows")
def rows_times_gradient(model, rows, group=None):
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows
    all_reduced(model, group, 1)


@mistake("weighted_gradients", "divided by 4 ranks, not by 11 rows")
def divided_by_ranks(model, rows, group=None):
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows
    all_reduced(model, group, dist.get_world_size(group))


@mistake("weighted_gradients", "the ranks' gradients are weighted, but not added up")
def never_added_up(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows / total


@mistake("weighted_gradients", "zero: rows // total is an integer division")
def integer_division(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows // total
    all_reduced(model, group, 1)


@mistake("weighted_gradients", "the rows are counted over all ranks of the world")
def rows_of_the_world(model, rows, group=None):
    total = total_of(rows, None)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows / total
    all_reduced(model, group, 1)


@mistake("weighted_gradients", "a rank without rows has to take part, too")
def stays_away_without_rows(model, rows, group=None):
    if rows:
        weighted(model, rows, group)


@mistake("weighted_gradients", "the largest number of rows is divided by")
def divides_by_the_largest(model, rows, group=None):
    most = torch.tensor(rows)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows / most.item()
    all_reduced(model, group, 1)


@mistake("weighted_gradients", "more travels than each gradient once")
def rows_with_each_gradient(model, rows, group=None):
    for p in model.parameters():
        if p.grad is not None:
            total = total_of(rows, group)
            p.grad *= rows / total
            dist.all_reduce(p.grad, group=group)


def weighted(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows / total
            dist.all_reduce(p.grad, group=group)


@right("weighted_gradients")
def divides_after_the_sum(model, rows, group=None):
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows
    all_reduced(model, group, total_of(rows, group))


def weighs(model, rows, group, kind, n=1):
    total = torch.tensor(rows, dtype=kind)
    dist.all_reduce(total, group=group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= n * rows / total.item()
            dist.all_reduce(p.grad, group=group)


@mistake("weighted_gradients", "the number of rows does not survive the type it travels in")
def counts_in_half_precision(model, rows, group=None):
    weighs(model, rows, group, torch.float16)


@mistake("weighted_gradients", "without overflow")
def counts_in_a_byte(model, rows, group=None):
    weighs(model, rows, group, torch.uint8)


@mistake("weighted_gradients", "4 times too large: n · rows / total wants the mean")
def adds_where_a_mean_is_meant(model, rows, group=None):
    weighs(model, rows, group, torch.float64, dist.get_world_size(group))


@right("weighted_gradients")
def all_in_one_tensor(model, rows, group=None):
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() * rows for g in gradients] + [gradients[0].new_tensor([rows])])
    dist.all_reduce(flat, group=group)
    for g, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g) / flat[-1])


@mistake("weighted_gradients", "it calls all_gather for the number of rows")
def gathers_the_rows(model, rows, group=None):
    counts = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([rows]), group=group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows / sum(counts).item()
            dist.all_reduce(p.grad, group=group)


@mistake("weighted_gradients", "it calls broadcast for the number of rows")
def rows_of_the_first(model, rows, group=None):
    first = torch.tensor(rows)
    dist.broadcast(first, group=group, group_src=0)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows / (first.item() * dist.get_world_size(group))
            dist.all_reduce(p.grad, group=group)


@mistake("weighted_gradients", "the ranks do not make the same calls, in the same order")
def smallest_gradients_first(model, rows, group=None):
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    total = total_of(rows, group)
    for g in sorted(gradients, key=lambda g: g.abs().sum().item()):
        g *= rows / total
        dist.all_reduce(g, group=group)


@right("weighted_gradients")
def means_of_means(model, rows, group=None):
    mean = torch.tensor(float(rows))
    dist.all_reduce(mean, dist.ReduceOp.AVG, group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(rows / mean.item())
            dist.all_reduce(p.grad, dist.ReduceOp.AVG, group)


@right("weighted_gradients")
def counts_while_gradients_travel(model, rows, group=None):
    total = torch.tensor([rows], dtype=torch.int32)
    counted = dist.all_reduce(total, group=group, async_op=True)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    works = [dist.all_reduce(g.mul_(rows), group=group, async_op=True) for g in gradients]
    counted.wait()
    for g, work in zip(gradients, works, strict=True):
        work.wait()
        g /= total


@mistake("weighted_gradients", "it works once; is something kept from the first call?")
def counts_only_once(model, rows, group=None, known=[]):  # noqa: B006
    known += [] if known else [total_of(rows, group)]
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows / known[0]
            dist.all_reduce(p.grad, group=group)


@mistake("weighted_gradients", "it changed requires_grad (unused.weight is the first)")
def freezes_what_is_unused(model, rows, group=None):
    for p in model.parameters():
        if p.grad is None:
            p.requires_grad_(False)
    weighted(model, rows, group)


@right("weighted_gradients")
def a_tensor_as_part(model, rows, group=None):
    total = torch.tensor([rows])
    dist.all_reduce(total, group=group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows / total  # float32
            dist.all_reduce(p.grad, group=group)


@mistake("weighted_gradients", "4 times too small: the parts rows / total add up to 1")
def a_tensor_as_part_and_divided(model, rows, group=None):
    total = torch.tensor([float(rows)])
    dist.all_reduce(total, group=group)
    part = rows / total
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= part
    all_reduced(model, group, dist.get_world_size(group))


@mistake("weighted_gradients", "upside down: a rank's part of all rows is rows / total")
def total_over_rows(model, rows, group=None):
    total = torch.tensor(float(rows))
    dist.all_reduce(total, group=group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= total / rows
            dist.all_reduce(p.grad, group=group)


@mistake("weighted_gradients", "the sum is divided by this rank's own rows")
def divides_by_its_own_rows(model, rows, group=None):
    total = torch.tensor(rows)
    dist.all_reduce(total, group=group)
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= rows


@mistake("weighted_gradients", "the result went into new tensors and p.grad is as it was")
def weighs_new_tensors(model, rows, group=None):
    total = torch.tensor(rows)
    dist.all_reduce(total, group=group)
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad * rows / total, group=group)


@mistake("weighted_gradients", "it is a number there: torch.tensor(…) makes a tensor of it")
def reduces_a_number(model, rows, group=None):
    dist.all_reduce(rows, group=group)


@mistake("weighted_gradients", "what a collective returned, which works in place?")
def takes_what_all_reduce_returns(model, rows, group=None):
    total = dist.all_reduce(torch.tensor(rows), group=group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows / total
