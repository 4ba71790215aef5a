"""Wrong answers to the exercises of lesson 06, as people really write them; and right ones other than the reference."""

import os
import random

import torch
import torch.distributed as dist
from planted import mistake, right
from torch.nn.parallel import DistributedDataParallel

# ---- broadcast_model ------------------------------------------------------------------------------------------


@mistake("broadcast_model", "the buffers are left out: the running statistics of a BatchNorm are state, too")
def parameters_only(model, group=None):
    for p in model.parameters():
        dist.broadcast(p.data, group=group, group_src=0)


@mistake("broadcast_model", "frozen.weight is left out")
def trainable_ones_only(model, group=None):
    for t in [*(p for p in model.parameters() if p.requires_grad), *model.buffers()]:
        dist.broadcast(t.detach(), group=group, group_src=0)


@mistake("broadcast_model", "norm.num_batches_tracked is a buffer and left out")
def fractions_only(model, group=None):
    for t in [*model.parameters(), *model.buffers()]:
        if t.is_floating_point():
            dist.broadcast(t.detach(), group=group, group_src=0)


@mistake("broadcast_model", "mask is a buffer that state_dict() leaves out")
def by_state_dict(model, group=None):
    for t in model.state_dict().values():
        dist.broadcast(t, group=group, group_src=0)


@mistake("broadcast_model", "src counts all ranks, and the first one of ranks 1, 3 is not rank 0")
def always_from_rank_0(model, group=None):
    for t in [*model.parameters(), *model.buffers()]:
        dist.broadcast(t.detach(), 0, group=group)


@mistake("broadcast_model", "it calls all_reduce: a mean of random starts")
def starts_from_the_mean(model, group=None):
    for p in model.parameters():
        dist.all_reduce(p.data, group=group)
        p.data /= dist.get_world_size(group)


@mistake("broadcast_model", "the values arrived in a copy")
def into_copies(model, group=None):
    for t in [*model.parameters(), *model.buffers()]:
        dist.broadcast(t.detach().clone(), group=group, group_src=0)


@mistake("broadcast_model", "fc.weight is another tensor than before")
def new_parameters(model, group=None):
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            t = p.detach().clone()
            dist.broadcast(t, group=group, group_src=0)
            setattr(module, name, torch.nn.Parameter(t))


@mistake("broadcast_model", "nothing was sent")
def seeds_alike(model, group=None):
    torch.manual_seed(0)


@mistake("broadcast_model", "every rank has what rank 3 had: the group's first, rank 0, is asked for")
def from_the_last(model, group=None):
    last = dist.get_world_size(group) - 1
    for t in [*model.parameters(), *model.buffers()]:
        dist.broadcast(t.detach(), group=group, group_src=last)


@mistake("broadcast_model", "tensors are sent more than once")
def twice_over(model, group=None):
    for _ in range(2):
        for t in [*model.parameters(), *model.buffers()]:
            dist.broadcast(t.detach(), group=group, group_src=0)


@mistake("broadcast_model", "pickles")
def the_state_as_an_object(model, group=None):
    state = [model.state_dict()]
    dist.broadcast_object_list(state, dist.get_global_rank(group, 0) if group else 0, group=group)
    model.load_state_dict(state[0])


@right("broadcast_model")
def by_global_rank(model, group=None):
    first = dist.get_global_rank(group, 0) if group is not None else 0
    with torch.no_grad():
        works = [dist.broadcast(t, first, group=group, async_op=True) for t in [*model.buffers(), *model.parameters()]]
        for work in works:
            work.wait()


@right("broadcast_model")
def state_dict_and_the_rest(model, group=None):
    state = model.state_dict()
    for t in state.values():
        dist.broadcast(t, group=group, group_src=0)
    for name, t in model.named_buffers():
        if name not in state:
            dist.broadcast(t, group=group, group_src=0)


@mistake("broadcast_model", "broadcast goes over all ranks: `group` is missing from it")
def over_the_world(model, group=None):
    for t in [*model.parameters(), *model.buffers()]:
        dist.broadcast(t.detach(), 0)


