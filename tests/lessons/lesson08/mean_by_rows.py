"""Answers to mean_by_rows: wrong ones as people write them, and unusual right ones."""

import torch
import torch.distributed as dist

from tests.lessons.lesson08.shared import summed
from tests.lessons.planted import mistake, right


def weighted(gradient, rows):
    return gradient * rows if rows else torch.zeros_like(gradient)


@mistake("mean_by_rows", "a mean of means")
def mean_of_means(gradient, rows, group=None):
    mean = gradient.nan_to_num().clone()
    dist.all_reduce(mean, group=group)
    return mean / dist.get_world_size(group)


@mistake("mean_by_rows", "multiplied by the rows and never divided")
def never_divides(gradient, rows, group=None):
    total = weighted(gradient, rows)
    dist.all_reduce(total, group=group)
    return total


@mistake("mean_by_rows", "ranks, not by all")
def divides_by_ranks(gradient, rows, group=None):
    total = weighted(gradient, rows)
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


@mistake("mean_by_rows", "the weight is n · n_r / N")
def weights_as_for_ddp(gradient, rows, group=None):
    total = weighted(gradient, rows) * dist.get_world_size(group) / summed(rows, group)
    dist.all_reduce(total, group=group)
    return total


@mistake("mean_by_rows", "ranks as well: the weights n_r / N add up to 1 already")
def weights_and_averages(gradient, rows, group=None):
    total = weighted(gradient, rows) / summed(rows, group)
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


@mistake("mean_by_rows", "divided by this rank's own rows")
def divides_by_own_rows(gradient, rows, group=None):
    total = weighted(gradient, rows)
    dist.all_reduce(total, group=group)
    return total / max(rows, 1)


@mistake("mean_by_rows", "each has to be multiplied by its own rows first")
def forgets_the_weights(gradient, rows, group=None):
    total = gradient.nan_to_num().clone()
    dist.all_reduce(total, group=group)
    return total / summed(rows, group)


@mistake("mean_by_rows", "a rank without rows makes everybody's mean NaN")
def multiplies_nan_by_zero(gradient, rows, group=None):
    total = gradient * rows
    dist.all_reduce(total, group=group)
    return total / summed(rows, group)


@mistake("mean_by_rows", "a rank without rows takes part, with zeros")
def stays_away_without_rows(gradient, rows, group=None):
    if not rows:
        return torch.zeros_like(gradient)
    total = gradient * rows
    dist.all_reduce(total, group=group)
    return total / summed(rows, group)


@mistake("mean_by_rows", "the group argument is ignored: this is the mean over all ranks")
def forgets_the_group(gradient, rows, group=None):
    total = weighted(gradient, rows)
    dist.all_reduce(total)
    return total / summed(rows)


@mistake("mean_by_rows", "the group argument is ignored where the rows are added up")
def forgets_the_group_once(gradient, rows, group=None):
    total = weighted(gradient, rows)
    dist.all_reduce(total, group=group)
    return total / summed(rows)


@mistake("mean_by_rows", "`gradient` has changed")
def writes_into_the_gradient(gradient, rows, group=None):
    gradient.mul_(rows).nan_to_num_()
    dist.all_reduce(gradient, group=group)
    return gradient / summed(rows, group)


@mistake("mean_by_rows", "nothing was exchanged")
def stays_alone(gradient, rows, group=None):
    return gradient.clone()


@mistake("mean_by_rows", "the mean hides it")
def mends_every_nan(gradient, rows, group=None):
    total = gradient.nan_to_num() * rows
    dist.all_reduce(total, group=group)
    return total / summed(rows, group)


@mistake("mean_by_rows", "a tensor of 8 bits")
def counts_in_a_byte(gradient, rows, group=None):
    total, many = weighted(gradient, rows), torch.tensor([rows], dtype=torch.uint8)
    dist.all_reduce(total, group=group)
    dist.all_reduce(many, group=group)
    return total / many.item()


@right("mean_by_rows")
def in_one_message(gradient, rows, group=None):
    line = torch.cat([gradient * rows if rows else torch.zeros_like(gradient), gradient.new_tensor([float(rows)])])
    dist.all_reduce(line, group=group)
    return line[:-1] / line[-1]


@right("mean_by_rows")
def weights_first(gradient, rows, group=None):
    share = rows / summed(rows, group)
    mean = share * gradient if rows else gradient.new_zeros(gradient.shape)
    dist.all_reduce(mean, group=group)
    return mean
