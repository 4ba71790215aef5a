"""average_by_rows: wrong answers as people write them, and unusual right ones."""

import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging import utils
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pardist_lib.mechanisms.averaging import average_parameters
from tests.lessons.lesson05.shared import put_means
from tests.lessons.planted import mistake, right


def total_of(rows, group=None):
    total = torch.tensor([float(rows)], dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return total.item()


@mistake("average_by_rows", "the plain mean: a mean of means counts a rank with few rows as much as one with many")
def mean_of_means(model, rows, group=None):
    for p in model.parameters():
        if p.requires_grad:
            dist.all_reduce(p.data, group=group)
            p.data /= dist.get_world_size(group)


@mistake("average_by_rows", "the sum of the ranks' parameters: it has to be divided")
def only_adds(model, rows, group=None):
    for p in model.parameters():
        if p.requires_grad:
            dist.all_reduce(p.data, group=group)


@mistake("average_by_rows", "multiplied by the rows, but divided by the 4 ranks")
def divides_by_ranks(model, rows, group=None):
    for p in model.parameters():
        if p.requires_grad:
            p.data *= rows
            dist.all_reduce(p.data, group=group)
            p.data /= dist.get_world_size(group)


@mistake("average_by_rows", "divided by 4 once too often: the rows' shares add up to 1 already")
def divides_once_more(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.requires_grad:
            p.data *= rows / total
            dist.all_reduce(p.data, group=group)
            p.data /= dist.get_world_size(group)


@mistake("average_by_rows", "a mean was made but never reached the model")
def averages_a_new_tensor(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.requires_grad:
            p = p.detach() * rows / total
            dist.all_reduce(p, group=group)


@mistake("average_by_rows", "the gradient of fc1.weight has changed: average the parameters, not the gradients")
def averages_the_gradients(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows / total
            dist.all_reduce(p.grad, group=group)


@mistake("average_by_rows", "frozen.weight is frozen and has changed")
def averages_frozen_ones_too(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        p.data *= rows / total
        dist.all_reduce(p.data, group=group)


@mistake("average_by_rows", "the group argument is ignored: this is the mean over all ranks")
def forgets_the_group(model, rows, group=None):
    total = total_of(rows)
    for p in model.parameters():
        if p.requires_grad:
            p.data *= rows / total
            dist.all_reduce(p.data)


@mistake("average_by_rows", "the group argument is ignored where the rows are added up")
def forgets_the_group_once(model, rows, group=None):
    total = total_of(rows)
    for p in model.parameters():
        if p.requires_grad:
            p.data *= rows / total
            dist.all_reduce(p.data, group=group)


@mistake("average_by_rows", "the ranks do not make the same calls: a rank without rows has to take part too")
def skips_where_there_are_no_rows(model, rows, group=None):
    if rows == 0:
        return
    total = total_of(rows, group)
    for p in model.parameters():
        if p.requires_grad:
            p.data *= rows / total
            dist.all_reduce(p.data, group=group)


@mistake("average_by_rows", "it calls all_gather")
def gathers(model, rows, group=None):
    n, total = dist.get_world_size(group), total_of(rows, group)
    for p in model.parameters():
        if p.requires_grad:
            everyone = [torch.empty_like(p.data) for _ in range(n)]
            dist.all_gather(everyone, p.data * rows / total, group=group)
            p.data.copy_(sum(everyone))


@mistake("average_by_rows", "it calls the course's own `average_parameters`")
def takes_the_courses(model, rows, group=None):
    average_parameters(model, rows, group)


@mistake("average_by_rows", "each rank multiplied its own parameters by its share, and nothing was added up")
def adds_nothing_up(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.requires_grad:
            p.data *= rows / total


@mistake("average_by_rows", "a weight that two layers share comes up twice in modules()")
def once_for_each_layer(model, rows, group=None):
    total, before = total_of(rows, group), {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if p.requires_grad:
                mean = before.setdefault(p, p.data.clone()) * rows / total
                dist.all_reduce(mean, group=group)
                p.data.copy_(mean)


@mistake("average_by_rows", "the model has another fc1.weight now: write into the one that is there")
def makes_new_parameters(model, rows, group=None):
    put_means(model, rows / total_of(rows, group), group)


@mistake("average_by_rows", "unused.weight is not averaged: no loss has reached it, but it is trainable")
def averages_what_has_a_gradient(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.grad is not None:
            p.data *= rows / total
            dist.all_reduce(p.data, group=group)


@mistake("average_by_rows", "`statistics` has changed, which is a buffer")
def averages_buffers_too(model, rows, group=None):
    total = total_of(rows, group)
    for t in (*(p.data for p in model.parameters() if p.requires_grad), *model.buffers()):
        t *= rows / total
        dist.all_reduce(t, group=group)


@mistake("average_by_rows", "rows are added up as float16")
def adds_rows_up_in_16_bits(model, rows, group=None):
    total = torch.tensor([rows], dtype=torch.float16)
    dist.all_reduce(total, group=group)
    for p in model.parameters():
        if p.requires_grad:
            p.data *= rows / total.item()
            dist.all_reduce(p.data, group=group)


@right("average_by_rows")  # the share is a float32 tensor
def divides_integers(model, rows, group=None):
    total = torch.tensor(rows)
    dist.all_reduce(total, group=group)
    for p in model.parameters():
        if p.requires_grad:
            p.data *= rows / total
            dist.all_reduce(p.data, group=group)


@mistake("average_by_rows", "it calls torch's own average_parameters")
def takes_torchs_mean(model, rows, group=None):
    share, n = rows / total_of(rows, group), dist.get_world_size(group)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data *= share * n
    utils.average_parameters(iter(trained), group or dist.group.WORLD)


@mistake("average_by_rows", "fc1.bias is frozen and has changed")
def knows_the_frozen_ones_by_name(model, rows, group=None):
    total = total_of(rows, group)
    for name, p in model.named_parameters():
        if "frozen" not in name:
            p.data *= rows / total
            dist.all_reduce(p.data, group=group)


@mistake("average_by_rows", "fc1.weight takes no gradient any more: leave requires_grad as it was")
def leaves_all_frozen(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.requires_grad:
            p.requires_grad_(False)
            p *= rows / total
            dist.all_reduce(p, group=group)


@mistake("average_by_rows", "fc1.bias is not averaged, as the parameters before it are")
def leaves_out_biases(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.requires_grad and p.dim() > 1:
            p.data *= rows / total
            dist.all_reduce(p.data, group=group)


@mistake("average_by_rows", "a rank without rows has to take the mean over, too")
def keeps_its_own_where_it_has_no_rows(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.requires_grad:
            mean = p.data * (rows / total)
            dist.all_reduce(mean, group=group)
            if rows:
                p.data.copy_(mean)


@mistake("average_by_rows", "divided by all rows of an earlier call")
def counts_the_rows_once(model, rows, group=None, known={}):  # noqa: B006
    if group not in known:
        known[group] = total_of(rows, group)
    for p in model.parameters():
        if p.requires_grad:
            p.data *= rows / known[group]
            dist.all_reduce(p.data, group=group)


@mistake("average_by_rows", "the parameters are added up as bfloat16")
def sends_half_the_bytes(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.requires_grad:
            mean = (p.data * (rows / total)).bfloat16()
            dist.all_reduce(mean, group=group)
            p.data.copy_(mean)


@mistake("average_by_rows", "fc1.weight is zero everywhere")
def divides_whole_numbers(model, rows, group=None):
    total = int(total_of(rows, group))
    for p in model.parameters():
        if p.requires_grad:
            p.data *= rows // total
            dist.all_reduce(p.data, group=group)


@mistake("average_by_rows", "the plain mean")
def takes_its_own_rows_for_all(model, rows, group=None):
    total = rows * dist.get_world_size(group)
    for p in model.parameters():
        if p.requires_grad:
            p.data *= rows / max(total, 1)
            dist.all_reduce(p.data, group=group)


@right("average_by_rows")
def rebinds_the_data(model, rows, group=None):
    total = total_of(rows, group)
    for p in model.parameters():
        if p.requires_grad:
            mean = p.data * (rows / total)
            dist.all_reduce(mean, group=group)
            p.data = mean


@right("average_by_rows")
def with_the_rows_at_the_end_of_the_line(model, rows, group=None):
    trained = [p for p in model.parameters() if p.requires_grad]
    line = parameters_to_vector(trained).detach() * rows
    line = torch.cat([line, line.new_tensor([rows])])
    dist.all_reduce(line, group=group)
    vector_to_parameters(line[:-1] / line[-1], trained)


@right("average_by_rows")
def in_one_vector(model, rows, group=None):
    trained = [p for p in model.parameters() if p.requires_grad]
    line = parameters_to_vector(trained).detach() * (rows / total_of(rows, group))
    dist.all_reduce(line, group=group)
    vector_to_parameters(line, trained)


@right("average_by_rows")
@torch.no_grad()
def divides_afterwards(model, rows, group=None):
    total = torch.tensor(rows)
    dist.all_reduce(total, group=group)
    for p in model.parameters():
        if p.requires_grad:
            p.mul_(rows)
            dist.all_reduce(p, group=group)
            p.div_(total)