def broadcast_all(model, group):
    for t in [*model.parameters(), *model.buffers()]:
        dist.broadcast(t.detach(), group=group, group_src=0)


@mistake("broadcast_model", "tied.weight is another tensor than before")
def unties(model, group=None):
    broadcast_all(model, group)
    model.tied.weight = torch.nn.Parameter(model.tied.weight.detach().clone())


@mistake("broadcast_model", "the values are right, but eval() was called")
def leaves_it_in_eval(model, group=None):
    broadcast_all(model.eval(), group)


@mistake("broadcast_model", "the values are right, but parameters have gradients now")
def makes_gradients(model, group=None):
    broadcast_all(model, group)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


@mistake("broadcast_model", "the ranks do not make the same calls")
def in_an_order_of_its_own(model, group=None):
    for t in sorted([*model.parameters(), *model.buffers()], key=lambda t: t.flatten()[0].item()):
        dist.broadcast(t.detach(), group=group, group_src=0)


@right("broadcast_model")
def one_message_for_each_dtype(model, group=None):
    kinds = {}
    for t in [*model.parameters(), *model.buffers()]:
        kinds.setdefault(t.dtype, []).append(t.detach())
    for tensors in kinds.values():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.broadcast(flat, group=group, group_src=0)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))


# ---- average_in_hooks -----------------------------------------------------------------------------------------


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


# ---- reduce_buckets -------------------------------------------------------------------------------------------


@mistake("reduce_buckets", "a bucket is started before its turn")
def as_they_arrive(arriving, group=None):
    works = [(dist.all_reduce(bucket, group=group, async_op=True), bucket) for _, bucket in arriving]
    for work, bucket in works:
        work.wait()
        bucket /= dist.get_world_size(group)


@mistake("reduce_buckets", "nothing is started before the last bucket is here")
def sorted_first(arriving, group=None):
    works = [(dist.all_reduce(bucket, group=group, async_op=True), bucket) for _, bucket in sorted(arriving)]
    for work, bucket in works:
        work.wait()
        bucket /= dist.get_world_size(group)


@mistake("reduce_buckets", "was never reduced: one arrival may set free several buckets")
def one_at_a_time(arriving, group=None):
    full, started = {}, []
    for number, bucket in arriving:
        full[number] = bucket
        if len(started) in full:
            bucket = full[len(started)]
            started.append((dist.all_reduce(bucket, group=group, async_op=True), bucket))
    for work, bucket in started:
        work.wait()
        bucket /= dist.get_world_size(group)


@mistake("reduce_buckets", "the sum was not divided by 4")
def buckets_not_divided(arriving, group=None):
    full, works = {}, []
    for number, bucket in arriving:
        full[number] = bucket
        while len(works) in full:
            works.append(dist.all_reduce(full[len(works)], group=group, async_op=True))
    for work in works:
        work.wait()


@mistake("reduce_buckets", "it waits for a bucket before the last one is here")
def blocks_in_the_loop(arriving, group=None):
    full, done = {}, 0
    for number, bucket in arriving:
        full[number] = bucket
        while done in full:
            dist.all_reduce(full[done], group=group)
            full[done] /= dist.get_world_size(group)
            done += 1


@mistake("reduce_buckets", "never waited for")
def leaves_them_under_way(arriving, group=None):
    full, started = {}, 0
    for number, bucket in arriving:
        full[number] = bucket
        while started in full:
            full[started] /= dist.get_world_size(group)
            dist.all_reduce(full[started], group=group, async_op=True)
            started += 1


@mistake("reduce_buckets", "a bucket is started later than it could be")
def one_late(arriving, group=None):
    full, works, n = {}, [], dist.get_world_size(group)
    for number, bucket in arriving:
        while len(works) in full:
            works.append(dist.all_reduce(full[len(works)].div_(n), group=group, async_op=True))
        full[number] = bucket
    while len(works) < len(full):
        works.append(dist.all_reduce(full[len(works)].div_(n), group=group, async_op=True))
    for work in works:
        work.wait()


