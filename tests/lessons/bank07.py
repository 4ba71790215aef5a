"""Wrong answers to the exercises of lesson 07, as people really write them; and some more right ones."""

import math

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as differentiable
from planted import mistake, right

# ---- padded_shard ---------------------------------------------------------------------------------------------


@mistake("padded_shard", "shards of 2 elements hold 8 of 10: the length has to be rounded up")
def rounds_down(numel, rank, n):
    length = numel // n
    return rank * length, (rank + 1) * length, 0


@mistake("padded_shard", "stop is 12, but the line has 10 elements: what lies beyond is padding")
def runs_over(numel, rank, n):
    length = -(-numel // n)
    return rank * length, (rank + 1) * length, max(0, (rank + 1) * length - numel)


@mistake("padded_shard", "padding 2 is what the whole line needs: each shard has only its own part of it")
def all_the_padding(numel, rank, n):
    length = -(-numel // n)
    return min(rank * length, numel), min((rank + 1) * length, numel), n * length - numel


@mistake("padded_shard", "start 6 is beyond stop 5: a shard of padding alone begins and ends at 5")
def start_is_not_cut_off(numel, rank, n):
    length = -(-numel // n)
    stop = min((rank + 1) * length, numel)
    return rank * length, stop, length - max(0, stop - rank * length)


@mistake("padded_shard", "this cuts the line evenly: with padding, every shard but the last ones is full")
def without_padding(numel, rank, n):
    sizes = [numel // n + (r < numel % n) for r in range(n)]
    return sum(sizes[:rank]), sum(sizes[: rank + 1]), -(-numel // n) - sizes[rank]


@mistake("padded_shard", "stop is one too small: line[start:stop] does not include it")
def last_index(numel, rank, n):
    length = -(-numel // n)
    return min(rank * length, numel), min((rank + 1) * length, numel) - 1, 0


@mistake("padded_shard", "whole numbers (int) are asked for: use // instead of /")
def divides(numel, rank, n):
    length = max(1, numel / n)
    return rank * length, (rank + 1) * length, 0


@mistake("padded_shard", "three whole numbers (start, stop, padding) are asked for")
def only_a_pair(numel, rank, n):
    length = -(-numel // n)
    return rank * length, (rank + 1) * length


@mistake("padded_shard", "start and stop are right, padding is not: shards are 3 long with it")
def no_padding_told(numel, rank, n):
    length = -(-numel // n)
    return min(rank * length, numel), min((rank + 1) * length, numel), 0


@mistake("padded_shard", "with padding every shard is 3 long, and rank 0's begins at 0 · 3")
def one_more_for_each(numel, rank, n):
    length = numel // n + 2 * (numel % n > 0)
    start, stop = min(rank * length, numel), min((rank + 1) * length, numel)
    return start, stop, length - (stop - start)


def full_shards(numel, rank, length):
    start, stop = min(rank * length, numel), min((rank + 1) * length, numel)
    return start, stop, length - (stop - start)


@mistake("padded_shard", "this is right for 4 ranks, and here are 3: is a 4 written into it?")
def for_four_ranks(numel, rank, n):
    return full_shards(numel, rank, -(-numel // 4))


@mistake("padded_shard", "a shard of padding alone begins and ends at the line's end, at 5")
def padding_at_the_beginning(numel, rank, n):
    start, stop, padding = full_shards(numel, rank, -(-numel // n))
    return (start, stop, padding) if start < stop else (0, 0, padding)


@mistake("padded_shard", "stop is where the shard ends on the line, at 4: 2 is its length")
def start_and_length(numel, rank, n):
    start, stop, padding = full_shards(numel, rank, -(-numel // n))
    return start, stop - start, padding


@right("padded_shard")
def by_counting_what_is_left(numel, rank, n):
    length = math.ceil(numel / n)
    real = sorted([0, numel - rank * length, length])[1]
    start = min(numel, rank * length)
    return [start, start + real, length - real]


@mistake("padded_shard", "the third number is the shard's length, 2: its padding, 0, is asked for")
def length_in_place_of_padding(numel, rank, n):
    start, stop, _ = full_shards(numel, rank, -(-numel // n))
    return start, stop, stop - start


@mistake("padded_shard", "whole numbers (int) are asked for: a Tensor is among them")
def numbers_as_tensors(numel, rank, n):
    return tuple(torch.tensor(full_shards(numel, rank, -(-numel // n))))


@right("padded_shard")
def by_slicing_a_range(numel, rank, n):
    length = (numel + n - 1) // n
    mine = range(numel)[rank * length : (rank + 1) * length]
    return mine.start, mine.stop, length - len(mine)


# ---- zero_memory ----------------------------------------------------------------------------------------------


def bytes_of(psi, n, stage, p=4, g=4, s=8):
    return psi * (p / (n if stage > 2 else 1) + g / (n if stage > 1 else 1) + s / (n if stage > 0 else 1))


@mistake("zero_memory", "the bytes of each kind are ignored")
def always_sixteen(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage)


@mistake("zero_memory", "stage 0 shards nothing")
def one_stage_ahead(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage + 1, parameter_bytes, gradient_bytes, state_bytes)


@mistake("zero_memory", "stage 1 shards the optimizer's state")
def one_stage_behind(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage - 1, parameter_bytes, gradient_bytes, state_bytes)


@mistake("zero_memory", "each stage shards only its own kind here")
def only_its_own(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    kinds = [state_bytes, gradient_bytes, parameter_bytes]
    if stage:
        kinds[stage - 1] /= n
    return parameters * sum(kinds)


@mistake("zero_memory", "this is for all ranks together: one rank is asked for")
def the_whole_cluster(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return n * bytes_of(parameters, n, stage, parameter_bytes, gradient_bytes, state_bytes)


@mistake("zero_memory", "at every stage everything is divided by n")
def all_divided(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return parameters * (parameter_bytes + gradient_bytes + state_bytes) / n


@mistake("zero_memory", "this is in GB: bytes are asked for")
def in_gigabytes(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage, parameter_bytes, gradient_bytes, state_bytes) / 1e9


@mistake("zero_memory", "first the optimizer's state is sharded, the parameters last")
def parameters_first(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage, state_bytes, gradient_bytes, parameter_bytes)


@mistake("zero_memory", "the order is wrong: stage 2 shards the gradients, and only stage 3 the parameters")
def gradients_last(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage, gradient_bytes, parameter_bytes, state_bytes)


@mistake("zero_memory", "state_bytes is not used")
def two_numbers_of_state(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage, parameter_bytes, gradient_bytes, 2 * parameter_bytes)


@mistake("zero_memory", "n-ths are rounded down here: divide with /, not with //")
def rounded_down(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    kinds = [state_bytes, gradient_bytes, parameter_bytes]
    return sum(parameters * b // (n if stage > i else 1) for i, b in enumerate(kinds))


@right("zero_memory")
def with_a_list(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    kinds = [state_bytes, gradient_bytes, parameter_bytes]
    return sum(parameters * b / n for b in kinds[:stage]) + sum(parameters * b for b in kinds[stage:])


@mistake("zero_memory", "state_bytes is not used: 8 is only its default")
def always_adam(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage, parameter_bytes, gradient_bytes, 8)


@mistake("zero_memory", "stage 2 does no more than stage 1 here")
def stage_1_for_2(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, 1 if stage == 2 else stage, parameter_bytes, gradient_bytes, state_bytes)


@mistake("zero_memory", "stage 2 does what stage 3 does here: it leaves the parameters whole")
def stage_3_for_2(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, 3 if stage == 2 else stage, parameter_bytes, gradient_bytes, state_bytes)


@mistake("zero_memory", "n is not used: this is for 4 ranks")
def memory_on_four(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, 4, stage, parameter_bytes, gradient_bytes, state_bytes)


@mistake("zero_memory", "n-ths are rounded up here: divide with /, and round nothing")
def whole_elements(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    kinds = [state_bytes, gradient_bytes, parameter_bytes]
    return sum(b * (math.ceil(parameters / n) if stage > i else parameters) for i, b in enumerate(kinds))


@mistake("zero_memory", "at stage 3 the gathered parameters are counted")
def counts_what_is_gathered(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    held = bytes_of(parameters, n, stage, parameter_bytes, gradient_bytes, state_bytes)
    return held + parameters * parameter_bytes * (stage == 3)


@mistake("zero_memory", "this is in MiB: bytes are asked for")
def in_mebibytes(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage, parameter_bytes, gradient_bytes, state_bytes) / 2**20


@right("zero_memory")
def whole_and_dealt_out(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    kinds = torch.tensor([parameter_bytes, gradient_bytes, state_bytes], dtype=torch.float64)
    return parameters * (kinds[: 3 - stage].sum() + kinds[3 - stage :].sum() / n)


# ---- zero1_step -----------------------------------------------------------------------------------------------


def my_mean(gradients, momentum, divide=True):
    mean = torch.empty_like(momentum)
    dist.reduce_scatter(mean, list(gradients.chunk(dist.get_world_size())))
    return mean / dist.get_world_size() if divide else mean


def give_all(parameters):
    shards = list(parameters.chunk(dist.get_world_size()))
    dist.all_gather(shards, shards[dist.get_rank()].clone())


def mine(parameters):
    return parameters.chunk(dist.get_world_size())[dist.get_rank()]


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


# ---- sharded_linear -------------------------------------------------------------------------------------------


def whole(shard, out_features):
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, shard)
    return torch.cat(shards).view(out_features, -1)


def scattered(gradient, shard):
    out = torch.empty_like(shard)
    dist.reduce_scatter(out, list(gradient.flatten().chunk(dist.get_world_size())))
    return out


@mistake("sharded_linear", "the output has no graph")
def no_function(x, shard, out_features):
    return x.detach() @ whole(shard.detach(), out_features).T


@mistake("sharded_linear", "are kept from forward to backward besides x, shard and output")
def saves_the_weight(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            weight = whole(shard, out_features)
            ctx.save_for_backward(x, shard, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, gradient):
            x, shard, weight = ctx.saved_tensors
            return gradient @ weight, scattered(gradient.T @ x, shard) / dist.get_world_size()

    return Linear.apply(x, shard)


@mistake("sharded_linear", "are kept from forward to backward besides x, shard and output")
def keeps_it_in_ctx(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.x, ctx.weight = x, whole(shard, out_features)
            return x @ ctx.weight.T

        @staticmethod
        def backward(ctx, gradient):
            mean = scattered(gradient.T @ ctx.x, shard) / dist.get_world_size()
            return gradient @ ctx.weight, mean

    return Linear.apply(x, shard)


@mistake("sharded_linear", "the sum was not divided by 4: shard.grad is the mean over the ranks")
def sums(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            return gradient @ whole(shard, out_features), scattered(gradient.T @ x, shard)

    return Linear.apply(x, shard)


@mistake("sharded_linear", "nothing was reduced: shard.grad is cut from this rank's own gradient")
def own_part(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            own = (gradient.T @ x).flatten().chunk(dist.get_world_size())[dist.get_rank()]
            return gradient @ whole(shard, out_features), own

    return Linear.apply(x, shard)


@mistake("sharded_linear", "it calls all_reduce, which brings the whole gradient to every rank")
def reduces_all(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            n, total = dist.get_world_size(), gradient.T @ x
            dist.all_reduce(total)
            return gradient @ whole(shard, out_features), total.flatten().chunk(n)[dist.get_rank()] / n

    return Linear.apply(x, shard)


@mistake("sharded_linear", "the weight is (out_features, in_features): here it was read as (in, out)")
def reads_it_transposed(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return x @ whole(shard, x.shape[1])

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            mean = scattered(x.T @ gradient, shard) / dist.get_world_size()
            return gradient @ whole(shard, x.shape[1]).T, mean

    return Linear.apply(x, shard)


@mistake("sharded_linear", "x has the mean of the ranks' gradients: its rows are this rank's own")
def averages_x_too(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            n, own = dist.get_world_size(), gradient @ whole(shard, out_features)
            dist.all_reduce(own)
            return own / n, scattered(gradient.T @ x, shard) / n

    return Linear.apply(x, shard)


@mistake("sharded_linear", "shard has no gradient: return it from backward, in the place of shard")
def only_x(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(shard)
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            return gradient @ whole(*ctx.saved_tensors, out_features), None

    return Linear.apply(x, shard)


@mistake("sharded_linear", "its backward calls scatter, as that of torch.distributed.nn's all_gather does")
def leaves_it_to_autograd(x, shard, out_features):
    weight = torch.cat(differentiable.all_gather(shard)).view(out_features, -1) / 1
    n = dist.get_world_size()
    return x @ (weight / n + (weight - weight / n).detach()).T


def linear_that(keep, weight_of, unchanged=True):
    """A sharded linear layer that keeps `keep(weight)`, and in backward computes with `weight_of` what it kept."""

    def layer(x, shard, out_features):
        class Linear(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, shard):
                weight = whole(shard, out_features)
                ctx.save_for_backward(x, shard)
                ctx.kept = keep(weight)
                return x @ weight.T

            @staticmethod
            def backward(ctx, gradient):
                x, shard = ctx.saved_tensors
                gathered, n = whole(shard, out_features), dist.get_world_size()
                weight = gathered if ctx.kept is None else weight_of(ctx.kept).view(out_features, -1)
                of_x = gradient @ weight
                gradient = gradient.div_(n) if not unchanged else gradient / n
                return of_x, scattered(gradient.T @ x, shard)

        return Linear.apply(x, shard)

    return layer


@mistake("sharded_linear", "are kept from forward to backward besides x, shard and output")
def keeps_the_pieces(x, shard, out_features):
    keep = linear_that(lambda weight: [piece.clone() for piece in weight.flatten().chunk(4)], torch.cat)
    return keep(x, shard, out_features)


@mistake("sharded_linear", "backward computes with a weight, or parts of it, kept from forward")
def keeps_it_in_numpy(x, shard, out_features):
    return linear_that(lambda weight: weight.numpy().copy(), torch.from_numpy)(x, shard, out_features)


@mistake("sharded_linear", "backward computes with a weight, or parts of it, kept from forward")
def keeps_a_list(x, shard, out_features):
    as_tensor = lambda numbers: torch.tensor(numbers, dtype=x.dtype)  # noqa: E731
    return linear_that(lambda weight: weight.flatten().tolist(), as_tensor)(x, shard, out_features)


@mistake("sharded_linear", "the gradient that backward is given was changed")
def divides_what_it_is_given(x, shard, out_features):
    return linear_that(lambda weight: None, None, unchanged=False)(x, shard, out_features)


@mistake("sharded_linear", "backward computes with a weight, or parts of it, kept from forward")
def keeps_the_others_shards(x, shard, out_features):
    def keep(weight):
        ours = weight.flatten().chunk(dist.get_world_size())
        return [None if r == dist.get_rank() else piece.clone() for r, piece in enumerate(ours)]

    def again(pieces):
        return torch.cat([shard.detach() if piece is None else piece for piece in pieces])

    return linear_that(keep, again)(x, shard, out_features)


@mistake("sharded_linear", "`x` was changed: others may use it too, work on a copy")
def divides_x(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            x.data /= dist.get_world_size()
            return gradient @ whole(shard, out_features), scattered(gradient.T @ x, shard)

    return Linear.apply(x, shard)


@right("sharded_linear")
def with_a_checkpoint(x, shard, out_features):
    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, shard):
            return whole(shard, out_features)

        @staticmethod
        def backward(ctx, gradient):
            n = dist.get_world_size()
            return scattered(gradient / n, gradient.flatten().chunk(n)[0])

    def layer(x, shard):
        return x @ Gather.apply(shard).T

    return torch.utils.checkpoint.checkpoint(layer, x, shard, use_reentrant=False)


@right("sharded_linear")
def frees_the_memory(x, shard, out_features):
    line = shard.new_empty(dist.get_world_size() * shard.numel())

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            dist.all_gather_into_tensor(line, shard)
            y = x @ line.view(out_features, -1).T
            ctx.save_for_backward(x, shard, line)
            line.untyped_storage().resize_(0)
            return y

        @staticmethod
        def backward(ctx, gradient):
            x, shard, line = ctx.saved_tensors
            line.untyped_storage().resize_(line.nbytes)
            dist.all_gather_into_tensor(line, shard)
            of_x = gradient @ line.view(out_features, -1)
            line.untyped_storage().resize_(0)
            return of_x, scattered(gradient.T @ x, shard) / dist.get_world_size()

    return Linear.apply(x, shard)


@right("sharded_linear")
def saves_copies(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.x, ctx.shard = x.detach().clone(), shard.detach().clone()
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            mean = scattered(gradient.T @ ctx.x, ctx.shard) / dist.get_world_size()
            return gradient @ whole(ctx.shard, out_features), mean

    return Linear.apply(x, shard)


@right("sharded_linear")
def with_single_calls(x, shard, out_features):
    n = dist.get_world_size()

    def gather(shard):
        weight = shard.new_empty(n * shard.numel())
        dist.all_gather_into_tensor(weight, shard.detach())
        return weight.view(out_features, x.shape[1])

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return torch.nn.functional.linear(x, gather(shard))

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            mine = torch.empty_like(shard)
            dist.reduce_scatter_tensor(mine, (gradient.T @ x / n).flatten())
            return gradient.mm(gather(shard)), mine

    return Linear.apply(x, shard)


def linear_with(backward, forward=lambda x, shard, out: x @ whole(shard, out).T):
    """A sharded linear layer with this backward(gradient, x, shard, out_features)."""

    def layer(x, shard, out_features):
        class Linear(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, shard):
                ctx.save_for_backward(x, shard)
                return forward(x, shard, out_features)

            @staticmethod
            def backward(ctx, gradient):
                return backward(gradient, *ctx.saved_tensors, out_features)

        return Linear.apply(x, shard)

    return layer


def mean_of(gradient, x, shard):
    return scattered(gradient.T @ x, shard) / dist.get_world_size()


@mistake("sharded_linear", "x has no gradient: return it from backward, in the place of x")
def only_the_shard(x, shard, out_features):
    return linear_with(lambda g, x, s, out: (None, mean_of(g, x, s)))(x, shard, out_features)


@mistake("sharded_linear", "x's gradient is divided by 4")
def x_divided_too(x, shard, out_features):
    return linear_with(lambda g, x, s, out: (g @ whole(s, out) / dist.get_world_size(), mean_of(g, x, s)))(
        x, shard, out_features
    )


@mistake("sharded_linear", "divided by the 3 rows")
def divides_by_rows(x, shard, out_features):
    return linear_with(lambda g, x, s, out: (g @ whole(s, out), mean_of(g, x, s) / len(x)))(x, shard, out_features)


@mistake("sharded_linear", "shard.grad is counted twice")
def sets_it_and_returns_it(x, shard, out_features):
    def backward(g, x, s, out):
        mean = mean_of(g, x, s)
        shard.grad = mean.clone()
        return g @ whole(s, out), mean

    return linear_with(backward)(x, shard, out_features)


@mistake("sharded_linear", "one layer works, two do not (is something kept outside of ctx?)")
def in_a_global_variable(x, shard, out_features):
    def forward(x, shard, out):
        last["x"] = x
        return x @ whole(shard, out).T

    def backward(g, x, s, out):
        return g @ whole(s, out), mean_of(g, last.pop("x"), s)

    return linear_with(backward, forward)(x, shard, out_features)


last = {}


@mistake("sharded_linear", "bytes leave a rank where 288 are enough")
def gathers_all_gradients(x, shard, out_features):
    def backward(g, x, s, out):
        own, n = (g.T @ x).flatten(), dist.get_world_size()
        everyone = [torch.empty_like(own) for _ in range(n)]
        dist.all_gather(everyone, own)
        return g @ whole(s, out), sum(everyone).chunk(n)[dist.get_rank()] / n

    return linear_with(backward)(x, shard, out_features)


@right("sharded_linear")
def the_functional_way(x, shard, out_features):
    def weight_of(s):
        return functional.all_gather_tensor(s.detach(), 0, dist.group.WORLD).view(out_features, -1)

    def backward(g, x, s, out):
        mean = functional.reduce_scatter_tensor((g.T @ x).flatten(), "avg", 0, dist.group.WORLD)
        return g @ weight_of(s), mean

    return linear_with(backward, lambda x, s, out: x @ weight_of(s).T)(x, shard, out_features)


@right("sharded_linear")
def overlaps_its_gathering(x, shard, out_features):
    def backward(g, x, s, out):
        mean = torch.empty_like(s)
        work = dist.reduce_scatter_tensor(mean, (g.T @ x).flatten(), dist.ReduceOp.AVG, async_op=True)
        of_x = g @ whole(s, out)
        work.wait()
        return of_x, mean

    return linear_with(backward)(x, shard, out_features)


# ---- clip_sharded ---------------------------------------------------------------------------------------------


def squares(gradients):
    return sum((g.double().square().sum() for g in gradients), torch.zeros((), dtype=torch.float64))


def scaled(gradients, norm, max_norm):
    if norm > max_norm:
        for g in gradients:
            g.mul_(float(max_norm / norm))
    return norm


@mistake("clip_sharded", "each rank returns the norm of its own gradients")
def own_norm(gradients, max_norm):
    return scaled(gradients, squares(gradients).sqrt(), max_norm)


@mistake("clip_sharded", "the ranks' norms were added: norms do not add up, their squares do")
def adds_norms(gradients, max_norm):
    norm = squares(gradients).sqrt()
    dist.all_reduce(norm)
    return scaled(gradients, norm, max_norm)


@mistake("clip_sharded", "the square root is missing")
def no_root(gradients, max_norm):
    total = squares(gradients)
    dist.all_reduce(total)
    return scaled(gradients, total, max_norm)


@mistake("clip_sharded", "the mean over the ranks was taken, where the sum is asked for")
def mean_of_squares(gradients, max_norm):
    total = squares(gradients)
    dist.all_reduce(total)
    return scaled(gradients, (total / dist.get_world_size()).sqrt(), max_norm)


@mistake("clip_sharded", "the largest of the ranks' norms is not the norm of all")
def largest(gradients, max_norm):
    norm = squares(gradients).sqrt()
    dist.all_reduce(norm, dist.ReduceOp.MAX)
    return scaled(gradients, norm, max_norm)


@mistake("clip_sharded", "gradients below max_norm were scaled up to it")
def always_scales(gradients, max_norm):
    total = squares(gradients)
    dist.all_reduce(total)
    for g in gradients:
        g.mul_(float(max_norm / total.sqrt()))
    return total.sqrt()


@mistake("clip_sharded", "the gradients are as they were: scale them in place")
def scales_copies(gradients, max_norm):
    total = squares(gradients)
    dist.all_reduce(total)
    for g in gradients:
        g = g * float(min(1, max_norm / total.sqrt()))
    return total.sqrt()


@mistake("clip_sharded", "rank 3 has no gradients here, and does not make the call that the others make")
def nothing_to_do(gradients, max_norm):
    if not gradients:
        return torch.tensor(0.0)
    total = squares(gradients)
    dist.all_reduce(total)
    return scaled(gradients, total.sqrt(), max_norm)


@mistake("clip_sharded", "as if the gradients travelled: one number is enough")
def moves_the_gradients(gradients, max_norm):
    flat = torch.cat([torch.zeros(0, dtype=torch.float64), *(g.flatten().double() for g in gradients)])
    padded = torch.zeros(8, dtype=torch.float64)
    padded[: len(flat)] = flat
    everybody = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, padded)
    return scaled(gradients, torch.cat(everybody).norm(), max_norm)


@mistake("clip_sharded", "each rank scaled by its own norm: one factor for all, from the global norm")
def own_factor(gradients, max_norm):
    total = squares(gradients)
    scaled(gradients, total.sqrt(), max_norm)
    dist.all_reduce(total)
    return total.sqrt()


@mistake("clip_sharded", "this is the norm after clipping")
def norm_after(gradients, max_norm):
    total = squares(gradients)
    dist.all_reduce(total)
    scaled(gradients, total.sqrt(), max_norm)
    return total.sqrt().clamp(max=max_norm)


@mistake("clip_sharded", "every element was clamped")
def clamps(gradients, max_norm):
    total = squares(gradients)
    dist.all_reduce(total)
    for g in gradients:
        g.clamp_(-max_norm, max_norm)
    return total.sqrt()


@mistake("clip_sharded", "it calls barrier: the all_reduce itself waits for everybody")
def waits_first(gradients, max_norm):
    dist.barrier()
    total = squares(gradients)
    dist.all_reduce(total)
    return scaled(gradients, total.sqrt(), max_norm)


@mistake("clip_sharded", "the all_reduce carries 32 bytes: one number is enough")
def a_number_for_each_rank(gradients, max_norm):
    of_ranks = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    of_ranks[dist.get_rank()] = squares(gradients)
    dist.all_reduce(of_ranks)
    return scaled(gradients, of_ranks.sum().sqrt(), max_norm)


@mistake("clip_sharded", "float64 values went through float32")
def in_single_precision(gradients, max_norm):
    total = sum((g.float().square().sum() for g in gradients), torch.zeros(()))
    dist.all_reduce(total)
    return scaled(gradients, total.sqrt(), max_norm)


@mistake("clip_sharded", "the tensors' norms were added: norms do not add up, their squares do")
def adds_norms_of_tensors(gradients, max_norm):
    norm = sum((g.double().norm() for g in gradients), torch.zeros((), dtype=torch.float64))
    dist.all_reduce(norm)
    return scaled(gradients, norm, max_norm)


@right("clip_sharded")
def as_torch_does(gradients, max_norm):
    norms = torch.stack([torch.linalg.vector_norm(g.double()) for g in gradients] or [torch.tensor(0.0).double()])
    total = torch.linalg.vector_norm(norms) ** 2
    dist.all_reduce(total)
    factor = (max_norm / (total.sqrt() + 1e-9)).clamp(max=1.0)
    for g in gradients:
        g.mul_(factor.to(g.dtype))
    return total.sqrt().item()


@right("clip_sharded")
def reduces_and_broadcasts(gradients, max_norm):
    total = squares(gradients)
    dist.reduce(total, 0)
    dist.broadcast(total, 0)
    return scaled(gradients, total.sqrt(), max_norm)


@right("clip_sharded")
def all_gathers_one_number(gradients, max_norm):
    parts = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, squares(gradients).view(1))
    return scaled(gradients, sum(parts).sqrt(), max_norm)


@mistake("clip_sharded", "max_norm is not used: it is 8.0 here, and not 0.5")
def always_to_a_half(gradients, max_norm):
    total = squares(gradients)
    dist.all_reduce(total)
    return scaled(gradients, total.sqrt(), 0.5)


@mistake("clip_sharded", "the norm is below max_norm, and yet the gradients are scaled up to it")
def compares_the_squares(gradients, max_norm):
    total = squares(gradients)
    dist.all_reduce(total)
    for g in gradients:
        g.mul_(float(max_norm / total.sqrt()) if total > max_norm else 1.0)
    return total.sqrt()


@mistake("clip_sharded", "this is the largest element, not the root of the sum of squares")
def the_other_norm(gradients, max_norm):
    most = max((g.double().abs().max() for g in gradients if g.numel()), default=torch.zeros((), dtype=torch.float64))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return scaled(gradients, most, max_norm)


@mistake("clip_sharded", "divided by 4, besides")
def a_share_of_the_norm(gradients, max_norm):
    total = squares(gradients)
    dist.all_reduce(total)
    if total.sqrt() > max_norm:
        scaled(gradients, total.sqrt(), max_norm / dist.get_world_size())
    return total.sqrt()


@right("clip_sharded")
def with_torchs_epsilon(gradients, max_norm):
    total = squares(gradients).view(1)
    dist.all_reduce(total)
    factor = (max_norm / (total.sqrt() + 1e-6)).clamp(max=1.0).item()
    for g in gradients:
        g.copy_(g * factor)
    return total.sqrt()
