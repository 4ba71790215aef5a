"""Wrong answers to the exercises of lesson 05, as people really write them; and right ones other than the reference."""

import torch
import torch.distributed as dist
from planted import mistake, right
from torch.distributed.algorithms.model_averaging import utils
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pardist_lib.mechanisms.averaging import LocalSGD, average_parameters

# ---- average_by_rows ------------------------------------------------------------------------------------------


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


def put_means(model, share, group=None):
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.requires_grad:
                mean = p.data * share
                dist.all_reduce(mean, group=group)
                setattr(module, name, torch.nn.Parameter(mean))


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


@mistake("average_by_rows", "the share of the rows is a float32 number here")
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


# ---- local_sgd_step -------------------------------------------------------------------------------------------


def take_mean(model):
    for p in model.parameters():
        if p.requires_grad:
            dist.all_reduce(p.data)
            p.data /= dist.get_world_size()


@mistake("local_sgd_step", "the parameters are averaged at steps 0, k, 2k")
def counts_from_one(model, optimizer, step, k):
    optimizer.step()
    if step % k == 0:
        take_mean(model)


@mistake("local_sgd_step", "averaged first, then stepped")
def averages_first(model, optimizer, step, k):
    if (step + 1) % k == 0:
        take_mean(model)
    optimizer.step()


@mistake("local_sgd_step", "the parameters are to be averaged, not the gradients")
def averages_gradients(model, optimizer, step, k):
    if (step + 1) % k == 0:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
    optimizer.step()