@mistake("reduce_buckets", "all_reduce is called 1 times for 3 buckets")
def all_in_one(arriving, group=None):
    buckets = [bucket for _, bucket in sorted(arriving)]
    flat = torch.cat(buckets)
    dist.all_reduce(flat, group=group)
    for bucket, part in zip(buckets, flat.split([len(b) for b in buckets]), strict=True):
        bucket.copy_(part / dist.get_world_size(group))


@mistake("reduce_buckets", "different buckets were added up")
def in_order_of_its_own(arriving, group=None):
    """Starts as many as it may, but in the order in which they came."""
    full, works, numbers, n = [], [], set(), dist.get_world_size(group)
    for number, bucket in arriving:
        full.append(bucket)
        numbers.add(number)
        while len(works) in numbers:
            works.append((dist.all_reduce(full[len(works)], group=group, async_op=True), full[len(works)]))
    for work, bucket in works:
        work.wait()
        bucket /= n


def buckets_of(arriving, group, divide_by):
    full, works = {}, []
    for number, bucket in arriving:
        full[number] = bucket
        while len(works) in full:
            works.append(dist.all_reduce(full[len(works)], group=group, async_op=True))
    for number, work in enumerate(works):
        work.wait()
        full[number] /= divide_by


@mistake("reduce_buckets", "all_reduce goes over all ranks: `group` is missing")
def buckets_of_the_world(arriving, group=None):
    buckets_of(arriving, None, dist.get_world_size())


@mistake("reduce_buckets", "divided by the number of all ranks, 4, where the group has 2")
def divides_by_the_world(arriving, group=None):
    buckets_of(arriving, group, dist.get_world_size())


@right("reduce_buckets")
def divides_before(arriving, group=None):
    n, full, works = dist.get_world_size(group), [], []
    for number, bucket in arriving:
        full += [None] * (number + 1 - len(full))
        full[number] = bucket.div_(n)
        while len(works) < len(full) and full[len(works)] is not None:
            works.append(dist.all_reduce(full[len(works)], group=group, async_op=True))
    for work in works:
        work.wait()


def started(arriving, group, bucket_of=lambda bucket: bucket):
    """Start each bucket in its turn; returns {number: bucket} and the works."""
    full, works = {}, []
    for number, bucket in arriving:
        full[number] = bucket_of(bucket)
        while len(works) in full:
            works.append(dist.all_reduce(full[len(works)], group=group, async_op=True))
    return full, works


@mistake("reduce_buckets", "div_ works on a tensor whose all_reduce is still under way")
def divides_under_way(arriving, group=None):
    full, works = {}, []
    for number, bucket in arriving:
        full[number] = bucket
        while len(works) in full:
            bucket = full[len(works)]
            works.append(dist.all_reduce(bucket, group=group, async_op=True))
            bucket /= dist.get_world_size(group)
    for work in works:
        work.wait()


@mistake("reduce_buckets", "div works on a tensor whose all_reduce is still under way")
def reads_under_way(arriving, group=None):
    full, works = started(arriving, group)
    means = [full[i] / dist.get_world_size(group) for i in range(len(works))]
    for i, work in enumerate(works):
        work.wait()
        full[i].copy_(means[i])


@mistake("reduce_buckets", "bucket 0 was never reduced: what was reduced is a copy")
def reduces_copies(arriving, group=None):
    full, works = started(arriving, group, torch.clone)
    for i, work in enumerate(works):
        work.wait()
        full[i] /= dist.get_world_size(group)


@mistake("reduce_buckets", "the sum was divided by 4 into a new tensor that is not the bucket")
def divides_into_new_ones(arriving, group=None):
    full, works = started(arriving, group)
    for i, work in enumerate(works):
        work.wait()
        full[i] = full[i] / dist.get_world_size(group)


@mistake("reduce_buckets", "2 of its 3 calls (isend, irecv or async_op=True) were never waited for")
def waits_for_the_last(arriving, group=None):
    _, works = started(arriving, group, lambda bucket: bucket.div_(dist.get_world_size(group)))
    works[-1].wait()


