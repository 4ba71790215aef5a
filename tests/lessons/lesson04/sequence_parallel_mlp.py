"""sequence_parallel_mlp: wrong answers as people write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from tests.lessons.lesson04.shared import me
from tests.lessons.planted import mistake, right


def gather(part):
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def scatter(whole, op=dist.ReduceOp.SUM):
    parts = [part.contiguous() for part in whole.chunk(dist.get_world_size())]
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter(mine, parts, op)
    return mine


def own_part(whole):
    return whole.chunk(dist.get_world_size())[dist.get_rank()].clone()


def mlp(x, up, down, grad, *, enter=gather, leave=scatter, back=gather, end=scatter, relu=True, masked=True):
    whole_x = enter(x)
    hidden = (whole_x @ up.T).relu() if relu else whole_x @ up.T
    y = leave(hidden @ down.T)
    whole_grad = back(grad)
    grad_hidden = (whole_grad @ down) * (hidden > 0) if masked else whole_grad @ down
    return y, end(grad_hidden @ up), grad_hidden.T @ whole_x, whole_grad.T @ hidden


def add_up_and_cut(whole):
    whole = whole.clone()
    dist.all_reduce(whole)
    return own_part(whole)


@mistake(
    "sequence_parallel_mlp",
    "it calls all_reduce: each rank needs only its positions of the sum, reduce_scatter sends half",
)
def all_reduce_and_cut(x, up, down, grad):
    return mlp(x, up, down, grad, leave=add_up_and_cut, end=add_up_and_cut)


@mistake("sequence_parallel_mlp", "each rank has only its own summand: the sum over the ranks is missing")
def cut_without_a_sum(x, up, down, grad):
    return mlp(x, up, down, grad, leave=own_part)


@mistake("sequence_parallel_mlp", "x was not gathered")
def own_positions_only(x, up, down, grad):
    hidden = (x @ up.T).relu()
    grad_hidden = (grad @ down) * (hidden > 0)
    return hidden @ down.T, grad_hidden @ up, grad_hidden.T @ x, grad.T @ hidden


@mistake("sequence_parallel_mlp", "the ranks' summands are added, not averaged")
def averages(x, up, down, grad):
    return mlp(x, up, down, grad, leave=lambda whole: scatter(whole, dist.ReduceOp.AVG))


@mistake("sequence_parallel_mlp", "the gradient of x has to be summed over the ranks")
def gradient_of_x_not_summed(x, up, down, grad):
    return mlp(x, up, down, grad, end=own_part)


@mistake("sequence_parallel_mlp", "the relu is missing")
def no_relu(x, up, down, grad):
    return mlp(x, up, down, grad, relu=False)


@mistake("sequence_parallel_mlp", "the relu's part is missing")
def no_relu_backward(x, up, down, grad):
    return mlp(x, up, down, grad, masked=False)


@mistake("sequence_parallel_mlp", "it counts this rank's positions only")
def weights_see_own_positions(x, up, down, grad):
    y, grad_x, _, _ = mlp(x, up, down, grad)
    hidden = (x @ up.T).relu()
    return y, grad_x, ((grad @ down) * (hidden > 0)).T @ x, grad.T @ hidden


@mistake("sequence_parallel_mlp", "6 halves of an all-reduce are sent")
def gathers_again(x, up, down, grad):
    y, grad_x, _, grad_down = mlp(x, up, down, grad)
    whole_x = gather(x)
    hidden = (whole_x @ up.T).relu()
    summands = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
    dist.all_gather(summands, grad)
    return y, grad_x, ((torch.cat(summands) @ down) * (hidden > 0)).T @ whole_x, grad_down


@mistake("sequence_parallel_mlp", "x is gathered again in backward")
def gathers_x_twice(x, up, down, grad):
    y = scatter((gather(x) @ up.T).relu() @ down.T)
    whole_x, whole_grad = gather(x), gather(grad)
    hidden = (whole_x @ up.T).relu()
    grad_hidden = (whole_grad @ down) * (hidden > 0)
    return y, scatter(grad_hidden @ up), grad_hidden.T @ whole_x, whole_grad.T @ hidden


@mistake("sequence_parallel_mlp", "hidden > 0, not hidden >= 0")
def zero_is_positive(x, up, down, grad):
    y, _, grad_up, grad_down = mlp(x, up, down, grad)
    return y, scatter(((gather(grad) @ down) * (gather(x) @ up.T >= 0)) @ up), grad_up, grad_down


@mistake("sequence_parallel_mlp", "relu of the gradient")
def relu_of_the_gradient(x, up, down, grad):
    y, _, grad_up, grad_down = mlp(x, up, down, grad)
    return y, scatter((gather(grad) @ down).relu() @ up), grad_up, grad_down


@mistake("sequence_parallel_mlp", "each rank has the whole gradient of its own weights")
def weights_divided(x, up, down, grad):
    y, grad_x, grad_up, grad_down = mlp(x, up, down, grad)
    return y, grad_x, grad_up / dist.get_world_size(), grad_down / dist.get_world_size()


@mistake("sequence_parallel_mlp", "it calls all_reduce for a weight's gradient")
def sums_the_weights_gradients(x, up, down, grad):
    y, grad_x, grad_up, grad_down = mlp(x, up, down, grad)
    dist.all_reduce(grad_up)
    return y, grad_x, grad_up, grad_down


@mistake("sequence_parallel_mlp", "down was multiplied by what is left after it")
def hidden_before_relu(x, up, down, grad):
    y, grad_x, grad_up, _ = mlp(x, up, down, grad)
    return y, grad_x, grad_up, gather(grad).T @ (gather(x) @ up.T)


@mistake("sequence_parallel_mlp", "y has shape")
def stays_whole(x, up, down, grad):
    y, *others = mlp(x, up, down, grad)
    return gather(y), *others


@mistake("sequence_parallel_mlp", "is asked for")
def y_only(x, up, down, grad):
    return scatter((gather(x) @ up.T).relu() @ down.T)


@mistake("sequence_parallel_mlp", "gather x and grad, not weights")
def gathers_weights(x, up, down, grad):
    """Sharded data parallelism: right, and something else."""
    whole_up, whole_down = gather(up), gather(down.T).T
    hidden = (x @ whole_up.T).relu()
    grad_hidden = (grad @ whole_down) * (hidden > 0)
    grad_up, grad_down = grad_hidden.T @ x, hidden.T @ grad
    return hidden @ whole_down.T, grad_hidden @ whole_up, scatter(grad_up), scatter(grad_down).T


def gather_tensor(part):
    whole = part.new_empty(len(part) * dist.get_world_size(), part.size(1))
    dist.all_gather_into_tensor(whole, part)
    return whole


def scatter_tensor(whole):
    mine = whole.new_empty(len(whole) // dist.get_world_size(), whole.size(1))
    dist.reduce_scatter_tensor(mine, whole)
    return mine


@right("sequence_parallel_mlp")
def of_whole_tensors(x, up, down, grad):
    return mlp(x, up, down, grad, enter=gather_tensor, leave=scatter_tensor, back=gather_tensor, end=scatter_tensor)


@right("sequence_parallel_mlp")
def functionally(x, up, down, grad):
    world = dist.group.WORLD
    return mlp(
        x, up, down, grad,
        enter=lambda t: functional.all_gather_tensor(t, 0, world).clone(),
        leave=lambda t: functional.reduce_scatter_tensor(t, "sum", 0, world).clone(),
    )  # fmt: skip


def ring_gather(part):
    rank, n = me()
    parts = [part if r == rank else torch.empty_like(part) for r in range(n)]
    for step in range(n - 1):
        message = dist.isend(parts[(rank - step) % n], (rank + 1) % n)
        dist.recv(parts[(rank - step - 1) % n], (rank - 1) % n)
        message.wait()
    return torch.cat(parts)


def straight_scatter(whole):
    rank, n = me()
    parts = [part.contiguous() for part in whole.chunk(n)]
    arrived = [torch.empty_like(parts[0]) for _ in range(n)]
    messages = [dist.isend(parts[r], r) for r in range(n) if r != rank]
    messages += [dist.irecv(arrived[r], r) for r in range(n) if r != rank]
    for message in messages:
        message.wait()
    return sum(arrived[:rank] + arrived[rank + 1 :], parts[rank])


@right("sequence_parallel_mlp")
def from_send_and_receive(x, up, down, grad):
    ways = {"enter": ring_gather, "leave": straight_scatter, "back": ring_gather, "end": straight_scatter}
    return list(mlp(x, up, down, grad, **ways))
