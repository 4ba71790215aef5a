"""Wrong answers to accumulate_gradients, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from tests.lessons.lesson06.shared import all_reduced
from tests.lessons.planted import mistake, right


@mistake("accumulate_gradients", "3 times too large: 3 micro-batches are added up")
def micro_batches_not_divided(model, batches, loss_of, group=None):
    model.zero_grad()
    for x, y in batches:
        loss_of(model, x, y).backward()
    all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "the sum over the ranks was not divided by 4")
def ranks_not_divided(model, batches, loss_of, group=None):
    model.zero_grad()
    for x, y in batches:
        (loss_of(model, x, y) / len(batches)).backward()
    all_reduced(model, group, 1)


@mistake("accumulate_gradients", "only the last micro-batch is in it")
def zero_in_the_loop(model, batches, loss_of, group=None):
    for x, y in batches:
        model.zero_grad()
        loss_of(model, x, y).backward()
    all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "the old gradient is still in it")
def forgets_zero_grad(model, batches, loss_of, group=None):
    for x, y in batches:
        (loss_of(model, x, y) / len(batches)).backward()
    all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "it sends 3 times: once, after the last micro-batch, is enough")
def sends_every_time(model, batches, loss_of, group=None):
    model.zero_grad()
    for x, y in batches:
        (loss_of(model, x, y) / len(batches)).backward()
        all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "the activations of all of them are in memory at once")
def one_backward(model, batches, loss_of, group=None):
    model.zero_grad()
    (sum(loss_of(model, x, y) for x, y in batches) / len(batches)).backward()
    all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "loss_of has to see each micro-batch once")
def one_big_batch(model, batches, loss_of, group=None):
    model.zero_grad()
    loss_of(model, torch.cat([x for x, _ in batches]), batches[0][1]).backward()
    all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "the ranks' gradients are not exchanged")
def all_alone(model, batches, loss_of, group=None):
    model.zero_grad()
    for x, y in batches:
        (loss_of(model, x, y) / len(batches)).backward()


@mistake("accumulate_gradients", "it is divided twice by the number of ranks")
def divided_by_the_ranks_twice(model, batches, loss_of, group=None):
    n = dist.get_world_size(group)
    model.zero_grad()
    for x, y in batches:
        (loss_of(model, x, y) / len(batches) / n).backward()
    all_reduced(model, group, n)


@right("accumulate_gradients")
def divides_at_the_end(model, batches, loss_of, group=None):
    for p in model.parameters():
        p.grad = None
    for x, y in batches:
        loss_of(model, x, y).backward()
    all_reduced(model, group, dist.get_world_size(group) * len(batches))


@right("accumulate_gradients")
def gradients_by_hand(model, batches, loss_of, group=None):
    parameters, total = [p for p in model.parameters() if p.requires_grad], {}
    model.zero_grad()
    for x, y in batches:
        grads = torch.autograd.grad(loss_of(model, x, y), parameters, allow_unused=True)
        for p, g in zip(parameters, grads, strict=True):
            if g is not None:
                total[p] = total.get(p, 0) + g
                p.grad = total[p]
    all_reduced(model, group, dist.get_world_size(group) * len(batches))


def accumulated(model, batches, loss_of, **how):
    model.zero_grad()
    for x, y in batches:
        (loss_of(model, x, y) / len(batches)).backward(**how)


@mistake("accumulate_gradients", "the weights have changed (fc1.weight is the first)")
def steps_as_well(model, batches, loss_of, group=None):
    accumulated(model, batches, loss_of)
    all_reduced(model, group, dist.get_world_size(group))
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@mistake("accumulate_gradients", "still in memory when the next one begins")
def retains_the_graphs(model, batches, loss_of, group=None):
    losses = []
    model.zero_grad()
    for x, y in batches:
        losses.append(loss_of(model, x, y) / len(batches))
        losses[-1].backward(retain_graph=True)
    all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "`batches` was changed")
def empties_the_list(model, batches, loss_of, group=None):
    k = len(batches)
    model.zero_grad()
    while batches:
        (loss_of(model, *batches.pop(0)) / k).backward()
    all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "`batches` was changed")
def overwrites_the_rows(model, batches, loss_of, group=None):
    accumulated(model, batches, loss_of)
    for x, _ in batches:
        x.zero_()
    all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "the ranks' mean is made before the last micro-batch is in")
def exchanges_too_early(model, batches, loss_of, group=None):
    model.zero_grad()
    for i, (x, y) in enumerate(batches):
        if i == len(batches) - 1:
            all_reduced(model, group, dist.get_world_size(group))
        (loss_of(model, x, y) / len(batches)).backward()


@mistake("accumulate_gradients", "the ranks' mean is made before the last micro-batch is in")
def exchanges_the_first(model, batches, loss_of, group=None):
    model.zero_grad()
    for i, (x, y) in enumerate(batches):
        (loss_of(model, x, y) / len(batches)).backward()
        if i == 0:
            all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "the last micro-batch is left out")
def skips_the_last(model, batches, loss_of, group=None):
    model.zero_grad()
    for x, y in batches[:-1]:
        (loss_of(model, x, y) / len(batches)).backward()
    all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "the ranks' losses are averaged, not their gradients")
def averages_the_losses(model, batches, loss_of, group=None):
    model.zero_grad()
    for x, y in batches:
        loss = loss_of(model, x, y) / len(batches)
        dist.all_reduce(loss.data, group=group)
        (loss / dist.get_world_size(group)).backward()


@mistake("accumulate_gradients", "one forward of each is enough")
def looks_at_the_loss_first(model, batches, loss_of, group=None):
    model.zero_grad()
    for x, y in batches:
        if loss_of(model, x, y).isfinite():
            (loss_of(model, x, y) / len(batches)).backward()
    all_reduced(model, group, dist.get_world_size(group))


@right("accumulate_gradients")
def from_the_last_to_the_first(model, batches, loss_of, group=None):
    accumulated(model, batches[::-1], loss_of)
    all_reduced(model, group, dist.get_world_size(group))


@right("accumulate_gradients")
def hooks_for_the_last(model, batches, loss_of, group=None):
    def average(p):
        dist.all_reduce(p.grad, group=group)
        p.grad /= dist.get_world_size(group)

    handles = []
    model.zero_grad()
    for i, (x, y) in enumerate(batches):
        if i == len(batches) - 1:
            trainable = [p for p in model.parameters() if p.requires_grad]
            handles += [p.register_post_accumulate_grad_hook(average) for p in trainable]
        (loss_of(model, x, y) / len(batches)).backward()
    for handle in handles:
        handle.remove()


@mistake("accumulate_gradients", "the result is right, but eval() was called")
def accumulates_in_eval(model, batches, loss_of, group=None):
    accumulated(model.eval(), batches, loss_of)
    all_reduced(model, group, dist.get_world_size(group))


@right("accumulate_gradients")
def in_a_place_of_its_own(model, batches, loss_of, group=None):
    """As Megatron's main_grad: p.grad is None again before the next micro-batch."""
    total = {}
    for x, y in batches:
        model.zero_grad()
        loss_of(model, x, y).backward()
        for p in model.parameters():
            if p.grad is not None:
                total[p] = total[p].add_(p.grad) if p in total else p.grad
    for p, g in total.items():
        dist.all_reduce(g, group=group)
        p.grad = g.div_(len(batches) * dist.get_world_size(group))