@mistake("reduce_buckets", "it waits for a bucket before the last one is here")
def waits_by_futures(arriving, group=None):
    full, done, n = {}, 0, dist.get_world_size(group)
    for number, bucket in arriving:
        full[number] = bucket.div_(n)
        while done in full:
            dist.all_reduce(full[done], group=group, async_op=True).get_future().wait()
            done += 1


@right("reduce_buckets")
def then_divides(arriving, group=None):
    full, futures, n = {}, [], dist.get_world_size(group)
    for number, bucket in arriving:
        full[number] = bucket
        while len(futures) in full:
            work = dist.all_reduce(full[len(futures)], group=group, async_op=True)
            futures.append(work.get_future().then(lambda future: future.value()[0].div_(n)))
    torch.futures.wait_all(futures)


@right("reduce_buckets")
def by_avg_in_buckets(arriving, group=None):
    full, works = {}, []
    for number, bucket in arriving:
        full[number] = bucket
        while len(works) in full:
            works.append(dist.all_reduce(full[len(works)], dist.ReduceOp.AVG, group, True))
    for work in reversed(works):
        work.wait()


# ---- accumulate_gradients -------------------------------------------------------------------------------------


def all_reduced(model, group, divide_by):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= divide_by


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


# ---- sample_indices -------------------------------------------------------------------------------------------


def shuffled(length, seed):
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


@mistake("sample_indices", "the ranks shuffle differently, so their parts overlap")
def seeds_by_rank(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch + 1000 * rank)[rank::n]


@mistake("sample_indices", "hash() of a text is another number in every process")
def seeds_by_a_text(length, rank, n, epoch, seed=0):
    return shuffled(length, hash(f"{seed} {epoch}") % 2**31)[rank::n]


@mistake("sample_indices", "the ranks only exchange their parts")
def rolls_to_the_neighbour(length, rank, n, epoch, seed=0):
    order = shuffled(length, seed)
    return (order[epoch % length :] + order[: epoch % length])[rank::n]


@mistake("sample_indices", "the ranks only exchange their parts")
def the_same_parts_to_others(length, rank, n, epoch, seed=0):
    mine = list(range((rank + epoch + seed) % n, length, n))
    random.Random(seed + epoch).shuffle(mine)
    return mine


@mistake("sample_indices", "begun at another place")
def rolls_in_blocks(length, rank, n, epoch, seed=0):
    order = torch.tensor(shuffled(length, seed)).roll(epoch)
    return order.tensor_split(n)[rank].tolist()


@mistake("sample_indices", "it changes numpy's own random numbers")
def numpy_seed(length, rank, n, epoch, seed=0):
    import numpy

    numpy.random.seed(seed + epoch)
    return numpy.random.permutation(length)[rank::n].tolist()


@right("sample_indices")
def seeds_by_a_pair(length, rank, n, epoch, seed=0):
    return random.Random(hash((seed, epoch))).sample(range(length), length)[rank::n]


@mistake("sample_indices", "every epoch has the same order")
def forgets_the_epoch(length, rank, n, epoch, seed=0):
    return shuffled(length, seed)[rank::n]


@mistake("sample_indices", "every seed gives the same order")
def forgets_the_seed(length, rank, n, epoch, seed=0):
    return shuffled(length, epoch)[rank::n]


@mistake("sample_indices", "is seen twice: nothing is to be repeated")
def pads(length, rank, n, epoch, seed=0):
    order = shuffled(length, seed + epoch)
    return (order + order[: -length % n])[rank::n]


