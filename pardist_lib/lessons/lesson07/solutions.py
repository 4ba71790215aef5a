"""One solution for each exercise of lesson 07; signature and docstring are the blank in the notebook."""

import torch
import torch.distributed as dist


def padded_shard(numel: int, rank: int, n: int) -> tuple[int, int, int]:
    """Which part of a flat parameter of `numel` elements is rank's, where zeros make shards equal.

    Returns (start, stop, padding): the rank holds flat[start:stop] and `padding` zeros after it.
    All n shards have the same length, as short as can be; the zeros are all at the end of the flat
    parameter, so the last shards may be partly or only padding. start and stop are between 0 and
    numel, start <= stop; a shard of zeros alone is (numel, numel, padding).
    """
    length = -(-numel // n)  # rounded up
    start, stop = min(rank * length, numel), min((rank + 1) * length, numel)
    return start, stop, length - (stop - start)


def zero_memory(
    parameters: int,
    n: int,
    stage: int,
    parameter_bytes: int = 4,
    gradient_bytes: int = 4,
    state_bytes: int = 8,
) -> float:
    """Bytes that each of n ranks holds all the time: parameters, gradients and optimizer's state.

    stage: 0 nothing is sharded, 1 the optimizer's state is, 2 the gradients too, 3 the parameters
    too. parameter_bytes, gradient_bytes, state_bytes: bytes of each kind for one parameter (by
    default float32 and AdamW).
    """
    held = parameter_bytes / (n if stage >= 3 else 1)
    held += gradient_bytes / (n if stage >= 2 else 1)
    held += state_bytes / (n if stage >= 1 else 1)
    return held * parameters


def zero1_step(
    parameters: torch.Tensor,
    gradients: torch.Tensor,
    momentum: torch.Tensor,
    lr: float,
    beta: float,
) -> None:
    """One step of SGD with momentum, whose momentum is sharded over the n ranks (ZeRO-1).

    parameters: (k,), the same on every rank; n divides k. In place: afterwards the updated ones, on
    every rank.
    gradients: (k,), this rank's own, not changed; the mean over the ranks counts.
    momentum: (k/n,), this rank's shard, which belongs to the rank-th n-th of parameters. In place.
    For each element: momentum becomes beta * momentum + gradient, then parameter becomes
    parameter - lr * momentum.
    Sends: one reduce_scatter and one all_gather (or send, recv): 2(n - 1)/n times the bytes of
    parameters in all.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    mean = torch.empty_like(momentum)
    dist.reduce_scatter(mean, list(gradients.chunk(n)))
    mean /= n
    momentum.mul_(beta).add_(mean)
    shards = list(parameters.chunk(n))  # views: what is written into them is written into parameters
    shards[rank] -= lr * momentum
    dist.all_gather(shards, shards[rank].clone())


def sharded_linear(x: torch.Tensor, shard: torch.Tensor, out_features: int) -> torch.Tensor:
    """x @ weight.T, where each of n ranks holds an n-th of the weight: gathered, not kept (ZeRO-3).

    x: (b, in_features), this rank's rows. Returns (b, out_features).
    shard: (out_features * in_features / n,), the rank-th n-th of the flattened weight
    (out_features, in_features); n divides it.
    Backward: x.grad as of a plain linear layer; shard.grad is this rank's part of the *mean* over
    the ranks of the weight's gradient. The whole weight, or anything of its size, must not be kept
    between forward and backward.
    Sends: forward one all_gather; backward one all_gather and one reduce_scatter (or send, recv).
    """
    n = dist.get_world_size()

    def gather(shard):
        shards = [torch.empty_like(shard) for _ in range(n)]
        dist.all_gather(shards, shard)
        return torch.cat(shards).view(out_features, -1)

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)  # the shard, not the weight
            return x @ gather(shard).T

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            mean = torch.empty_like(shard)
            dist.reduce_scatter(mean, list((gradient.T @ x).flatten().chunk(n)))
            return gradient @ gather(shard), mean / n

    return Linear.apply(x, shard)


def clip_sharded(gradients: list, max_norm: float) -> torch.Tensor:
    """Clip a gradient that is spread over the ranks to a global norm, as clip_grad_norm_ would.

    gradients: this rank's tensors, any number of any shape, on some ranks perhaps none; each
    element is on one rank. In place: where the norm of all elements on all ranks is above max_norm,
    every element is multiplied by max_norm / norm; else nothing changes. Returns the norm before
    clipping, the same on every rank.
    Sends: one number, in an all_reduce, as float64.
    """
    total = torch.zeros((), dtype=torch.float64)
    for g in gradients:
        total += g.double().square().sum()
    dist.all_reduce(total)
    norm = total.sqrt()
    if norm > max_norm:
        for g in gradients:
            g *= (max_norm / norm).to(g.dtype)
    return norm