@mistake("local_sgd_step", "the parameters are to be averaged, not the gradients")
def gradients_after_the_step(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()


@mistake("local_sgd_step", "the parameters are averaged after every step, whatever k is")
def averages_always(model, optimizer, step, k):
    optimizer.step()
    take_mean(model)


@mistake("local_sgd_step", "the parameters are never averaged")
def never_averages(model, optimizer, step, k):
    optimizer.step()


@mistake("local_sgd_step", "the sum was not divided by the number of ranks")
def forgets_to_divide(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for p in model.parameters():
            if p.requires_grad:
                dist.all_reduce(p.data)


@mistake("local_sgd_step", "no step was made: call optimizer.step()")
def makes_no_step(model, optimizer, step, k):
    if (step + 1) % k == 0:
        take_mean(model)


@mistake("local_sgd_step", "optimizer.step() is called only in the steps that average")
def steps_only_when_due(model, optimizer, step, k):
    if (step + 1) % k == 0:
        optimizer.step()
        take_mean(model)


@mistake("local_sgd_step", "the optimizer's state is averaged too")
def averages_the_momentum(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        take_mean(model)
        for p in model.parameters():
            if p.requires_grad:
                for name, value in sorted(optimizer.state[p].items()):
                    if name != "step":
                        dist.all_reduce(value)
                        value /= dist.get_world_size()


@mistake("local_sgd_step", "averaged only once, at step k - 1")
def averages_once(model, optimizer, step, k):
    optimizer.step()
    if step == k - 1:
        take_mean(model)


@mistake("local_sgd_step", "it broadcasts one rank's parameters")
def broadcasts(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for p in model.parameters():
            dist.broadcast(p.data, 0)


@mistake("local_sgd_step", "step 0 sends")
def sends_for_nothing(model, optimizer, step, k):
    optimizer.step()
    means = [p.data.clone() for p in model.parameters() if p.requires_grad]
    for mean in means:
        dist.all_reduce(mean)
    if (step + 1) % k == 0:
        for p, mean in zip((p for p in model.parameters() if p.requires_grad), means, strict=True):
            p.data.copy_(mean / dist.get_world_size())


@mistake("local_sgd_step", "it calls the course's own")
def takes_the_courses_local_sgd(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        LocalSGD.__init__.__globals__["average_parameters"](model)


@mistake("local_sgd_step", "the calls are counted, where `step` says which one it is")
def counts_its_calls(model, optimizer, step, k):
    optimizer.step()
    optimizer.calls = getattr(optimizer, "calls", 0) + 1
    if optimizer.calls % k == 0:
        take_mean(model)


@mistake("local_sgd_step", "averaged at the beginning of the step after the k-th")
def averages_before_the_next_step(model, optimizer, step, k):
    if step and step % k == 0:
        take_mean(model)
    optimizer.step()


@mistake("local_sgd_step", "no step was made here, only on other ranks: every rank calls optimizer.step()")
def rank_0_steps(model, optimizer, step, k):
    if dist.get_rank() == 0:
        optimizer.step()
    if (step + 1) % k == 0:
        take_mean(model)


@mistake("local_sgd_step", "fc1.bias is frozen and has changed")
def knows_the_frozen_one_by_its_name(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for name, p in model.named_parameters():
            if "frozen" not in name:
                dist.all_reduce(p.data)
                p.data /= dist.get_world_size()


@mistake("local_sgd_step", "fc1.weight takes no gradient any more: leave requires_grad as it was")
def freezes_what_it_averages(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for p in model.parameters():
            if p.requires_grad:
                p.requires_grad_(False)
                dist.all_reduce(p)
                p /= dist.get_world_size()


@right("local_sgd_step")
def asynchronously_and_then_waits(model, optimizer, step, k):
    optimizer.step()
    if step in range(k - 1, step + 1, k):
        trained = [p.data.div_(dist.get_world_size()) for p in model.parameters() if p.requires_grad]
        for one in [dist.all_reduce(p, async_op=True) for p in trained]:
            one.wait()


@right("local_sgd_step")
def in_one_line(model, optimizer, step, k):
    optimizer.step()
    if step % k == k - 1:
        trained = [p for p in model.parameters() if p.requires_grad]
        line = parameters_to_vector(trained).detach() / dist.get_world_size()
        dist.all_reduce(line)
        vector_to_parameters(line, trained)


@right("local_sgd_step")
def by_avg_of_parts(model, optimizer, step, k):
    optimizer.step()
    if not (step + 1) % k:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.requires_grad:
                        p.div_(dist.get_world_size())
                        dist.all_reduce(p)


@mistake("local_sgd_step", "only the parameters that have a gradient are averaged")
def averages_what_was_used(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.data)
                p.data /= dist.get_world_size()


@mistake("local_sgd_step", "only the optimizer's first parameter group is averaged")
def averages_the_first_group(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for p in optimizer.param_groups[0]["params"]:
            if p.requires_grad:
                dist.all_reduce(p.data)
                p.data /= dist.get_world_size()


@mistake("local_sgd_step", "it calls torch's own average_parameters")
def takes_torchs(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        utils.average_parameters(iter([p for p in model.parameters() if p.requires_grad]), dist.group.WORLD)


@mistake("local_sgd_step", "the optimizer's state is thrown away where the ranks average")
def forgets_the_momentum(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        take_mean(model)
        optimizer.state.clear()


@mistake("local_sgd_step", "optimizer.step() is not called in the steps that average")
def averages_or_steps(model, optimizer, step, k):
    if (step + 1) % k == 0:
        take_mean(model)
    else:
        optimizer.step()


@mistake("local_sgd_step", "the model has another fc1.weight now")
def puts_new_parameters_in(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        put_means(model, 1 / dist.get_world_size())


# ---- server_round ---------------------------------------------------------------------------------------------


def collect(theta, server, buffers=None):
    """The sum of the workers' gradients, and who they are."""
    workers = [r for r in range(dist.get_world_size()) if r != server]
    total, arrived = torch.zeros_like(theta), torch.empty_like(theta)
    for worker in workers:
        dist.recv(arrived, worker)
        total += arrived
    return total, workers


def work(theta, gradient, server):
    dist.send(gradient, server)
    dist.recv(theta, server)


@mistake("server_round", "divided by all 4 ranks: the server has no gradient")
def counts_the_server(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        return work(theta, gradient, server)
    total, workers = collect(theta, server)
    theta -= lr * total / dist.get_world_size()
    for worker in workers:
        dist.send(theta, worker)


@mistake("server_round", "the sum of the gradients is applied")
def applies_the_sum(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        return work(theta, gradient, server)
    total, workers = collect(theta, server)
    theta -= lr * total
    for worker in workers:
        dist.send(theta, worker)


@mistake("server_round", "the sign is wrong")
def climbs(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        return work(theta, gradient, server)
    total, workers = collect(theta, server)
    theta += lr * total / len(workers)
    for worker in workers:
        dist.send(theta, worker)


@mistake("server_round", "only worker 3's gradient is applied: each one overwrites what came before")
def keeps_the_last(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        return work(theta, gradient, server)
    arrived = torch.empty_like(theta)
    workers = [r for r in range(dist.get_world_size()) if r != server]
    for worker in workers:
        dist.recv(arrived, worker)
    theta -= lr * arrived
    for worker in workers:
        dist.send(theta, worker)


@mistake("server_round", "each gradient is applied by itself with the full lr, and each worker answered at once")
def answers_each_at_once(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        return work(theta, gradient, server)
    arrived = torch.empty_like(theta)
    for worker in (r for r in range(dist.get_world_size()) if r != server):
        dist.recv(arrived, worker)
        theta -= lr * arrived
        dist.send(theta, worker)


@mistake("server_round", "the server sends new parameters, but its own stay as they were")
def steps_in_a_new_tensor(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        return work(theta, gradient, server)
    total, workers = collect(theta, server)
    theta = theta - lr * total / len(workers)
    for worker in workers:
        dist.send(theta, worker)


@mistake("server_round", "the workers' theta holds the mean gradient")
def sends_the_mean_back(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        return work(theta, gradient, server)
    total, workers = collect(theta, server)
    mean = total / len(workers)
    theta -= lr * mean
    for worker in workers:
        dist.send(mean, worker)


@mistake("server_round", "each worker has stepped from its own old parameters")
def everyone_steps(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        mean = torch.empty_like(theta)
        work(mean, gradient, server)
    else:
        total, workers = collect(theta, server)
        mean = total / len(workers)
        for worker in workers:
            dist.send(mean, worker)
    theta -= lr * mean


@mistake("server_round", "torch's own reduce: write it here from send and receive alone")
def by_collectives(theta, gradient, lr, server=0):
    n = dist.get_world_size()
    total = torch.zeros_like(theta) if gradient is None else gradient.clone()
    dist.reduce(total, server)
    theta -= lr * total / (n - 1)
    dist.broadcast(theta, server)


@mistake("server_round", "workers talk to the server only")
def everyone_to_everyone(theta, gradient, lr, server=0):
    rank, n = dist.get_rank(), dist.get_world_size()
    workers = [r for r in range(n) if r != server]
    if rank == server:
        total, _ = collect(theta, server)
        theta -= lr * total / len(workers)
        for worker in workers:
            dist.send(theta, worker)
        return
    works = [dist.isend(gradient, r) for r in range(n) if r != rank]
    for other in workers:
        if other != rank:
            dist.recv(torch.empty_like(theta), other)
    dist.recv(theta, server)
    for one in works:
        one.wait()


@mistake("server_round", "the result is right, but rank 1 sends")
def sends_it_twice(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        dist.send(gradient, server)
        return work(theta, gradient, server)
    total, workers = torch.zeros_like(theta), [r for r in range(dist.get_world_size()) if r != server]
    for worker in workers:
        arrived = torch.empty_like(theta)
        dist.recv(arrived, worker)
        dist.recv(arrived, worker)
        total += arrived
    theta -= lr * total / len(workers)
    for worker in workers:
        dist.send(theta, worker)


@mistake("server_round", "rank 0 sends to itself or receives from itself")
def serves_itself_too(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        return work(theta, gradient, server)
    arrived = torch.empty_like(theta)
    for worker in range(dist.get_world_size()):
        dist.recv(arrived, worker)


@mistake("server_round", "every rank waits in recv, and what it waits for is never sent")
def pulls_before_it_pushes(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        dist.recv(theta, server)
        dist.send(gradient, server)
        return
    total, workers = collect(theta, server)
    theta -= lr * total / len(workers)
    for worker in workers:
        dist.send(theta, worker)


@mistake("server_round", "were never waited for")
def does_not_wait(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        return work(theta, gradient, server)
    total, workers = collect(theta, server)
    theta -= lr * total / len(workers)
    for worker in workers:
        dist.isend(theta, worker)


@mistake("server_round", "it works where rank 0 serves, but not where rank 2 does")
def rank_0_serves(theta, gradient, lr, server=0):
    if dist.get_rank():
        return work(theta, gradient, 0)
    total, workers = collect(theta, 0)
    theta -= lr * total / len(workers)
    for worker in workers:
        dist.send(theta, worker)


@mistake("server_round", "divided by 3, where there are 2 workers")
def there_are_three_workers(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        return work(theta, gradient, server)
    total, workers = collect(theta, server)
    theta -= lr * total / 3
    for worker in workers:
        dist.send(theta, worker)


@mistake("server_round", "this is the mean of the workers' parameters after a step of their own")
def averages_parameters(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        return work(theta, theta - lr * gradient, server)
    total, workers = collect(theta, server)
    theta.copy_(total / len(workers))
    for worker in workers:
        dist.send(theta, worker)


@right("server_round")
def scaled_by_the_workers_and_tagged(theta, gradient, lr, server=0):
    workers = [r for r in range(dist.get_world_size()) if r != server]
    if dist.get_rank() != server:
        dist.send(gradient * (lr / len(workers)), server, tag=7)
        dist.recv(theta, server, tag=9)
        return
    arrived = torch.empty_like(theta)
    for worker in workers:
        dist.recv(arrived, worker, tag=7)
        theta -= arrived
    for worker in reversed(workers):
        dist.send(theta, worker, tag=9)


@right("server_round")
def whoever_comes_first(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        return work(theta, gradient, server)
    arrived, total, workers = torch.empty_like(theta), torch.zeros_like(theta), []
    for _ in range(dist.get_world_size() - 1):
        workers.append(dist.recv(arrived))
        total += arrived
    theta -= lr * total / len(workers)
    for one in [dist.isend(theta, worker) for worker in workers]:
        one.wait()


@right("server_round")
def all_at_once(theta, gradient, lr, server=0):
    if dist.get_rank() != server:
        sending, receiving = dist.isend(gradient, server), dist.irecv(theta, server)
        sending.wait()
        receiving.wait()
        return
    arrived = {r: torch.empty_like(theta) for r in range(dist.get_world_size()) if r != server}
    for one in [dist.irecv(buffer, r) for r, buffer in arrived.items()]:
        one.wait()
    theta.sub_(torch.stack(list(arrived.values())).mean(0), alpha=lr)
    for one in [dist.isend(theta, r) for r in arrived]:
        one.wait()


# ---- may_proceed ----------------------------------------------------------------------------------------------


@mistake("may_proceed", "exactly `staleness` steps ahead may still go on")
def too_strict(clocks, worker, staleness):
    return staleness is None or clocks[worker] - min(clocks) < staleness


@mistake("may_proceed", "the wrong way round: it holds the slow worker back")
def holds_the_slow_one(clocks, worker, staleness):
    return staleness is None or max(clocks) - clocks[worker] <= staleness


@mistake("may_proceed", "compared with the fastest")
def looks_at_the_spread(clocks, worker, staleness):
    return staleness is None or max(clocks) - min(clocks) <= staleness


@mistake("may_proceed", "compared with the mean of the clocks")
def looks_at_the_mean(clocks, worker, staleness):
    return staleness is None or clocks[worker] - sum(clocks) / len(clocks) <= staleness


@mistake("may_proceed", "True and False are swapped")
def has_to_wait(clocks, worker, staleness):
    return staleness is not None and clocks[worker] - min(clocks) > staleness


@mistake("may_proceed", "NoneType")
def forgets_none(clocks, worker, staleness):
    return clocks[worker] - min(clocks) <= staleness


@mistake("may_proceed", "staleness None means that nobody waits")
def none_is_zero(clocks, worker, staleness):
    return staleness is not None and clocks[worker] - min(clocks) <= staleness


@mistake("may_proceed", "True or False is asked for")
def how_far(clocks, worker, staleness):
    return staleness is None or clocks[worker] - min(clocks)


@mistake("may_proceed", "clocks was changed")
def sorts_it(clocks, worker, staleness):
    mine = clocks[worker]
    clocks.sort()
    return staleness is None or mine - clocks[0] <= staleness


@mistake("may_proceed", "compared with worker 0's clock")
def looks_at_worker_0(clocks, worker, staleness):
    return staleness is None or clocks[worker] - clocks[0] <= staleness


@mistake("may_proceed", "may_proceed([4], 0, 0)")
def looks_at_the_others(clocks, worker, staleness):
    return staleness is None or clocks[worker] - min(clocks[:worker] + clocks[worker + 1 :]) <= staleness


@mistake("may_proceed", "0 is a bound like any other, not None")
def takes_zero_for_none(clocks, worker, staleness):
    return not staleness or clocks[worker] - min(clocks) <= staleness


@mistake("may_proceed", "workers that have not begun are left out: they are the slowest")
def leaves_out_who_has_not_begun(clocks, worker, staleness):
    return staleness is None or clocks[worker] - min([c for c in clocks if c], default=0) <= staleness


@right("may_proceed")
def nobody_is_too_far_behind(clocks, worker, staleness):
    if staleness is None:
        return True
    return all(clock >= clocks[worker] - staleness for clock in clocks)


# ---- apply_stale ----------------------------------------------------------------------------------------------


@mistake("apply_stale", "the gradient is applied with the full lr")
def full_step(theta, gradient, computed_at, version, lr, limit):
    if version - computed_at > limit:
        return version
    theta -= lr * gradient
    return version + 1


@mistake("apply_stale", "nothing is dropped")
def drops_nothing(theta, gradient, computed_at, version, lr, limit):
    theta -= lr / (1 + version - computed_at) * gradient
    return version + 1


@mistake("apply_stale", "a gradient exactly as stale as limit is dropped")
def drops_one_too_many(theta, gradient, computed_at, version, lr, limit):
    if version - computed_at >= limit:
        return version
    theta -= lr / (1 + version - computed_at) * gradient
    return version + 1


@mistake("apply_stale", "is applied as if it were limit versions old: it has to be dropped")
def clips_the_staleness(theta, gradient, computed_at, version, lr, limit):
    theta -= lr / (1 + min(version - computed_at, limit)) * gradient
    return version + 1


@mistake("apply_stale", "a dropped gradient makes no new version")
def counts_what_it_dropped(theta, gradient, computed_at, version, lr, limit):
    if version - computed_at <= limit:
        theta -= lr / (1 + version - computed_at) * gradient
    return version + 1


@mistake("apply_stale", "theta is as it was before the call")
def not_in_place(theta, gradient, computed_at, version, lr, limit):
    if version - computed_at > limit:
        return version
    theta = theta - lr / (1 + version - computed_at) * gradient
    return version + 1


@mistake("apply_stale", "division by zero")
def divides_by_staleness(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale > limit:
        return version
    theta -= lr / stale * gradient
    return version + 1


@mistake("apply_stale", "a gradient of staleness 1 gets half a step")
def staleness_one_counts_full(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale > limit:
        return version
    theta -= lr / max(stale, 1) * gradient
    return version + 1


@mistake("apply_stale", "it returns nothing (None): the version that theta has now is asked for")
def returns_nothing(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale <= limit:
        theta -= lr / (1 + stale) * gradient


@mistake("apply_stale", "`gradient` was changed")
def scales_the_gradient(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale > limit:
        return version
    gradient /= 1 + stale
    theta -= lr * gradient
    return version + 1


@mistake("apply_stale", "each gradient applied makes a new version")
def never_counts(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale <= limit:
        theta -= lr / (1 + stale) * gradient
    return version


@mistake("apply_stale", "it returns the staleness")
def returns_the_staleness(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale <= limit:
        theta -= lr / (1 + stale) * gradient
    return stale


@mistake("apply_stale", "the version that theta has now is asked for")
def returns_theta(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale <= limit:
        theta -= lr / (1 + stale) * gradient
    return theta


@mistake("apply_stale", "limit 0 drops whatever is stale")
def takes_limit_0_for_none(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if limit and stale > limit:
        return version
    theta -= lr / (1 + stale) * gradient
    return version + 1


@mistake("apply_stale", "dropped, though it is not staler than limit: staleness is version - computed_at")
def compares_the_version(theta, gradient, computed_at, version, lr, limit):
    if version > limit:
        return version
    theta -= lr / (1 + version - computed_at) * gradient
    return version + 1


@mistake("apply_stale", "`gradient` was changed")
def scales_the_gradient_and_back(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale > limit:
        return version
    gradient *= lr / (1 + stale)
    theta -= gradient
    gradient /= lr / (1 + stale)
    return version + 1


@right("apply_stale")
def through_numpy(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale <= limit:
        theta.numpy()[...] -= (lr / (1 + stale) * gradient).numpy()
    return version + (stale <= limit)


@right("apply_stale")
def by_sub(theta, gradient, computed_at, version, lr, limit):
    fresh = version - computed_at <= limit
    if fresh:
        theta.sub_(gradient, alpha=lr / (version - computed_at + 1))
    return version + int(fresh)