@mistake("sample_indices", "is seen by no rank (10 % 4 of them: the remainder is dropped)")
def drops_the_rest(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch)[: length // n * n][rank::n]


@mistake("sample_indices", "every rank gets the same samples")
def all_for_everyone(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch)


@mistake("sample_indices", "the samples are in order: shuffle them")
def not_shuffled(length, rank, n, epoch, seed=0):
    return list(range(rank, length, n))


@mistake("sample_indices", "two calls with the same arguments give different lists")
def unseeded(length, rank, n, epoch, seed=0):
    mine = list(range(rank, length, n))
    random.shuffle(mine)
    return mine


@mistake("sample_indices", "differs from process to process")
def seeds_by_process(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch + os.getpid())[rank::n]


@mistake("sample_indices", "differs from process to process")
def seeds_by_the_true_rank(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch + 1000 * dist.get_rank())[rank::n]


@mistake("sample_indices", "a rank has the same samples in every epoch")
def shuffles_its_own_part(length, rank, n, epoch, seed=0):
    mine = list(range(rank, length, n))
    return [mine[i] for i in shuffled(len(mine), seed + epoch)]


@mistake("sample_indices", "it changes torch's own random numbers")
def manual_seed(length, rank, n, epoch, seed=0):
    torch.manual_seed(seed + epoch)
    return torch.randperm(length)[rank::n].tolist()


@mistake("sample_indices", "it returns a generator")
def gives_them_one_by_one(length, rank, n, epoch, seed=0):
    return (i for i in shuffled(length, seed + epoch)[rank::n])


@mistake("sample_indices", "are more than 1 apart")
def the_last_takes_the_rest(length, rank, n, epoch, seed=0):
    order, each = shuffled(length, seed + epoch), length // n
    return order[rank * each : length if rank == n - 1 else (rank + 1) * each]


@right("sample_indices")
def by_random_and_in_blocks(length, rank, n, epoch, seed=0):
    order = list(range(length))
    random.Random(1000 * seed + epoch).shuffle(order)
    return order[length * rank // n : length * (rank + 1) // n]


@right("sample_indices")
def a_tensor(length, rank, n, epoch, seed=0):
    return torch.randperm(length, generator=torch.Generator().manual_seed(7 * seed + epoch))[rank::n]


@mistake("sample_indices", "with seed 0 every epoch has the same order: in a product of the two a zero hides the other")
def seed_times_epoch(length, rank, n, epoch, seed=0):
    return shuffled(length, seed * epoch)[rank::n]


@mistake("sample_indices", "in epoch 0 every seed gives the same order: in a product of the two a zero hides the other")
def one_more_than_seed_times_epoch(length, rank, n, epoch, seed=0):
    return shuffled(length, (seed + 1) * epoch)[rank::n]


@mistake("sample_indices", "epoch 2 has the order of an earlier one")
def two_orders_by_turns(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch % 2)[rank::n]


@mistake("sample_indices", "it draws with replacement")
def draws_with_replacement(length, rank, n, epoch, seed=0):
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randint(length, (length,), generator=generator)[rank::n].tolist()


@mistake("sample_indices", "it works with 4 ranks, but not with 3")
def deals_to_four(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch)[rank::4]


@mistake("sample_indices", "differs from process to process")
def seeds_by_the_global_seed(length, rank, n, epoch, seed=0):
    return shuffled(length, torch.initial_seed() % 2**31 + seed + epoch)[rank::n]


@mistake("sample_indices", "a bool is in the list")
def gives_a_mask(length, rank, n, epoch, seed=0):
    mine = shuffled(length, seed + epoch)[rank::n]
    return [i in mine for i in range(length)]


@right("sample_indices")
def by_numpys_generator(length, rank, n, epoch, seed=0):
    import numpy

    return list(numpy.random.default_rng((seed, epoch)).permutation(length)[rank::n])


@right("sample_indices")
def puts_the_state_back(length, rank, n, epoch, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * seed + epoch)
        return torch.randperm(length).tensor_split(n)[rank].tolist()


# ---- weighted_gradients ---------------------------------------------------------------------------------------


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


# ---- top_k_step -----------------------------------------------------------------------------------------------


def gathered(values, places, group):
    n = dist.get_world_size(group)
    all_values, all_places = ([torch.empty_like(t) for _ in range(n)] for t in (values, places))
    dist.all_gather(all_values, values, group=group)
    dist.all_gather(all_places, places, group=group)
    return zip(all_values, all_places, strict=True)


def step(gradient, residual, k, group, places=None, values=None, divide=True, add=True):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places = wanted.abs().topk(k).indices if places is None else places
    values = wanted[places] if values is None else values
    mean = torch.zeros_like(gradient)
    for some, where in gathered(values, places, group):
        mean[where] = mean[where] * add + some / (n if divide else 1)
    return mean, wanted.index_fill(0, places, 0)


@mistake("top_k_step", "rest is always zero: what was not sent is forgotten")
def no_feedback(gradient, residual, k, group=None):
    mean, _ = step(gradient, residual, k, group)
    return mean, torch.zeros_like(residual)


@mistake("top_k_step", "chosen among gradient alone")
def chooses_by_the_gradient(gradient, residual, k, group=None):
    return step(gradient, residual, k, group, places=gradient.abs().topk(k).indices)


@mistake("top_k_step", "the residual is not added before choosing")
def adds_the_residual_too_late(gradient, residual, k, group=None):
    mean, rest = step(gradient, torch.zeros_like(residual), k, group)
    return mean, rest + residual


@mistake("top_k_step", "gradient is sent where gradient + residual was chosen")
def sends_the_gradient(gradient, residual, k, group=None):
    places = (gradient + residual).abs().topk(k).indices
    return step(gradient, residual, k, group, places, gradient[places])


@mistake("top_k_step", "not the largest in absolute value: negative ones never travel")
def largest_with_sign(gradient, residual, k, group=None):
    return step(gradient, residual, k, group, places=(gradient + residual).topk(k).indices)


@mistake("top_k_step", "the sign is lost")
def sends_absolute_values(gradient, residual, k, group=None):
    values, places = (gradient + residual).abs().topk(k)
    return step(gradient, residual, k, group, places, values)


@mistake("top_k_step", "the sum was not divided by 4")
def sums_up(gradient, residual, k, group=None):
    return step(gradient, residual, k, group, divide=False)


@mistake("top_k_step", "only the last one counts: add, do not assign")
def assigns(gradient, residual, k, group=None):
    return step(gradient, residual, k, group, add=False)


@mistake("top_k_step", "rest still holds what was sent")
def keeps_it_all(gradient, residual, k, group=None):
    return step(gradient, residual, k, group)[0], gradient + residual


@mistake("top_k_step", "rest leaves the old residual out")
def forgets_the_old_rest(gradient, residual, k, group=None):
    mean, rest = step(gradient, residual, k, group)
    return mean, torch.where(rest != 0, gradient, 0)


@mistake("top_k_step", "rest subtracts the ranks' mean")
def subtracts_the_mean(gradient, residual, k, group=None):
    mean, _ = step(gradient, residual, k, group)
    return mean, gradient + residual - mean


@mistake("top_k_step", "it calls all_reduce, which sends all elements")
def sends_zeros_along(gradient, residual, k, group=None):
    wanted = gradient + residual
    places = wanted.abs().topk(k).indices
    mean = torch.zeros_like(wanted).index_copy(0, places, wanted[places])
    rest = wanted - mean
    dist.all_reduce(mean, group=group)
    return mean / dist.get_world_size(group), rest


@mistake("top_k_step", "gradient or residual was changed")
def adds_in_place(gradient, residual, k, group=None):
    residual += gradient
    return step(residual, torch.zeros_like(residual), k, group)


@mistake("top_k_step", "every rank's values are put in this rank's own places")
def own_places(gradient, residual, k, group=None):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places, mean = wanted.abs().topk(k).indices, torch.zeros_like(gradient)
    everyone = [torch.empty_like(wanted[places]) for _ in range(n)]
    dist.all_gather(everyone, wanted[places], group=group)
    for some in everyone:
        mean[places] += some / n
    return mean, wanted.index_fill(0, places, 0)


@mistake("top_k_step", "more travels than k elements and k places")
def gathers_everything_whole(gradient, residual, k, group=None):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places = wanted.abs().topk(k).indices
    sent = torch.zeros_like(wanted).index_copy(0, places, wanted[places])
    everyone = [torch.empty_like(sent) for _ in range(n)]
    dist.all_gather(everyone, sent, group=group)
    return torch.stack(everyone).sum(0) / n, wanted - sent


def short(gradient, residual, k, group, kind):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places, mean = wanted.abs().topk(k).indices, torch.zeros_like(gradient)
    for some, where in gathered(wanted[places], places.to(kind), group):
        mean.index_put_((where.long(),), some / n, accumulate=True)
    return mean, wanted.index_fill(0, places, 0)


@mistake("top_k_step", "the places go through 8 bits, too few for 4000")
def places_in_a_byte(gradient, residual, k, group=None):
    return short(gradient, residual, k, group, torch.uint8)


@mistake("top_k_step", "the places go through 16 bits, too few for 4000")
def places_in_half_precision(gradient, residual, k, group=None):
    return short(gradient, residual, k, group, torch.float16)


@mistake("top_k_step", "exactly 2 elements are sent, and rest keeps all others")
def rest_by_size(gradient, residual, k, group=None):
    wanted, (mean, _) = gradient + residual, step(gradient, residual, k, group)
    return mean, torch.where(wanted.abs() < wanted.abs().topk(k).values[-1], wanted, 0)


@mistake("top_k_step", "all_gather goes over all ranks: `group` is missing")
def gathers_from_all(gradient, residual, k, group=None):
    return step(gradient, residual, k, None)


@mistake("top_k_step", "it returns (rest, mean): mean comes first")
def the_other_way_round(gradient, residual, k, group=None):
    mean, rest = step(gradient, residual, k, group)
    return rest, mean


@right("top_k_step")
def short_places(gradient, residual, k, group=None):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places = wanted.abs().argsort(descending=True)[:k].int()
    mean = torch.zeros_like(gradient)
    for some, where in gathered(wanted[places], places, group):
        mean.index_add_(0, where, some)
    rest = wanted.clone()
    rest[places] = 0
    return [mean / n, rest]


@right("top_k_step")
def one_message(gradient, residual, k, group=None):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places = wanted.abs().topk(k).indices
    message = torch.stack([wanted[places], places.to(wanted.dtype)])
    everyone = [torch.empty_like(message) for _ in range(n)]
    dist.all_gather(everyone, message, group=group)
    mean = torch.zeros_like(gradient)
    for some, where in everyone:
        mean.index_put_((where.long(),), some.to(mean.dtype) / n, accumulate=True)
    return mean, wanted.index_fill(0, places, 0)


@mistake("top_k_step", "k is not used: 2 elements of each rank are sent")
def always_two(gradient, residual, k, group=None):
    return step(gradient, residual, min(2, len(gradient)), group)


@mistake("top_k_step", "it takes 4 calls: one for the elements and one for their places are enough")
def one_message_for_each_element(gradient, residual, k, group=None):
    wanted, mean = gradient + residual, torch.zeros_like(gradient)
    places = wanted.abs().topk(k).indices
    for place in places.split(1):
        for some, where in gathered(wanted[place], place, group):
            mean[where] += some / dist.get_world_size(group)
    return mean, wanted.index_fill(0, places, 0)


@mistake("top_k_step", "mean is of type sparse tensor")
def gives_a_sparse_one(gradient, residual, k, group=None):
    mean, rest = step(gradient, residual, k, group)
    return mean.to_sparse(), rest


@right("top_k_step")
def scatters(gradient, residual, k, group=None):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places = wanted.abs().topk(k, sorted=False).indices
    values, everywhere = wanted.new_empty(n * k), places.new_empty(n * k)
    dist.all_gather_into_tensor(values, wanted[places], group=group)
    dist.all_gather_into_tensor(everywhere, places, group=group)
    return torch.zeros_like(wanted).scatter_add_(0, everywhere, values) / n, wanted.scatter(0, places, 0.0)
