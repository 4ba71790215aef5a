"""Wrong answers to the exercises of lesson 15, as people really write them; and right ones other than the reference."""

import math

import numpy as np
import torch
import torch.distributed as dist
from planted import mistake, right

from pardist_lib.mechanisms import private

# ---- average_clients ------------------------------------------------------------------------------------------


def summed(value, group=None):
    value = torch.tensor([float(value)], dtype=torch.float64)
    dist.all_reduce(value, group=group)
    return value.item()


@mistake("average_clients", "a mean of means: it averages the ranks' means")
def mean_of_means(updates, rows, group=None):
    mean = sum(rows[c] * u for c, u in updates.items()) / sum(rows.values())
    dist.all_reduce(mean, group=group)
    return mean / dist.get_world_size(group)


@mistake("average_clients", "a mean of means, twice")
def plain_mean_of_plain_means(updates, rows, group=None):
    mean = torch.stack(list(updates.values())).mean(0)
    dist.all_reduce(mean, group=group)
    return mean / dist.get_world_size(group)


@mistake("average_clients", "every client counts the same")
def all_clients_alike(updates, rows, group=None):
    total, many = sum(updates.values()), summed(len(updates), group)
    dist.all_reduce(total, group=group)
    return total / many


@mistake("average_clients", "multiplied by the rows and never divided")
def never_divides(updates, rows, group=None):
    total = sum(rows[c] * u for c, u in updates.items())
    dist.all_reduce(total, group=group)
    return total


@mistake("average_clients", "divided by this rank's rows only")
def divides_by_its_own_rows(updates, rows, group=None):
    total = sum(rows[c] * u for c, u in updates.items())
    dist.all_reduce(total, group=group)
    return total / sum(rows.values())


@mistake("average_clients", "divided by the 4 ranks, not by all")
def divides_by_ranks(updates, rows, group=None):
    total = sum(rows[c] * u for c, u in updates.items())
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


@mistake("average_clients", "within a rank every client counts the same")
def weights_ranks_only(updates, rows, group=None):
    mine = sum(rows.values())
    total = mine * torch.stack(list(updates.values())).mean(0)
    dist.all_reduce(total, group=group)
    return total / summed(mine, group)


@mistake("average_clients", "nothing was exchanged")
def stays_alone(updates, rows, group=None):
    return sum(rows[c] * u for c, u in updates.items()) / sum(rows.values())


@mistake("average_clients", "the group argument is ignored: this is the mean over all ranks' clients")
def forgets_the_group(updates, rows, group=None):
    total, many = sum(rows[c] * u for c, u in updates.items()), summed(sum(rows.values()))
    dist.all_reduce(total)
    return total / many


@mistake("average_clients", "the group argument is ignored where the rows are added up")
def forgets_the_group_once(updates, rows, group=None):
    total, many = sum(rows[c] * u for c, u in updates.items()), summed(sum(rows.values()))
    dist.all_reduce(total, group=group)
    return total / many


@mistake("average_clients", "the ranks do not make the same calls")
def one_call_for_each_client(updates, rows, group=None):
    total = 0
    for c, u in updates.items():
        part = rows[c] * u
        dist.all_reduce(part, group=group)
        total = total + part
    return total / summed(sum(rows.values()), group)


@mistake("average_clients", "updates or rows have changed")
def writes_into_the_updates(updates, rows, group=None):
    for c, u in updates.items():
        u *= rows[c]
    total, many = sum(updates.values()), summed(sum(rows.values()), group)
    dist.all_reduce(total, group=group)
    return total / many


@mistake("average_clients", "it calls all_gather")
def gathers(updates, rows, group=None):
    mean = sum(rows[c] * u for c, u in updates.items())
    everyone = [torch.empty_like(mean) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mean, group=group)
    return sum(everyone) / summed(sum(rows.values()), group)


@mistake("average_clients", "paired by their order")
def pairs_by_order(updates, rows, group=None):
    total = sum(r * u for r, u in zip(rows.values(), updates.values(), strict=True))
    dist.all_reduce(total, group=group)
    return total / summed(sum(rows.values()), group)


@right("average_clients")
def one_message(updates, rows, group=None):
    total = sum(rows[c] * u for c, u in updates.items())
    line = torch.cat([total, total.new_tensor([float(sum(rows.values()))])])
    dist.all_reduce(line, group=group)
    return line[:-1] / line[-1]


