"""server_round: wrong answers as people write them, and unusual right ones."""

import torch
import torch.distributed as dist

from tests.lessons.planted import mistake, right


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
