"""Wrong answers to clip_sharded, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist

from tests.lessons.planted import mistake, right


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
