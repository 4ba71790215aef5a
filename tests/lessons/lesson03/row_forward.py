"""row_forward: wrong answers as people write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.nn import functional as F

from tests.lessons.lesson03.shared import function, summed
from tests.lessons.planted import mistake, right


@mistake("row_forward", "the bias is added 4 times, once by each rank")
def bias_on_every_rank(x, weight, bias, group=None):
    y = F.linear(x, weight, bias)
    dist.all_reduce(y, group=group)
    return y


@mistake("row_forward", "the bias is left out")
def no_bias_at_all(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, group=group)
    return y


@mistake("row_forward", "in the output of rank 0 only")
def bias_on_rank_0_too_late(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, group=group)
    return y + bias if dist.get_rank(group) == 0 and bias is not None else y


@mistake("row_forward", "nothing was added up")
def no_sum(x, weight, bias, group=None):
    return F.linear(x, weight, bias)


@mistake("row_forward", "not their mean")
def the_mean(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, group=group)
    y /= dist.get_world_size(group)
    return y if bias is None else y + bias


@mistake("row_forward", "all_gather, which brings every summand")
def gathers_the_summands(x, weight, bias, group=None):
    y = x @ weight.T
    parts = [torch.empty_like(y) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, y, group=group)
    return sum(parts) if bias is None else sum(parts) + bias


@mistake("row_forward", "reduce, which brings the sum to one rank only")
def to_rank_0(x, weight, bias, group=None):
    y = x @ weight.T
    dist.reduce(y, dst=0, group=group)
    return y if bias is None else y + bias


@mistake("row_forward", "the group argument is ignored")
def all_the_world(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y)
    return y if bias is None else y + bias


@mistake("row_forward", "`bias` was changed")
def adds_into_the_bias(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, group=group)
    if bias is None:
        return y
    bias.div_(1)  # harmless so far
    bias += 1
    return y + bias - 1


@mistake("row_forward", "2 all_reduce")
def reduces_the_bias_too(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, group=group)
    if bias is None:
        return y
    mean = bias.clone()
    dist.all_reduce(mean, group=group)
    return y + mean / dist.get_world_size(group)


@mistake("row_forward", "where bias is None")
def always_a_bias(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, group=group)
    return y + bias


@mistake("row_forward", "MAX over the ranks")
def the_largest(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, op=dist.ReduceOp.MAX, group=group)
    return y if bias is None else y + bias


@mistake("row_forward", "`bias` gets a gradient on some ranks only")
def one_rank_brings_the_bias(x, weight, bias, group=None):
    y = F.linear(x, weight, bias if dist.get_rank(group) == 0 else None)
    dist.all_reduce(y.data, group=group)
    return y


@mistake("row_forward", "gets a share of its gradient")
def everybody_brings_a_share_of_the_bias(x, weight, bias, group=None):
    y = F.linear(x, weight) + (0 if bias is None else bias / dist.get_world_size(group))
    dist.all_reduce(y.data, group=group)
    return y


@mistake("row_forward", "`x` gets no gradient")
def sums_a_copy(x, weight, bias, group=None):
    y = (x @ weight.T).detach()
    dist.all_reduce(y, group=group)
    return y if bias is None else y + bias


@mistake("row_forward", "`weight` gets no gradient")
def weights_without_autograd(x, weight, bias, group=None):
    y = g_of(x @ weight.data.T, group)
    return y if bias is None else y + bias


@mistake("row_forward", "its backward 4 times too large")
def sums_backward_too(x, weight, bias, group=None):
    y = function(lambda y: summed(y, group), lambda g: summed(g, group))(x @ weight.T)
    return y if bias is None else y + bias


@mistake("row_forward", "goes on to each summand whole")
def divides_backward(x, weight, bias, group=None):
    y = function(lambda y: summed(y, group), lambda g: g / dist.get_world_size(group))(x @ weight.T)
    return y if bias is None else y + bias


@mistake("row_forward", "but backward calls all_reduce")
def averages_equal_gradients(x, weight, bias, group=None):
    n = dist.get_world_size(group)
    y = function(lambda y: summed(y, group), lambda g: summed(g, group) / n)(x @ weight.T)
    return y if bias is None else y + bias


def g_of(y, group=None):
    return function(lambda y: summed(y, group), lambda g: g)(y)


@right("row_forward")
def with_g(x, weight, bias, group=None):
    y = g_of(F.linear(x, weight), group)
    return y if bias is None else y + bias


@right("row_forward")
def behind_autograds_back(x, weight, bias, group=None):
    y = x @ weight.T
    others = summed(y.detach(), group) - y.detach()
    return y + others if bias is None else y + others + bias


@right("row_forward")
def in_place_unseen(x, weight, bias, group=None):
    y = F.linear(x, weight)
    with torch.no_grad():
        dist.all_reduce(y, group=group)
    return y if bias is None else y + bias


@right("row_forward")
def a_functional_collective(x, weight, bias, group=None):
    """It waits where its result is used: without a bias, after the answer has returned."""
    y = function(lambda y: functional.all_reduce(y, "sum", group or dist.group.WORLD), lambda g: g)(F.linear(x, weight))
    return y if bias is None else y + bias


@mistake("row_forward", "its backward 4 times too large")
def a_functional_collective_with_its_own_backward(x, weight, bias, group=None):
    y = functional.all_reduce(x @ weight.T, "sum", group or dist.group.WORLD)
    return y if bias is None else y + bias


@mistake("row_forward", "x and weight are cut once more")
def cuts_what_is_cut(x, weight, bias, group=None):
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    y = g_of(x.tensor_split(n, -1)[rank] @ weight.tensor_split(n, -1)[rank].T, group)
    return y if bias is None else y + bias


@mistake("row_forward", "What a collective returns is None, too")
def returns_what_all_reduce_gives(x, weight, bias, group=None):
    y = F.linear(x, weight)
    return dist.all_reduce(y.data, group=group)


@mistake("row_forward", "the sum was made in a copy that is not returned")
def returns_the_summand(x, weight, bias, group=None):
    y = F.linear(x, weight)
    summed(y.detach(), group)
    return y if bias is None else y + bias


@mistake("row_forward", "this is f, which adds up backward")
def f_in_place_of_g(x, weight, bias, group=None):
    y = function(lambda y: y.view_as(y), lambda g: summed(g, group))(F.linear(x, weight))
    return y if bias is None else y + bias


@mistake("row_forward", "(3, 2) @ (5, 2) wants the second one turned, .T")
def does_not_turn_the_weight(x, weight, bias, group=None):
    return g_of(x @ weight, group)


@mistake("row_forward", "the bias is added 4 times before the all_reduce, once by each rank, and once more after it")
def bias_before_and_after(x, weight, bias, group=None):
    return g_of(F.linear(x, weight, bias), group) + bias