@right("accumulate_gradients")
def all_together(model, batches, loss_of, group=None):
    accumulated(model, batches, loss_of)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    sums = functional.all_reduce_coalesced(gradients, "sum", group or dist.group.WORLD)
    torch._foreach_copy_(gradients, [total / dist.get_world_size(group) for total in sums])


@right("accumulate_gradients")
def seeds_backward(model, batches, loss_of, group=None):
    model.zero_grad()
    for x, y in batches:
        loss = loss_of(model, x, y)
        loss.backward(torch.full_like(loss, 1 / len(batches)))
    with dist._coalescing_manager(group=group, async_ops=True) as works:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad.div_(dist.get_world_size(group)), group=group)
    works.wait()


@mistake("accumulate_gradients", "only the last micro-batch is in it, divided by 3: zero_grad between them")
def clears_and_divides(model, batches, loss_of, group=None):
    for x, y in batches:
        model.zero_grad()
        (loss_of(model, x, y) / len(batches)).backward()
    all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "divided by the 2 rows of a micro-batch: loss_of gives a mean")
def divides_by_rows(model, batches, loss_of, group=None):
    model.zero_grad()
    for x, y in batches:
        (loss_of(model, x, y) / len(x)).backward()
    all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "divided by all rows, 6: loss_of gives a mean")
def divides_by_all_rows(model, batches, loss_of, group=None):
    model.zero_grad()
    for x, y in batches:
        (loss_of(model, x, y) / sum(len(x) for x, _ in batches)).backward()
    all_reduced(model, group, dist.get_world_size(group))


@mistake("accumulate_gradients", "was it cleared afterwards (zero_grad)")
def clears_at_the_end(model, batches, loss_of, group=None):
    accumulated(model, batches, loss_of)
    all_reduced(model, group, dist.get_world_size(group))
    model.zero_grad()


@mistake("accumulate_gradients", "it is None there: the p.grad of a frozen or unused parameter?")
def averages_frozen_ones(model, batches, loss_of, group=None):
    accumulated(model, batches, loss_of)
    for p in model.parameters():
        dist.all_reduce(p.grad, group=group)