@right("average_clients")
def shares_of_all_rows(updates, rows, group=None):
    many = summed(sum(rows.values()), group)
    mean = torch.stack([u * (rows[c] / many) for c, u in updates.items()]).sum(0)
    dist.all_reduce(mean, group=group)
    return mean


# ---- fixed_point ----------------------------------------------------------------------------------------------


def checked(values, clients, fraction_bits, limit=None):
    limit = (2**31 - 1) // clients if limit is None else limit
    if not ((values * 2**fraction_bits).round().abs() <= limit).all():
        raise ValueError("too large")


@mistake("fixed_point", "cut off, not rounded")
def cuts_off(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * 2**fraction_bits).long() % 2**32


@mistake("fixed_point", "rounded down, not to the nearest")
def rounds_down(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * 2**fraction_bits).floor().long() % 2**32


@mistake("fixed_point", "the numbers are right modulo 2**32, but some are negative")
def leaves_the_sign(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * 2**fraction_bits).round().long()


@mistake("fixed_point", "modulo 2**31")
def half_a_field(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * 2**fraction_bits).round().long() % 2**31


@mistake("fixed_point", "multiplied by fraction_bits, not by 2**fraction_bits")
def scales_by_the_bits(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * fraction_bits).round().long() % 2**32


@mistake("fixed_point", "it is not refused: nothing is checked")
def checks_nothing(values, clients, fraction_bits):
    return (values * 2**fraction_bits).round().long() % 2**32


@mistake("fixed_point", "a value that 8 clients cannot all bring is not refused")
def forgets_the_others(values, clients, fraction_bits):
    checked(values, clients, fraction_bits, 2**31 - 1)
    return (values * 2**fraction_bits).round().long() % 2**32


@mistake("fixed_point", "a negative value that 4 clients cannot all bring is not refused")
def checks_one_side(values, clients, fraction_bits):
    if values.numel() and not (values * 2**fraction_bits).round().max() <= (2**31 - 1) // clients:
        raise ValueError("too large")
    return (values * 2**fraction_bits).round().long() % 2**32


