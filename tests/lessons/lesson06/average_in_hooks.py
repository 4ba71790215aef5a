"""Wrong answers to average_in_hooks, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.nn.parallel import DistributedDataParallel

from tests.lessons.planted import mistake, right


@mistake("average_in_hooks", "a hook is given the parameter p, not its gradient p.grad")
def averages_what_it_is_given(model, group=None):
    def average(grad):
        dist.all_reduce(grad.data, group=group)
        grad.data /= dist.get_world_size(group)

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(average)


@mistake("average_in_hooks", "was not divided by 4, the number of ranks")
def hook_forgets_to_divide(model, group=None):
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad, group=group))


@mistake("average_in_hooks", "Does the hook use the loop's variable, which is the last parameter by then?")
def late_binding(model, group=None):
    for p in model.parameters():
        if p.requires_grad:

            def average(_):
                dist.all_reduce(p.grad, group=group)  # noqa: B023
                p.grad /= dist.get_world_size(group)  # noqa: B023

            p.register_post_accumulate_grad_hook(average)


@mistake("average_in_hooks", "the group argument is ignored")
def hook_ignores_the_group(model, group=None):
    def average(p):
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(average)


@mistake("average_in_hooks", "nothing was exchanged")
def averages_right_away(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)


@mistake("average_in_hooks", "cannot register a hook on a tensor that doesn't require gradient")
def hooks_on_frozen_ones(model, group=None):
    def average(p):
        dist.all_reduce(p.grad, group=group)
        p.grad /= dist.get_world_size(group)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(average)


@mistake("average_in_hooks", "never waited for")
def hook_does_not_wait(model, group=None):
    def average(p):
        dist.all_reduce(p.grad, group=group, async_op=True)
        p.grad /= dist.get_world_size(group)

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(average)


@mistake("average_in_hooks", "is averaged, ")
def only_the_last_layer(model, group=None):
    def average(p):
        dist.all_reduce(p.grad, group=group)
        p.grad /= dist.get_world_size(group)

    for p in list(model.parameters())[-2:]:
        p.register_post_accumulate_grad_hook(average)


@mistake("average_in_hooks", "hooks should return None")
def hook_returns_the_mean(model, group=None):
    def average(p):
        mean = p.grad.clone()
        dist.all_reduce(mean, group=group)
        return mean / dist.get_world_size(group)

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(average)


@mistake("average_in_hooks", "it calls torch's own DistributedDataParallel")
def by_ddp(model, group=None):
    DistributedDataParallel(model, process_group=group)


@mistake("average_in_hooks", "nothing was exchanged")
def only_once(model, group=None):
    handles = {}

    def average(p):
        dist.all_reduce(p.grad, group=group)
        p.grad /= dist.get_world_size(group)
        handles[p].remove()

    for p in model.parameters():
        if p.requires_grad:
            handles[p] = p.register_post_accumulate_grad_hook(average)


@mistake("average_in_hooks", "register_hook is given a gradient on its way")
def tensor_hooks_in_place(model, group=None):
    def average(gradient):
        dist.all_reduce(gradient, group=group)
        gradient /= dist.get_world_size(group)

    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(average)


@right("average_in_hooks")
def tensor_hooks(model, group=None):
    def average(gradient):
        mean = gradient / dist.get_world_size(group)
        dist.all_reduce(mean, group=group)
        return mean

    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(average)


@right("average_in_hooks")
def asynchronous_hooks(model, group=None):
    n, works, left = dist.get_world_size(group), [], []

    def average(p):
        p.grad /= n
        works.append(dist.all_reduce(p.grad, group=group, async_op=True))
        if not left:
            left.append(None)
            torch.autograd.Variable._execution_engine.queue_callback(finish)

    def finish():
        for work in works:
            work.wait()
        works.clear(), left.clear()

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(average)


def each_hooked(model, hook):
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(hook)


@mistake("average_in_hooks", "rank 1 does not make the calls that the others make: its gradients are zero here")
def hook_skips_zeros(model, group=None):
    def average(p):
        if p.grad.any():
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)

    each_hooked(model, average)


@mistake("average_in_hooks", "no element of the gradient of fc1.weight is right")
def hook_adds_up_over_steps(model, group=None):
    total = {}

    def average(p):
        dist.all_reduce(p.grad, group=group)
        total[p] = total.get(p, 0) + p.grad / dist.get_world_size(group)
        p.grad = total[p].clone()

    each_hooked(model, average)


@mistake("average_in_hooks", "the result is right, but 6,144 bytes are all-reduced for 1,664")
def every_hook_averages_all(model, group=None):
    def average(_):
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad, group=group)
                p.grad /= dist.get_world_size(group)

    each_hooked(model, average)


@mistake("average_in_hooks", "the means are made after backward, not in it")
def when_backward_has_ended(model, group=None):
    queued = []

    def average():
        queued.clear()
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad, group=group)
                p.grad /= dist.get_world_size(group)

    def queue(_):
        if not queued:
            queued.append(torch.autograd.Variable._execution_engine.queue_callback(average))

    each_hooked(model, queue)


@right("average_in_hooks")
def hooks_of_the_accumulators(model, group=None):
    """As DDP does it: a hook of the node that adds to p.grad, which has to be kept alive."""
    model.accumulators = []
    for p in model.parameters():
        if p.requires_grad:

            def average(*_, p=p):
                dist.all_reduce(p.grad, group=group)
                p.grad /= dist.get_world_size(group)

            model.accumulators.append(p.expand_as(p).grad_fn.next_functions[0][0])
            model.accumulators[-1].register_hook(average)


@right("average_in_hooks")
def hooks_with_futures(model, group=None):
    def average(p):
        p.grad /= dist.get_world_size(group)
        dist.all_reduce(p.grad, group=group, async_op=True).get_future().wait()

    each_hooked(model, average)


@mistake("average_in_hooks", "has a gradient before any backward")
def begins_with_zeros(model, group=None):
    def average(p):
        dist.all_reduce(p.grad, group=group)
        p.grad /= dist.get_world_size(group)

    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    each_hooked(model, average)


@right("average_in_hooks")
def one_message_under_way(model, group=None):
    """Waits for the last message when the next gradient is there, and for the very last when backward is over."""
    n, under_way = dist.get_world_size(group), []

    def finish():
        while under_way:
            gradient, work = under_way.pop()
            work.wait()
            gradient /= n

    def average(p):
        if not under_way:
            torch.autograd.Variable._execution_engine.queue_callback(finish)
        finish()
        under_way.append((p.grad, dist.all_reduce(p.grad, group=group, async_op=True)))

    each_hooked(model, average)


@right("average_in_hooks")
def functional_and_lazy(model, group=None):
    def average(p):
        p.grad = functional.all_reduce(p.grad / dist.get_world_size(group), "sum", group or dist.group.WORLD)

    each_hooked(model, average)


def averaging(group):
    def average(p):
        dist.all_reduce(p.grad, group=group)
        p.grad /= dist.get_world_size(group)

    return average


@mistake("average_in_hooks", "a frozen parameter has no gradient to wait for: ask p.requires_grad")
def every_parameter_hooked(model, group=None):
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(averaging(group))


@mistake("average_in_hooks", "p.requires_grad tells which have one")
def asks_for_a_gradient_too_early(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            p.register_post_accumulate_grad_hook(averaging(group))


@mistake("average_in_hooks", "Is the hook called at once")
def calls_the_hook(model, group=None):
    average = averaging(group)
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(average(p))


@mistake("average_in_hooks", "torch calls such a hook with the parameter alone")
def hook_wants_the_group(model, group=None):
    each_hooked(model, lambda p, group: averaging(group)(p))


@mistake("average_in_hooks", "p.grad / n alone makes a new tensor")
def divides_into_nothing(model, group=None):
    def average(p):
        dist.all_reduce(p.grad, group=group)
        p.grad / dist.get_world_size(group)  # noqa: B018

    each_hooked(model, average)


@mistake("average_in_hooks", "this hook is a parameter's, not the model's")
def hook_of_the_model(model, group=None):
    model.register_post_accumulate_grad_hook(averaging(group))


@mistake("average_in_hooks", "such a hook returns nothing: it writes into p.grad")
def hook_returns_a_pair(model, group=None):
    n = dist.get_world_size(group)
    each_hooked(model, lambda p: (p.grad.div_(n), dist.all_reduce(p.grad, group=group)))
