"""Wrong answers to average_gradients, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from tests.lessons.planted import mistake, right


@mistake("average_gradients", "was not divided by 4, the number of ranks: every element is 4 times too large")
def forgot_to_divide(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)


@mistake("average_gradients", "the sum was divided by 3, not by the number of ranks, 4")
def divides_by_its_rows(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= 3


@mistake("average_gradients", "the weights have changed")
def averages_the_weights(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.data, group=group)
            p.data /= dist.get_world_size(group)


@mistake("average_gradients", "only fc1.weight is averaged, fc1.bias still holds each rank's own gradient")
def only_the_first(model, group=None):
    p = next(model.parameters())
    dist.all_reduce(p.grad, group=group)
    p.grad /= dist.get_world_size(group)


@mistake("average_gradients", "it broadcasts one rank's gradients")
def broadcasts_rank_0(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.broadcast(p.grad, 0, group=group)


@mistake("average_gradients", "it takes the MAX over the ranks")
def takes_the_largest(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, dist.ReduceOp.MAX, group=group)


@mistake("average_gradients", "divided twice by 4")
def divides_before_and_after(model, group=None):
    n = dist.get_world_size(group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= n
            dist.all_reduce(p.grad, group=group)
            p.grad /= n


@mistake("average_gradients", "an average was made but never reached p.grad")
def averages_a_copy(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            g = p.grad.clone()
            dist.all_reduce(g, group=group)
            g /= dist.get_world_size(group)


@mistake("average_gradients", "nothing was exchanged")
def does_nothing(model, group=None):
    return None


@mistake("average_gradients", "divided by the number of all ranks, 4, where the group has 2")
def divides_by_the_whole_world(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size()


@mistake("average_gradients", "the group argument is ignored: this is the mean over all ranks")
def ignores_the_group(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


@mistake("average_gradients", "the group argument is ignored in all_reduce")
def ignores_the_group_in_the_sum(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size(group)


@mistake("average_gradients", "frozen.weight had no gradient on any rank (it is frozen) and now has one")
def fills_with_zeros(model, group=None):
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad, group=group)
        p.grad /= dist.get_world_size(group)


@mistake("average_gradients", "(the gradient of frozen.weight is None)")
def no_thought_of_none(model, group=None):
    for p in model.parameters():
        dist.all_reduce(p.grad, group=group)
        p.grad /= dist.get_world_size(group)


@mistake("average_gradients", "(the gradient of unused.weight is None)")
def asks_requires_grad_only(model, group=None):
    for p in model.parameters():
        if p.requires_grad:
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)


@mistake("average_gradients", "it changed requires_grad (fc1.weight is the first)")
def freezes_what_it_has_done(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)
            p.requires_grad_(False)


@mistake("average_gradients", "p.grad of fc1.weight is None afterwards: was it cleared (zero_grad)?")
def clears_up_afterwards(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)
    model.zero_grad()


@mistake("average_gradients", "divided by 4 into a new tensor that does not reach p.grad")
def binds_the_mean_to_a_name(model, group=None):
    n = dist.get_world_size(group)
    for p in model.parameters():
        if p.grad is not None:
            g = p.grad
            dist.all_reduce(g, group=group)
            g = g / n


@mistake("average_gradients", "makes all_reduce(float64 [8, 6], SUM)")
def in_an_order_of_its_own(model, group=None):
    parameters = [p for p in model.parameters() if p.grad is not None]
    for p in parameters if dist.get_rank() else parameters[::-1]:
        dist.all_reduce(p.grad, group=group)
        p.grad /= dist.get_world_size(group)


@mistake("average_gradients", "never waited for")
def does_not_wait(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group, async_op=True)
            p.grad /= dist.get_world_size(group)


@mistake("average_gradients", "it calls reduce, which brings the sum to one rank only")
def reduces_to_rank_0(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.reduce(p.grad, 0, group=group)
            p.grad /= dist.get_world_size(group)


@mistake("average_gradients", "it calls all_gather")
def gathers_everything(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            everyone = [torch.empty_like(p.grad) for _ in range(dist.get_world_size(group))]
            dist.all_gather(everyone, p.grad, group=group)
            p.grad = torch.stack(everyone).mean(0)


@mistake("average_gradients", "a weight that two layers share comes up twice")
def twice_for_the_tied_weight(model, group=None):
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if p.grad is not None:
                dist.all_reduce(p.grad, group=group)
                p.grad /= dist.get_world_size(group)


@mistake("average_gradients", "calls for 7 gradients")
def element_by_element(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            for row in p.grad:
                dist.all_reduce(row, group=group)
            p.grad /= dist.get_world_size(group)


@mistake("average_gradients", "only fc1.weight, fc1.bias … is averaged, extra.weight still holds")
def stops_at_the_first_none(model, group=None):
    for p in model.parameters():
        if p.grad is None:
            break
        dist.all_reduce(p.grad, group=group)
        p.grad /= dist.get_world_size(group)


@mistake("average_gradients", "no element of the gradient of fc1.weight is right")
def adds_noise(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad = p.grad / dist.get_world_size(group) + 0.01


@mistake("average_gradients", "through float32")
def sends_half_the_digits(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            g = p.grad.float()
            dist.all_reduce(g, group=group)
            p.grad.copy_(g / dist.get_world_size(group))


@mistake("average_gradients", "was not divided by 4")
def divides_on_rank_0_only(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            if dist.get_rank(group) == 0:
                p.grad /= dist.get_world_size(group)


@mistake("average_gradients", "bytes are all-reduced for")
def functional_and_too_often(model, group=None):
    group = group or dist.group.WORLD
    for p in model.parameters():
        if p.grad is not None:
            for _ in range(2):
                p.grad = functional.all_reduce(p.grad, "avg", group).clone()


@mistake("average_gradients", "its gradients are zero here, not None, and count")
def saves_calls_for_zeros(model, group=None):
    for p in model.parameters():
        if p.grad is not None and p.grad.any():
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)


@mistake("average_gradients", "fc1.bias holds the beginning of the flat tensor")
def never_moves_on_in_the_flat_tensor(model, group=None):
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for g in gradients:
        g.copy_(flat[: g.numel()].view_as(g))


@mistake("average_gradients", "steps are the optimizer's")
def makes_the_step_too(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)
            p.data -= 0.01 * p.grad


@mistake("average_gradients", "did its values go through 16 bits?")
def sends_16_bits(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            g = p.grad.half()
            dist.all_reduce(g, group=group)
            p.grad.copy_(g / dist.get_world_size(group))


@mistake("average_gradients", "it calls torch's own DistributedDataParallel")
def wraps_it_in_ddp(model, group=None):
    torch.nn.parallel.DistributedDataParallel(model, process_group=group)


@right("average_gradients")
def one_flat_tensor(model, group=None):
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


@right("average_gradients")
def by_avg(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG, group=group)


@right("average_gradients")
def divides_first(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.div_(dist.get_world_size(group))
            dist.all_reduce(p.grad, group=group)


@right("average_gradients")
def all_at_once(model, group=None):
    parameters = [p for p in model.parameters() if p.grad is not None]
    for work in [dist.all_reduce(p.grad, group=group, async_op=True) for p in parameters]:
        work.wait()
    for p in parameters:
        p.grad = p.grad / dist.get_world_size(group)


@right("average_gradients")
def functionally(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            p.grad = functional.all_reduce(p.grad, "avg", group or dist.group.WORLD).clone()