@mistake("fixed_point", "NaN is not refused")
def lets_nan_through(values, clients, fraction_bits):
    whole = (values * 2**fraction_bits).round()
    if (whole.abs() > (2**31 - 1) // clients).any():
        raise ValueError("too large")
    return whole.long() % 2**32


@mistake("fixed_point", "cut off silently")
def clamps(values, clients, fraction_bits):
    limit = (2**31 - 1) // clients
    return (values * 2**fraction_bits).round().clamp(-limit, limit).nan_to_num().long() % 2**32


@mistake("fixed_point", "it raises on numbers that are right")
def checks_values_not_whole_numbers(values, clients, fraction_bits):
    if values.numel() and not values.abs().max() < (2**31 - 1) // clients / 2**fraction_bits:
        raise ValueError("too large")
    return (values * 2**fraction_bits).round().long() % 2**32


@mistake("fixed_point", "the range is checked before rounding")
def checks_too_early(values, clients, fraction_bits):
    scaled = values * 2**fraction_bits
    if not (scaled.abs() <= (2**31 - 1) // clients).all():
        raise ValueError("too large")
    return scaled.round().long() % 2**32


@mistake("fixed_point", "negative numbers are one too small")
def one_too_small(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    whole = (values * 2**fraction_bits).round().long()
    return torch.where(whole < 0, whole + 2**32 - 1, whole)


@mistake("fixed_point", "whole numbers are asked for, int64")
def stays_float(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * 2**fraction_bits).round() % 2**32


@mistake("fixed_point", "shifted by 2**31")
def shifts(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * 2**fraction_bits).round().long() + 2**31


@mistake("fixed_point", "it calls the course's own `encode`")
def takes_the_courses(values, clients, fraction_bits):
    return private.encode(values, clients, fraction_bits).long() % 2**32


@right("fixed_point")
def with_a_mask(values, clients, fraction_bits):
    whole = torch.round(values * (1 << fraction_bits))
    if whole.isnan().any() or (whole.abs() * clients > 2**31 - 1).any():
        raise ValueError("beyond the field")
    return whole.long() & 0xFFFFFFFF


@right("fixed_point")
def by_numpy(values, clients, fraction_bits):
    whole = np.rint(values.numpy() * 2.0**fraction_bits)
    if not np.all(np.abs(whole) <= (2**31 - 1) // clients):
        raise ValueError("beyond the field")
    return torch.from_numpy(np.mod(whole.astype(np.int64), 2**32))


# ---- mask_vector ----------------------------------------------------------------------------------------------


def with_sign(sign, own=1):
    def answer(vector, me, own_mask, pairs):
        total = vector + own * own_mask
        for other, mask in pairs.items():
            total = total + sign(other, me) * mask
        return total % 2**32

    return answer


@mistake("mask_vector", "the signs are the wrong way round")
def wrong_way_round(vector, me, own, pairs):
    return with_sign(lambda o, me: -1 if o > me else 1)(vector, me, own, pairs)


@mistake("mask_vector", "every pair mask is added")
def adds_all(vector, me, own, pairs):
    return (vector + own + sum(pairs.values())) % 2**32


@mistake("mask_vector", "every pair mask is subtracted")
def subtracts_all(vector, me, own, pairs):
    return (vector + own - sum(pairs.values())) % 2**32


@mistake("mask_vector", "the own mask is missing")
def no_own_mask(vector, me, own, pairs):
    return with_sign(lambda o, me: 1 if o > me else -1, 0)(vector, me, own, pairs)


@mistake("mask_vector", "the own mask is subtracted")
def own_mask_off(vector, me, own, pairs):
    return with_sign(lambda o, me: 1 if o > me else -1, -1)(vector, me, own, pairs)


@mistake("mask_vector", "only the masks with higher numbers are on it")
def half_of_the_pairs(vector, me, own, pairs):
    return with_sign(lambda o, me: 1 if o > me else 0)(vector, me, own, pairs)


@mistake("mask_vector", "right modulo 2**32, but some are")
def never_wraps(vector, me, own, pairs):
    total = vector + own
    for other, mask in pairs.items():
        total = total + (mask if other > me else -mask)
    return total


@mistake("mask_vector", "wrapped at 2**31")
def wraps_too_early(vector, me, own, pairs):
    total = vector + own
    for other, mask in pairs.items():
        total = total + (mask if other > me else -mask)
    return total % 2**31


@mistake("mask_vector", "modulo 2**32 - 1")
def wraps_one_short(vector, me, own, pairs):
    total = vector + own
    for other, mask in pairs.items():
        total = total + (mask if other > me else -mask)
    return total % 0xFFFFFFFF


@mistake("mask_vector", "what it was given has changed")
def writes_into_the_vector(vector, me, own, pairs):
    vector += own
    for other, mask in pairs.items():
        vector += mask if other > me else -mask
    return vector % 2**32


@mistake("mask_vector", "whole numbers are asked for")
def goes_through_floats(vector, me, own, pairs):
    return with_sign(lambda o, me: 1.0 if o > me else -1.0)(vector.double(), me, own, pairs)


@mistake("mask_vector", "whole numbers of 32 bits went through float32")
def goes_through_float32_and_back(vector, me, own, pairs):
    return with_sign(lambda o, me: 1 if o > me else -1)(vector, me, own, pairs).float().long()


@right("mask_vector")
def wraps_after_each(vector, me, own, pairs):
    total = (vector + own) % 2**32
    for other in sorted(pairs):
        total = (total + pairs[other] * (1 if me < other else -1)) & (2**32 - 1)
    return total


# ---- unmask_sum -----------------------------------------------------------------------------------------------


@mistake("unmask_sum", "the pair masks of those who fell silent are still in it")
def forgets_the_silent(messages, own, pairs):
    return (sum(messages.values()) - sum(own.values())) % 2**32


@mistake("unmask_sum", "taken off with the wrong sign")
def doubles_them(messages, own, pairs):
    total = sum(messages.values()) - sum(own.values())
    for gone, masks in pairs.items():
        for client, mask in masks.items():
            total = total + mask if gone > client else total - mask
    return total % 2**32


@mistake("unmask_sum", "all pair masks are subtracted")
def subtracts_all_pairs(messages, own, pairs):
    total = sum(messages.values()) - sum(own.values())
    for masks in pairs.values():
        total = total - sum(masks.values())
    return total % 2**32


@mistake("unmask_sum", "all pair masks are added")
def adds_all_pairs(messages, own, pairs):
    total = sum(messages.values()) - sum(own.values())
    for masks in pairs.values():
        total = total + sum(masks.values())
    return total % 2**32


@mistake("unmask_sum", "the own masks are still in it")
def leaves_own_masks(messages, own, pairs):
    total = sum(messages.values())
    for gone, masks in pairs.items():
        for client, mask in masks.items():
            total = total - mask if gone > client else total + mask
    return total % 2**32


@mistake("unmask_sum", "neither own masks nor pair masks were taken off")
def only_adds(messages, own, pairs):
    return sum(messages.values()) % 2**32


@mistake("unmask_sum", "the masks of one client that fell silent are taken off")
def undoes_one(messages, own, pairs):
    total = sum(messages.values()) - sum(own.values())
    for gone, masks in list(pairs.items())[:1]:
        for client, mask in masks.items():
            total = total - mask if gone > client else total + mask
    return total % 2**32


@mistake("unmask_sum", "right modulo 2**32, but some are")
def never_wraps_the_sum(messages, own, pairs):
    total = sum(messages.values()) - sum(own.values())
    for gone, masks in pairs.items():
        for client, mask in masks.items():
            total = total - mask if gone > client else total + mask
    return total


@mistake("unmask_sum", "what it was given has changed")
def writes_into_a_message(messages, own, pairs):
    total = next(iter(messages.values()))
    for message in list(messages.values())[1:]:
        total += message
    total -= sum(own.values())
    for gone, masks in pairs.items():
        for client, mask in masks.items():
            total += -mask if gone > client else mask
    return total % 2**32


@right("unmask_sum")
def client_by_client(messages, own, pairs):
    total = 0
    for client, message in messages.items():
        bare = message - own[client]
        for gone in pairs:
            bare = bare + (1 if gone < client else -1) * pairs[gone][client]
        total = (total + bare) % 2**32
    return total


# ---- clip_and_add ---------------------------------------------------------------------------------------------


@mistake("clip_and_add", "the sum was clipped, not the single rows")
def clips_the_sum(gradients, clip):
    total = gradients.sum(0)
    return total * min(1.0, clip / max(total.norm().item(), 1e-30))


@mistake("clip_and_add", "the mean was clipped, not the single rows")
def clips_the_mean(gradients, clip):
    mean = gradients.sum(0) / max(len(gradients), 1)
    return mean * min(1.0, clip / max(mean.norm().item(), 1e-30))


@mistake("clip_and_add", "every row was made as long as clip")
def normalises(gradients, clip):
    return (gradients / gradients.norm(dim=1, keepdim=True).clamp(min=1e-30) * clip).sum(0)


@mistake("clip_and_add", "each number was cut off at ±clip")
def clips_each_number(gradients, clip):
    return gradients.clamp(-clip, clip).sum(0)


@mistake("clip_and_add", "one factor for all rows")
def one_factor(gradients, clip):
    if not len(gradients):
        return gradients.sum(0)
    return (gradients * min(1.0, clip / max(gradients.norm(dim=1).max().item(), 1e-30))).sum(0)


@mistake("clip_and_add", "the mean of the clipped rows")
def takes_the_mean(gradients, clip):
    norms = gradients.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return (gradients * (clip / norms).clamp(max=1)).mean(0)


@mistake("clip_and_add", "the length is the sum of absolute values")
def another_length(gradients, clip):
    norms = gradients.abs().sum(1, keepdim=True).clamp(min=1e-30)
    return (gradients * (clip / norms).clamp(max=1)).sum(0)


@mistake("clip_and_add", "divided by the squared length")
def no_root(gradients, clip):
    norms = gradients.square().sum(1, keepdim=True).clamp(min=1e-30)
    return (gradients * (clip / norms).clamp(max=1)).sum(0)


@mistake("clip_and_add", "1e-6 was added to the length")
def adds_a_little(gradients, clip):
    norms = gradients.norm(dim=1, keepdim=True) + 1e-6
    return (gradients * (clip / norms).clamp(max=1)).sum(0)


@mistake("clip_and_add", "a short row's length was taken to be 1e-3")
def has_a_floor(gradients, clip):
    norms = gradients.norm(dim=1, keepdim=True).clamp(min=1e-3)
    return (gradients * (clip / norms).clamp(max=1)).sum(0)


@mistake("clip_and_add", "rows longer than clip are left out")
def throws_away(gradients, clip):
    return gradients[gradients.norm(dim=1) <= clip].sum(0)


@mistake("clip_and_add", "a row that is zero makes the sum not a number")
def nan_for_zero(gradients, clip):
    norms = gradients.norm(dim=1, keepdim=True)
    return (gradients * torch.where(norms > clip, clip / norms, norms / norms)).sum(0)


@mistake("clip_and_add", "what it was given has changed")
def clips_in_place(gradients, clip):
    norms = gradients.norm(dim=1, keepdim=True).clamp(min=1e-30)
    gradients *= (clip / norms).clamp(max=1)
    return gradients.sum(0)


@right("clip_and_add")
def row_by_row(gradients, clip):
    total = torch.zeros_like(gradients[0]) if len(gradients) else gradients.new_zeros(gradients.shape[1])
    for g in gradients:
        norm = g.norm().item()
        total = total + (g * (clip / norm) if norm > clip else g)
    return total


@right("clip_and_add")
def by_matmul(gradients, clip):
    scale = 1 / (gradients.norm(dim=1) / clip).clamp(min=1)
    return scale @ gradients


# ---- noisy_sum ------------------------------------------------------------------------------------------------


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


# ---- rate_and_steps -------------------------------------------------------------------------------------------


def enough(epochs, rate):
    return math.ceil(round(epochs / rate, 9))


@mistake("rate_and_steps", "divided by one rank's rows")
def rate_on_one_rank(rows, batch, epochs):
    return batch / rows[0], enough(epochs, batch / rows[0])


@mistake("rate_and_steps", "the batch was divided by the ranks")
def shares_the_batch(rows, batch, epochs):
    rate = batch / len(rows) / sum(rows)
    return rate, enough(epochs, rate)


@mistake("rate_and_steps", "divided by the mean of the ranks' rows")
def mean_rows(rows, batch, epochs):
    rate = batch * len(rows) / sum(rows)
    return min(rate, 1), enough(epochs, rate)


@mistake("rate_and_steps", "upside down")
def steps_in_an_epoch(rows, batch, epochs):
    return sum(rows) / batch, enough(epochs, batch / sum(rows))


@mistake("rate_and_steps", "1 over all rows")
def one_row_a_step(rows, batch, epochs):
    return 1 / sum(rows), enough(epochs, batch / sum(rows))


@mistake("rate_and_steps", "rounded down")
def rounds_the_steps_down(rows, batch, epochs):
    return batch / sum(rows), int(epochs * sum(rows) / batch)


@mistake("rate_and_steps", "rounded to the nearest")
def rounds_the_steps(rows, batch, epochs):
    return batch / sum(rows), round(epochs * sum(rows) / batch)


@mistake("rate_and_steps", "rows that the ranks do not divide evenly are lost")
def loses_the_rest(rows, batch, epochs):
    rate = batch / (sum(rows) // len(rows) * len(rows))
    return rate, enough(epochs, rate)


@mistake("rate_and_steps", "the epochs are missing")
def one_epochs_steps(rows, batch, epochs):
    return batch / sum(rows), math.ceil(sum(rows) / batch)


@mistake("rate_and_steps", "these are the epochs")
def counts_epochs(rows, batch, epochs):
    return batch / sum(rows), epochs


@mistake("rate_and_steps", "rounded up for each epoch")
def whole_epochs(rows, batch, epochs):
    return batch / sum(rows), epochs * math.ceil(sum(rows) / batch)


@mistake("rate_and_steps", "rate and steps are swapped")
def the_other_way_round(rows, batch, epochs):
    rate = batch / sum(rows)
    return enough(epochs, rate), rate


@mistake("rate_and_steps", "the pair (rate, steps) is asked for")
def only_the_rate(rows, batch, epochs):
    return batch / sum(rows)


@right("rate_and_steps")
def in_fractions(rows, batch, epochs):
    total = sum(rows)
    steps = -int(-epochs * total // batch)
    return batch / total, steps
