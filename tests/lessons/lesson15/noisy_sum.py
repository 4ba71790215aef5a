"""Answers to noisy_sum: wrong ones as people write them, and unusual right ones."""

import math

import torch
import torch.distributed as dist

from tests.lessons.planted import mistake, right


def noised(total, scale, generator, group):
    result = total + scale * torch.randn(total.shape, generator=generator, dtype=total.dtype)
    dist.all_reduce(result, group=group)
    return result


@mistake("noisy_sum", "the noise is added at full scale on every rank")
def full_scale_everywhere(total, clip, sigma, generator, group=None):
    return noised(total, sigma * clip, generator, group)


@mistake("noisy_sum", "divided by the number of ranks, not by its root")
def divides_by_ranks_not_the_root(total, clip, sigma, generator, group=None):
    return noised(total, sigma * clip / dist.get_world_size(group), generator, group)


@mistake("noisy_sum", "clip is missing: sigma is in units of clip")
def forgets_clip(total, clip, sigma, generator, group=None):
    return noised(total, sigma / math.sqrt(dist.get_world_size(group)), generator, group)


@mistake("noisy_sum", "was taken for the variance")
def takes_it_for_the_variance(total, clip, sigma, generator, group=None):
    return noised(total, math.sqrt(sigma * clip / dist.get_world_size(group)), generator, group)


@mistake("noisy_sum", "the ranks end with different sums")
def after_the_sum(total, clip, sigma, generator, group=None):
    result = total.clone()
    dist.all_reduce(result, group=group)
    return result + sigma * clip * torch.randn(total.shape, generator=generator, dtype=total.dtype)


@mistake("noisy_sum", "rank 1 adds no noise: its message goes out as it is")
def rank_0_alone(total, clip, sigma, generator, group=None):
    result = total.clone()
    if dist.get_rank(group) == 0:
        result += sigma * clip * torch.randn(total.shape, generator=generator, dtype=total.dtype)
    dist.all_reduce(result, group=group)
    return result


@mistake("noisy_sum", "noise is drawn without the generator that was given")
def forgets_the_generator(total, clip, sigma, generator, group=None):
    result = total + sigma * clip / math.sqrt(dist.get_world_size(group)) * torch.randn_like(total)
    dist.all_reduce(result, group=group)
    return result


@mistake("noisy_sum", "there is no noise")
def no_noise(total, clip, sigma, generator, group=None):
    result = total.clone()
    dist.all_reduce(result, group=group)
    return result


@mistake("noisy_sum", "the noise is not Gaussian")
def uniform_noise(total, clip, sigma, generator, group=None):
    share = sigma * clip * math.sqrt(12) / math.sqrt(dist.get_world_size(group))
    result = total + share * (torch.rand(total.shape, generator=generator, dtype=total.dtype) - 0.5)
    dist.all_reduce(result, group=group)
    return result


@mistake("noisy_sum", "the group argument is ignored in the share")
def forgets_the_group_in_the_share(total, clip, sigma, generator, group=None):
    return noised(total, sigma * clip / math.sqrt(dist.get_world_size()), generator, group)


@mistake("noisy_sum", "the group argument is ignored: this is the sum over all ranks")
def forgets_the_group_in_the_sum(total, clip, sigma, generator, group=None):
    return noised(total, sigma * clip / math.sqrt(dist.get_world_size(group)), generator, None)


@mistake("noisy_sum", "`total` has changed")
def adds_in_place(total, clip, sigma, generator, group=None):
    share = sigma * clip / math.sqrt(dist.get_world_size(group))
    total += share * torch.randn(total.shape, generator=generator, dtype=total.dtype)
    dist.all_reduce(total, group=group)
    return total


@mistake("noisy_sum", "nothing is sent")
def sums_nothing(total, clip, sigma, generator, group=None):
    return total + sigma * clip * torch.randn(total.shape, generator=generator, dtype=total.dtype)


@mistake("noisy_sum", "the sum itself is 0.25 times what it should be")
def takes_the_mean_of_the_ranks(total, clip, sigma, generator, group=None):
    n = dist.get_world_size(group)
    return noised(total, sigma * clip * math.sqrt(n), generator, group) / n


@mistake("noisy_sum", "the ranks' shares of the noise are not equally large")
def mostly_on_rank_0(total, clip, sigma, generator, group=None):
    n, first = dist.get_world_size(group), dist.get_rank(group) == 0
    share = math.sqrt(1 if n == 1 else 0.9 if first else 0.1 / (n - 1))
    return noised(total, sigma * clip * share, generator, group)


def share_of(total, clip, sigma, generator, group):
    noise = torch.randn(total.shape, generator=generator, dtype=total.dtype)
    return sigma * clip / math.sqrt(dist.get_world_size(group)) * noise


def summed_up(message, group):
    dist.all_reduce(message, group=group)
    return message


@mistake("noisy_sum", "of the 20,000 numbers go out without noise")
def one_number_bare(total, clip, sigma, generator, group=None):
    share = share_of(total, clip, sigma, generator, group)
    share[-1] = 0
    return summed_up(total + share, group)


@mistake("noisy_sum", "the same noise is on several numbers")
def half_as_much_noise(total, clip, sigma, generator, group=None):
    half = share_of(total[: (len(total) + 1) // 2], clip, sigma, generator, group)
    return summed_up(total + torch.cat([half, half])[: len(total)], group)


@mistake("noisy_sum", "the same noise is on several numbers")
def one_number_for_all(total, clip, sigma, generator, group=None):
    return summed_up(total + share_of(total[:1], clip, sigma, generator, group), group)


@mistake("noisy_sum", "the same noise is on several numbers")
def coarse_noise(total, clip, sigma, generator, group=None):
    step = sigma * clip / math.sqrt(dist.get_world_size(group)) / 1.041
    noise = torch.randn(total.shape, generator=generator, dtype=total.dtype).round() + 0.001
    return summed_up(total + step * noise, group)


@mistake("noisy_sum", "the noise adds up to zero over the numbers")
def centres_it(total, clip, sigma, generator, group=None):
    share = share_of(total, clip, sigma, generator, group)
    return summed_up(total + share - share.mean(), group)


@mistake("noisy_sum", "there is no noise where the total is zero")
def only_on_what_is_there(total, clip, sigma, generator, group=None):
    share = share_of(total, clip, sigma, generator, group)
    return summed_up(torch.where(total == 0, total, total + share), group)


@mistake("noisy_sum", "there is no noise where the total is zero")
def as_long_as_the_total(total, clip, sigma, generator, group=None):
    return summed_up(total + share_of(total, min(clip, total.norm().item()), sigma, generator, group), group)


@mistake("noisy_sum", "the generator that was given has not moved on")
def puts_the_dice_back(total, clip, sigma, generator, group=None):
    return summed_up(total + share_of(total, clip, sigma, generator.clone_state(), group), group)


@right("noisy_sum")
def by_the_variance(total, clip, sigma, generator, group=None):
    variance = (sigma * clip) ** 2 / dist.get_world_size(group)
    share = torch.empty_like(total).normal_(0, variance**0.5, generator=generator)
    message = total + share
    dist.all_reduce(message, group=group)
    return message
