"""Answers to mean_without_late: wrong ones as people write them, and unusual right ones."""

import torch
import torch.distributed as dist

from tests.lessons.lesson08.shared import summed
from tests.lessons.planted import mistake, right


def both(total, many, group=None):
    total, many = total.clone(), torch.as_tensor(many)
    dist.all_reduce(total, group=group)
    dist.all_reduce(many, group=group)
    return total, many if many.dim() else int(many)


@mistake("mean_without_late", "the dropped ranks' rows are still counted")
def counts_dropped_rows(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), rows, group)
    return total / many, many


@mistake("mean_without_late", "late ranks are not dropped")
def drops_nobody(gradient, rows, late, group=None):
    total, many = both(gradient, rows, group)
    return total / many, many


@mistake("mean_without_late", "the late ranks' gradients are still in it, only their rows are not")
def drops_rows_only(gradient, rows, late, group=None):
    total, many = both(gradient, 0 if late else rows, group)
    return total / many, many


@mistake("mean_without_late", "a late rank has to take part in the all_reduce")
def goes_home(gradient, rows, late, group=None):
    if late:
        return gradient, 0
    total, many = both(gradient, rows, group)
    return total / many, many


@mistake("mean_without_late", "ranks that were in time: by their rows")
def divides_by_punctual_ranks(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), 0 if late else rows, group)
    return total / int(summed(not late, group)), many


@mistake("mean_without_late", "a mean of means")
def averages_means(gradient, rows, late, group=None):
    both_counts = torch.tensor([0 if late else rows, 0 if late else 1])
    mean, (many, ranks) = both(gradient * 0 if late else gradient / max(rows, 1), both_counts, group)
    return mean / ranks.item(), int(many)


@mistake("mean_without_late", "multiplied by the rows")
def takes_sums_for_means(gradient, rows, late, group=None):
    total, many = both(gradient * 0 if late else gradient * rows, 0 if late else rows, group)
    return total / many, many


@mistake("mean_without_late", "the punctual were dropped")
def drops_the_punctual(gradient, rows, late, group=None):
    total, many = both(gradient * late, rows if late else 0, group)
    return total / max(many, 1), many


@mistake("mean_without_late", "a late rank keeps its own gradient")
def keeps_its_own(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), 0 if late else rows, group)
    return (gradient.clone() if late else total / many), many


@mistake("mean_without_late", "the number of rows is all ranks' rows")
def tells_all_rows(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), torch.tensor([0 if late else rows, rows]), group)
    return total / many[0].item(), int(many[1])


@mistake("mean_without_late", "the number of rows is this rank's own rows")
def tells_its_own_rows(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), 0 if late else rows, group)
    return total / many, rows


@mistake("mean_without_late", "the group argument is ignored where the rows are added up")
def forgets_the_group_for_rows(gradient, rows, late, group=None):
    total = gradient * (not late)
    dist.all_reduce(total, group=group)
    many = int(summed(0 if late else rows))
    return total / many, many


@mistake("mean_without_late", "`gradient` has changed")
def writes_into_its_gradient(gradient, rows, late, group=None):
    if late:
        gradient.zero_()
    total, many = both(gradient, 0 if late else rows, group)
    return total / many, many


@mistake("mean_without_late", "the number of rows is to be an int")
def returns_a_tensor(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), 0 if late else rows, group)
    return total / many, float(many)


@mistake("mean_without_late", "a tensor of 8 bits")
def counts_them_in_a_byte(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), torch.tensor(0 if late else rows, dtype=torch.uint8), group)
    return total / many, many


@right("mean_without_late")
def one_line(gradient, rows, late, group=None):
    line = torch.cat([gradient, gradient.new_tensor([float(rows)])]) * (0.0 if late else 1.0)
    dist.all_reduce(line, group=group)
    return line[:-1] / line[-1], round(line[-1].item())
