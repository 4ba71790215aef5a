"""Wrong answers to zero1_step, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from tests.lessons.lesson07.shared import mine
from tests.lessons.planted import mistake, right


def my_mean(gradients, momentum, divide=True):
    mean = torch.empty_like(momentum)
    dist.reduce_scatter(mean, list(gradients.chunk(dist.get_world_size())))
    return mean / dist.get_world_size() if divide else mean


def give_all(parameters):
    shards = list(parameters.chunk(dist.get_world_size()))
    dist.all_gather(shards, shards[dist.get_rank()].clone())


@mistake("zero1_step", "the sum was not divided by 4, the number of ranks")
def a_sum(parameters, gradients, momentum, lr, beta):
    momentum.mul_(beta).add_(my_mean(gradients, momentum, divide=False))
    mine(parameters).sub_(lr * momentum)
    give_all(parameters)


@mistake("zero1_step", "the shards were not gathered: a rank has updated its own n-th only")
def keeps_it_to_itself(parameters, gradients, momentum, lr, beta):
    momentum.mul_(beta).add_(my_mean(gradients, momentum))
    mine(parameters).sub_(lr * momentum)


@mistake("zero1_step", "nothing was reduced: each shard is updated with its owner's gradient alone")
def own_gradient(parameters, gradients, momentum, lr, beta):
    momentum.mul_(beta).add_(mine(gradients))
    mine(parameters).sub_(lr * momentum)
    give_all(parameters)


@mistake("zero1_step", "it calls all_reduce, which brings the whole mean to every rank")
def all_reduces(parameters, gradients, momentum, lr, beta):
    dist.all_reduce(gradients)
    momentum.mul_(beta).add_(mine(gradients) / dist.get_world_size())
    mine(parameters).sub_(lr * momentum)
    give_all(parameters)


@mistake("zero1_step", "parameters are as they were: write the new shard into them, and those that are gathered")
def into_a_new_tensor(parameters, gradients, momentum, lr, beta):
    momentum.mul_(beta).add_(my_mean(gradients, momentum))
    shards = [torch.empty_like(momentum) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, mine(parameters) - lr * momentum)
    parameters = torch.cat(shards)


@mistake("zero1_step", "the momentum is never kept: write it into `momentum`, the next step needs it")
def forgets_the_momentum(parameters, gradients, momentum, lr, beta):
    momentum = beta * momentum + my_mean(gradients, momentum)
    mine(parameters).sub_(lr * momentum)
    give_all(parameters)


@mistake("zero1_step", "the gradient is multiplied by 1 - beta")
def as_adam_does(parameters, gradients, momentum, lr, beta):
    momentum.mul_(beta).add_((1 - beta) * my_mean(gradients, momentum))
    mine(parameters).sub_(lr * momentum)
    give_all(parameters)


@mistake("zero1_step", "the step uses the gradient instead of the new momentum")
def plain_step(parameters, gradients, momentum, lr, beta):
    mean = my_mean(gradients, momentum)
    momentum.mul_(beta).add_(mean)
    mine(parameters).sub_(lr * mean)
    give_all(parameters)


@mistake("zero1_step", "the step uses the old one")
def steps_first(parameters, gradients, momentum, lr, beta):
    mine(parameters).sub_(lr * momentum)
    momentum.mul_(beta).add_(my_mean(gradients, momentum))
    give_all(parameters)


@mistake("zero1_step", "the sign is wrong")
def climbs(parameters, gradients, momentum, lr, beta):
    momentum.mul_(beta).add_(my_mean(gradients, momentum))
    mine(parameters).add_(lr * momentum)
    give_all(parameters)


@mistake("zero1_step", "bytes leave a rank where 96 are enough")
def gathers_everything(parameters, gradients, momentum, lr, beta):
    momentum.mul_(beta).add_(my_mean(gradients, momentum))
    mine(parameters).sub_(lr * momentum)
    n = dist.get_world_size()
    wholes = [torch.empty_like(parameters) for _ in range(n)]
    dist.all_gather(wholes, parameters.clone())
    parameters.copy_(torch.cat([whole.chunk(n)[r] for r, whole in enumerate(wholes)]))


@mistake("zero1_step", "it works with 4 ranks, but not with 3")
def four_ranks_only(parameters, gradients, momentum, lr, beta):
    mean = torch.empty_like(momentum)
    dist.reduce_scatter(mean, list(gradients.chunk(dist.get_world_size())))
    momentum.mul_(beta).add_(mean / 4)
    mine(parameters).sub_(lr * momentum)
    give_all(parameters)


@mistake("zero1_step", "the result is right, but `gradients` was changed")
def divides_in_place(parameters, gradients, momentum, lr, beta):
    gradients /= dist.get_world_size()
    momentum.mul_(beta).add_(my_mean(gradients, momentum, divide=False))
    mine(parameters).sub_(lr * momentum)
    give_all(parameters)


@mistake("zero1_step", "this is Nesterov's step")
def looks_ahead(parameters, gradients, momentum, lr, beta):
    mean = my_mean(gradients, momentum)
    momentum.mul_(beta).add_(mean)
    mine(parameters).sub_(lr * (mean + beta * momentum))
    give_all(parameters)


@right("zero1_step")
def gathers_the_momentum(parameters, gradients, momentum, lr, beta):
    momentum.mul_(beta).add_(my_mean(gradients, momentum))
    whole = torch.empty_like(parameters)
    dist.all_gather_into_tensor(whole, momentum)
    parameters.sub_(lr * whole)


@right("zero1_step")
def by_exchange(parameters, gradients, momentum, lr, beta):
    rank, n = dist.get_rank(), dist.get_world_size()
    parts = torch.empty_like(gradients)
    dist.all_to_all_single(parts, gradients)
    momentum.copy_(beta * momentum + parts.view(n, -1).mean(0))
    shard = parameters.view(n, -1)[rank] - lr * momentum
    dist.all_gather(list(parameters.view(n, -1)), shard)


@right("zero1_step")
def by_hand_in_a_ring(parameters, gradients, momentum, lr, beta):
    rank, n = dist.get_rank(), dist.get_world_size()

    def pass_on(leaving):
        arriving = torch.empty_like(leaving)
        message = dist.isend(leaving.clone(), (rank + 1) % n)
        dist.recv(arriving, (rank - 1) % n)
        message.wait()
        return arriving

    parts, shards = gradients.chunk(n), parameters.chunk(n)
    carried = parts[rank - 1]
    for step in range(n - 1):
        carried = pass_on(carried) + parts[(rank - 2 - step) % n]
    momentum.mul_(beta).add_(carried / n)
    shards[rank].sub_(lr * momentum)
    for step in range(n - 1):
        shards[(rank - step - 1) % n].copy_(pass_on(shards[(rank - step) % n]))


def step_with(parameters, gradients, momentum, lr, beta):
    momentum.mul_(beta).add_(my_mean(gradients, momentum))
    mine(parameters).sub_(lr * momentum)
    give_all(parameters)


@mistake("zero1_step", "lr and beta are not used: it is right where they are 0.1 and 0.9, and here 0.3 and 0.6")
def rates_written_down(parameters, gradients, momentum, lr, beta):
    step_with(parameters, gradients, momentum, 0.1, 0.9)


@mistake("zero1_step", "lr is not used")
def a_rate_written_down(parameters, gradients, momentum, lr, beta):
    step_with(parameters, gradients, momentum, 0.1, beta)


@mistake("zero1_step", "beta is not used: here it is 0.6, and not 1 - lr")
def one_minus_lr(parameters, gradients, momentum, lr, beta):
    step_with(parameters, gradients, momentum, lr, 1 - lr)


@mistake("zero1_step", "the shards are gathered before the step")
def gathers_before_the_step(parameters, gradients, momentum, lr, beta):
    momentum.mul_(beta).add_(my_mean(gradients, momentum))
    give_all(parameters)
    mine(parameters).sub_(lr * momentum)


@mistake("zero1_step", "lr is multiplied into the momentum")
def lr_in_the_momentum(parameters, gradients, momentum, lr, beta):
    momentum.mul_(beta).add_(lr * my_mean(gradients, momentum))
    mine(parameters).sub_(momentum)
    give_all(parameters)


@mistake("zero1_step", "parameters are as they were: write the new shard into them, and those that are gathered")
def a_shard_that_is_a_copy(parameters, gradients, momentum, lr, beta):
    momentum.mul_(beta).add_(my_mean(gradients, momentum))
    shard = mine(parameters)
    shard = shard - lr * momentum
    give_all(parameters)


@right("zero1_step")
def by_functional_collectives(parameters, gradients, momentum, lr, beta):
    momentum.mul_(beta).add_(functional.reduce_scatter_tensor(gradients, "avg", 0, dist.group.WORLD))
    shard = mine(parameters) - lr * momentum
    parameters.copy_(functional.all_gather_tensor(shard, 0, dist.group.WORLD))


@right("zero1_step")
def by_torchs_optimizer(parameters, gradients, momentum, lr, beta):
    shard = torch.nn.Parameter(mine(parameters).clone())
    shard.grad = my_mean(gradients, momentum)
    optimizer = torch.optim.SGD([shard], lr=lr, momentum=beta)
    optimizer.state[shard]["momentum_buffer"] = momentum
    optimizer.step()
    dist.all_gather_into_tensor(parameters, shard.detach())
