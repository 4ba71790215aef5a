"""my_copy_to_group: wrong answers as people write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from pardist_lib.mechanisms.collectives.autograd import copy_to_group
from tests.lessons.lesson03.shared import function, summed
from tests.lessons.planted import mistake, right


@mistake("my_copy_to_group", "the all_reduce is missing")
def nothing_backward(x, group=None):
    return x.view_as(x) * 1


@mistake("my_copy_to_group", "their mean is 4 times too small")
def mean_backward(x, group=None):
    return function(lambda x: x.view_as(x), lambda g: summed(g, group) / dist.get_world_size(group))(x)


@mistake("my_copy_to_group", "forward sends nothing")
def sums_forward(x, group=None):
    return function(lambda x: summed(x, group), lambda g: g)(x)


@mistake("my_copy_to_group", "the gradient that came in was changed")
def sums_in_place(x, group=None):
    def backward(g):
        dist.all_reduce(g, group=group)
        return g

    return function(lambda x: x.view_as(x), backward)(x)


@mistake("my_copy_to_group", "autograd does not know where the result comes from")
def cut_off(x, group=None):
    return x.detach().clone()


@mistake("my_copy_to_group", "give the result a hook of its own, not x")
def hook_on_x(x, group=None):
    if x.requires_grad:
        x.register_hook(lambda g: summed(g, group))
    return x.view_as(x)


@mistake("my_copy_to_group", "the group argument is ignored")
def everybody(x, group=None):
    return function(lambda x: x.view_as(x), summed)(x)


@mistake("my_copy_to_group", "where x needs no gradient")
def hook_on_data(x, group=None):
    y = x.view_as(x)
    y.register_hook(lambda g: summed(g, group))
    return y


@mistake("my_copy_to_group", "the course's own")
def the_courses_own_f(x, group=None):
    return copy_to_group(x, group)


@mistake("my_copy_to_group", "where the gradient is one number for all elements")
def contiguous_gradients_only(x, group=None):
    def backward(g):
        total = g.clone() if g.stride() == torch.empty(g.shape).stride() else g.clone().mul_(torch.tensor(0.5))
        dist.all_reduce(total, group=group)
        return total

    def backward_of_strided(g):
        return summed(g, group) if 0 not in g.stride() else backward(g)

    return function(lambda x: x.view_as(x), backward_of_strided)(x)


@mistake("my_copy_to_group", "backward calls all_gather")
def gathers_the_gradients(x, group=None):
    def backward(g):
        g = g.contiguous()
        parts = [torch.empty_like(g) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, g, group=group)
        return sum(parts)

    return function(lambda x: x.view_as(x), backward)(x)


@mistake("my_copy_to_group", "backward's async_op=True was never waited for")
def does_not_wait(x, group=None):
    def backward(g):
        total = g.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group, async_op=True)
        return total

    return function(lambda x: x.view_as(x), backward)(x)


@mistake("my_copy_to_group", "autograd does not come back to x")
def begins_anew(x, group=None):
    return function(lambda x: x.view_as(x), lambda g: summed(g, group))(x.detach().requires_grad_())


@right("my_copy_to_group")
def hook_on_the_result(x, group=None):
    y = x.view_as(x)
    if y.requires_grad:
        y.register_hook(lambda g: summed(g, group))
    return y


@right("my_copy_to_group")
def hook_of_an_alias(x, group=None):
    y = torch.ops.aten.alias(x)
    if y.requires_grad:
        y.register_hook(lambda g: functional.all_reduce(g, "sum", group or dist.group.WORLD))
    return y


@right("my_copy_to_group")
def asynchronous_and_in_place(x, group=None):
    def backward(g):
        total = g.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group, async_op=True).wait()
        return total

    return function(lambda x: x, backward)(x)  # forward gives back what it got, as Megatron's does


class WithGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return summed(g, ctx.group)


@mistake("my_copy_to_group", "None for what is no tensor (a group): 2 of them")
def one_gradient_for_two_arguments(x, group=None):
    return WithGroup.apply(x, group)


@mistake("my_copy_to_group", "WithGroup.apply(x) calls it")
def makes_an_object(x, group=None):
    return WithGroup(x, group)


@mistake("my_copy_to_group", "is it Copy.apply(x)?")
def calls_forward(x, group=None):
    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, g):
            return summed(g, group)

    return Copy.forward(None, x)


@mistake("my_copy_to_group", "the first thing it is given is ctx")
def forgets_ctx(x, group=None):
    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.view_as(x)

        @staticmethod
        def backward(g):
            return summed(g, group)

    return Copy.apply(x)


@mistake("my_copy_to_group", "backward gives None for `x`: does it end without a return")
def returns_what_all_reduce_returns(x, group=None):
    return function(lambda x: x.view_as(x), lambda g: dist.all_reduce(g.clone(), group=group))(x)


@mistake("my_copy_to_group", "its own part times 4")
def multiplies_by_the_ranks(x, group=None):
    return function(lambda x: x.view_as(x), lambda g: g * dist.get_world_size(group))(x)
