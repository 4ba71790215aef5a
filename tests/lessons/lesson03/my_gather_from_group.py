"""my_gather_from_group: wrong answers as people write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as with_backward

from tests.lessons.lesson03.shared import function, place, summed
from tests.lessons.planted import mistake, right


def gathered(x, group=None):
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return parts


@mistake("my_gather_from_group", "autograd does not know where the result comes from")
def no_backward(x, group=None):
    return torch.cat(gathered(x, group), -1)


@mistake("my_gather_from_group", "adding 4 equal ones counts it 4 times")
def sums_slices(x, group=None):
    rank, n = place(group)
    return function(lambda x: torch.cat(gathered(x, group), -1),
                    lambda g: summed(g, group).tensor_split(n, -1)[rank])(x)  # fmt: skip


@mistake("my_gather_from_group", "4 times too large")
def torchs_own_backward(x, group=None):
    return torch.cat(with_backward.all_gather(x, group or dist.group.WORLD), -1)


@mistake("my_gather_from_group", "the parts lie one under the other")
def under_each_other(x, group=None):
    parts = gathered(x, group)
    parts[dist.get_rank(group)] = x
    return torch.cat(parts)


@mistake("my_gather_from_group", "every rank gets rank 0's slice")
def slice_of_rank_0(x, group=None):
    _, n = place(group)
    return function(lambda x: torch.cat(gathered(x, group), -1), lambda g: g.tensor_split(n, -1)[0])(x)


@mistake("my_gather_from_group", "x stands where rank 0's part belongs")
def in_the_first_place(x, group=None):
    parts = gathered(x, group)
    parts[0] = x
    return torch.cat(parts, -1)


@mistake("my_gather_from_group", "a rank's own part comes first")
def own_part_first(x, group=None):
    rank, parts = dist.get_rank(group), gathered(x, group)
    return torch.cat([x, *parts[:rank], *parts[rank + 1 :]], -1)


@mistake("my_gather_from_group", "a rank's slice goes on as it is")
def divides(x, group=None):
    rank, n = place(group)
    return function(lambda x: torch.cat(gathered(x, group), -1), lambda g: g.tensor_split(n, -1)[rank] / n)(x)


@mistake("my_gather_from_group", "which adds the parts up")
def adds(x, group=None):
    return function(lambda x: summed(x, group), lambda g: g)(x)


@mistake("my_gather_from_group", "the group argument is ignored")
def of_all(x, group=None):
    parts = gathered(x)
    parts[dist.get_rank()] = x
    return torch.cat(parts, -1)


@mistake("my_gather_from_group", "but backward calls all_reduce")
def an_average_of_equals(x, group=None):
    rank, n = place(group)
    return function(lambda x: torch.cat(gathered(x, group), -1),
                    lambda g: (summed(g, group) / n).tensor_split(n, -1)[rank])(x)  # fmt: skip


@mistake("my_gather_from_group", "the gradient that came in was changed")
def scales_in_place(x, group=None):
    rank, n = place(group)
    return function(lambda x: torch.cat(gathered(x, group), -1),
                    lambda g: g.mul_(n).div_(n).add_(0.5).tensor_split(n, -1)[rank] - 0.5)(x)  # fmt: skip


@right("my_gather_from_group")
def with_a_function(x, group=None):
    rank, n = place(group)
    return function(lambda x: torch.cat(gathered(x, group), -1), lambda g: g.tensor_split(n, -1)[rank])(x)


@right("my_gather_from_group")
def a_functional_collective(x, group=None):
    whole = functional.all_gather_tensor(x.detach(), x.dim() - 1, group or dist.group.WORLD)
    rank, own = dist.get_rank(group), x.shape[-1]
    return whole.slice_scatter(x, -1, rank * own, (rank + 1) * own)


@right("my_gather_from_group")
def into_one_tensor(x, group=None):
    rank, n = place(group)
    whole = x.new_empty(n * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.detach().contiguous(), group=group)
    return torch.cat([x if r == rank else part for r, part in enumerate(whole.chunk(n))], -1)


@mistake("my_gather_from_group", "the stacked form, (n, 3, …), is for nccl only")
def stacked(x, group=None):
    whole = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather_into_tensor(whole, x.detach().contiguous(), group=group)
    return torch.cat(list(whole), -1)


@mistake("my_gather_from_group", "[t] * n is one tensor n times")
def one_tensor_four_times(x, group=None):
    parts = [torch.empty_like(x)] * dist.get_world_size(group)
    dist.all_gather(parts, x.detach(), group=group)
    return torch.cat(parts, -1)


@mistake("my_gather_from_group", "but in its own place")
def one_tensor_but_for_its_own(x, group=None):
    rank, n = place(group)
    parts = [torch.empty_like(x)] * n
    dist.all_gather(parts, x.detach(), group=group)
    parts[rank] = x
    return torch.cat(parts, -1)


@mistake("my_gather_from_group", "features are the last dimension, -1")
def along_dimension_1(x, group=None):
    parts = gathered(x, group)
    parts[dist.get_rank(group)] = x
    return torch.cat(parts, 1 if x.dim() > 1 else 0)


@mistake("my_gather_from_group", "stack makes a new dimension")
def stacks(x, group=None):
    return torch.stack(gathered(x, group), -1)


@mistake("my_gather_from_group", "dist.get_rank(group) counts in the group")
def the_worlds_rank(x, group=None):
    parts = gathered(x, group)
    parts[dist.get_rank()] = x
    return torch.cat(parts, -1)


@mistake("my_gather_from_group", "so it has that shape, (3, 2)")
def the_whole_gradient(x, group=None):
    return function(lambda x: torch.cat(gathered(x, group), -1), lambda g: g)(x)


@mistake("my_gather_from_group", "adding 4 equal ones counts it 4 times")
def reduce_scatters(x, group=None):
    def backward(g):
        slices = [part.contiguous() for part in g.tensor_split(dist.get_world_size(group), -1)]
        own = torch.empty_like(slices[0])
        dist.reduce_scatter(own, slices, group=group)
        return own

    return function(lambda x: torch.cat(gathered(x, group), -1), backward)(x)


@mistake("my_gather_from_group", "the result is a list of 4 tensors")
def returns_the_list(x, group=None):
    return gathered(x, group)
