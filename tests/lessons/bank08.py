"""Wrong answers to the exercises of lesson 08, as people really write them; and right ones other than the reference."""

import math

import torch
import torch.distributed as dist
from planted import mistake, right

from pardist_lib.mechanisms import uneven

# ---- next_scale -----------------------------------------------------------------------------------------------


@mistake("next_scale", "the scale never falls")
def never_backs_off(scale, good_steps, overflow, interval):
    if overflow:
        return scale, 0
    return (scale * 2, 0) if good_steps + 1 == interval else (scale, good_steps + 1)


@mistake("next_scale", "it grows one good step too late")
def grows_too_late(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    return (scale * 2, 0) if good_steps == interval else (scale, good_steps + 1)


@mistake("next_scale", "it grows one good step too early")
def grows_too_early(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    good_steps += 1
    return (scale * 2, 0) if good_steps == interval - 1 else (scale, good_steps)


@mistake("next_scale", "an overflow does not start the count anew")
def counts_on_after_an_overflow(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, good_steps
    return (scale * 2, 0) if good_steps + 1 == interval else (scale, good_steps + 1)


@mistake("next_scale", "an overflow counts as a good step")
def counts_overflows(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, good_steps + 1
    return (scale * 2, 0) if good_steps + 1 == interval else (scale, good_steps + 1)


@mistake("next_scale", "the count goes on after the scale has doubled")
def does_not_restart(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    good_steps += 1
    return (scale * 2 if good_steps == interval else scale), good_steps


@mistake("next_scale", "once there have been `interval` good steps the scale doubles in every step")
def grows_for_ever(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    good_steps += 1
    return (scale * 2 if good_steps >= interval else scale), good_steps


@mistake("next_scale", "the scale never grows")
def never_grows(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    return (scale, 0) if good_steps + 1 == interval else (scale, good_steps + 1)


@mistake("next_scale", "it grows after an overflow")
def the_wrong_way_round(scale, good_steps, overflow, interval):
    return (scale * 2, 0) if overflow or good_steps + 1 == interval else (scale, good_steps + 1)


@mistake("next_scale", "the pair (scale, good_steps) is asked for")
def returns_the_scale_only(scale, good_steps, overflow, interval):
    return scale / 2 if overflow else scale


@mistake("next_scale", "doubles the scale before it is halved")
def grows_before_it_falls(scale, good_steps, overflow, interval):
    good_steps += 1
    if good_steps == interval:
        scale, good_steps = scale * 2, 0
    return (scale / 2, 0) if overflow else (scale, good_steps)


@mistake("next_scale", "`interval` is ignored")
def always_two_thousand(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    return (scale * 2, 0) if good_steps + 1 == 2000 else (scale, good_steps + 1)


@mistake("next_scale", "the scale is held at")
def bounds_the_scale(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    return (min(scale * 2, 2.0**32), 0) if good_steps + 1 == interval else (scale, good_steps + 1)


@right("next_scale")
def by_remainder(scale, good_steps, overflow, interval):
    good_steps = 0 if overflow else (good_steps + 1) % interval
    return (scale * 0.5 if overflow else scale * 2.0 if not good_steps else scale), good_steps


# ---- step_or_skip ---------------------------------------------------------------------------------------------


def agreed(gradients, group=None, op=dist.ReduceOp.MAX, bad=None):
    bad = torch.tensor(float(not gradients.isfinite().all()) if bad is None else float(bad))
    dist.all_reduce(bad, op, group=group)
    return bool(bad)


@mistake("step_or_skip", "the overflow is not agreed")
def asks_nobody(parameters, gradients, scale, lr, group=None):
    if not gradients.isfinite().all():
        return False
    parameters -= lr * (gradients / scale)
    return True


@mistake("step_or_skip", "nothing is ever skipped")
def steps_anyway(parameters, gradients, scale, lr, group=None):
    bad = agreed(gradients, group)
    parameters -= lr * (gradients / scale)
    return not bad


@mistake("step_or_skip", "the maximum over the ranks is asked for, not the minimum")
def all_have_to_overflow(parameters, gradients, scale, lr, group=None):
    if agreed(gradients, group, dist.ReduceOp.MIN):
        return False
    parameters -= lr * (gradients / scale)
    return True


@mistake("step_or_skip", "not every rank makes the same calls")
def only_the_unlucky_call(parameters, gradients, scale, lr, group=None):
    if not gradients.isfinite().all():
        dist.all_reduce(torch.ones(1), group=group)
        return False
    parameters -= lr * (gradients / scale)
    return True


@mistake("step_or_skip", "NaN is not noticed")
def looks_for_infinities(parameters, gradients, scale, lr, group=None):
    if agreed(gradients, group, bad=gradients.isinf().any()):
        return False
    parameters -= lr * (gradients / scale)
    return True


@mistake("step_or_skip", "an infinity is not noticed")
def looks_for_nan(parameters, gradients, scale, lr, group=None):
    if agreed(gradients, group, bad=gradients.isnan().any()):
        return False
    parameters -= lr * (gradients / scale)
    return True


@mistake("step_or_skip", "minus infinity is not noticed")
def looks_for_plus_infinity(parameters, gradients, scale, lr, group=None):
    if agreed(gradients, group, bad=(gradients == math.inf).any() or gradients.isnan().any()):
        return False
    parameters -= lr * (gradients / scale)
    return True


@mistake("step_or_skip", "the gradients are not unscaled")
def forgets_to_unscale(parameters, gradients, scale, lr, group=None):
    if agreed(gradients, group):
        return False
    parameters -= lr * gradients
    return True


@mistake("step_or_skip", "unscaled twice")
def unscales_twice(parameters, gradients, scale, lr, group=None):
    unscaled = gradients / scale
    if agreed(unscaled, group):
        return False
    parameters -= lr * (unscaled / scale)
    return True


@mistake("step_or_skip", "the bad numbers are left out")
def mends_the_gradients(parameters, gradients, scale, lr, group=None):
    bad = agreed(gradients, group)
    parameters -= lr * (gradients.nan_to_num(0, 0, 0) / scale)
    return not bad


@mistake("step_or_skip", "the group argument is ignored")
def asks_the_whole_world(parameters, gradients, scale, lr, group=None):
    if agreed(gradients):
        return False
    parameters -= lr * (gradients / scale)
    return True


@mistake("step_or_skip", "`gradients` has changed")
def unscales_in_place(parameters, gradients, scale, lr, group=None):
    if agreed(gradients, group):
        return False
    gradients /= scale
    parameters -= lr * gradients
    return True


@mistake("step_or_skip", "this rank's own verdict")
def returns_its_own(parameters, gradients, scale, lr, group=None):
    if not agreed(gradients, group):
        parameters -= lr * (gradients / scale)
    return bool(gradients.isfinite().all())


@mistake("step_or_skip", "parameters is as it was")
def makes_a_new_tensor(parameters, gradients, scale, lr, group=None):
    if agreed(gradients, group):
        return False
    parameters = parameters - lr * (gradients / scale)
    return True


@mistake("step_or_skip", "large, but finite")
def looks_at_the_sum(parameters, gradients, scale, lr, group=None):
    total = gradients.sum()
    dist.all_reduce(total, group=group)
    if not total.isfinite():
        return False
    parameters -= lr * (gradients / scale)
    return True


@mistake("step_or_skip", "a maximum of numbers may drop it")
def reduces_the_largest(parameters, gradients, scale, lr, group=None):
    largest = gradients.abs().max() if len(gradients) else torch.zeros((), dtype=gradients.dtype)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    if not largest.isfinite():
        return False
    parameters -= lr * (gradients / scale)
    return True


@mistake("step_or_skip", "however many gradients it has")
def sends_a_verdict_each(parameters, gradients, scale, lr, group=None):
    bad = (~gradients.isfinite()).float()
    dist.all_reduce(bad, dist.ReduceOp.MAX, group=group)
    if bad.any():
        return False
    parameters -= lr * (gradients / scale)
    return True


@mistake("step_or_skip", "it calls all_gather")
def gathers_verdicts(parameters, gradients, scale, lr, group=None):
    mine = torch.tensor([float(gradients.isfinite().all())])
    everyone = [torch.empty(1) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    if min(everyone) == 0:
        return False
    parameters -= lr * (gradients / scale)
    return True


@right("step_or_skip")
def good_ranks_are_counted(parameters, gradients, scale, lr, group=None):
    unscaled = gradients / scale
    good = unscaled.isfinite().all().int()
    dist.all_reduce(good, group=group)
    made = good.item() == dist.get_world_size(group)
    if made:
        parameters.sub_(unscaled, alpha=lr)
    return made


@right("step_or_skip")
def the_smallest_good(parameters, gradients, scale, lr, group=None):
    good = torch.isfinite(gradients).all().to(torch.uint8)
    dist.all_reduce(good, op=dist.ReduceOp.MIN, group=group)
    if good:
        parameters.add_(gradients, alpha=-lr / scale)
    return bool(good)


# ---- unscale_and_clip -----------------------------------------------------------------------------------------


def length(gradients):
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))


def times(gradients, factor):
    for g in gradients:
        g *= factor


@mistake("unscale_and_clip", "clipped before unscaling")
def clips_first(gradients, scale, max_norm):
    norm = length(gradients)
    times(gradients, min(1.0, max_norm / max(norm, 1e-30)))
    times(gradients, 1 / scale)
    return norm / scale


@mistake("unscale_and_clip", "unscaled twice: divided")
def unscales_once_more(gradients, scale, max_norm):
    norm = length(gradients) / scale
    times(gradients, min(1.0, max_norm / max(norm, 1e-30)) / scale)
    times(gradients, 1 / scale)
    return norm


@mistake("unscale_and_clip", "unscaled twice, the norm being taken in between")
def unscales_before_and_in_between(gradients, scale, max_norm):
    times(gradients, 1 / scale)
    times(gradients, 1 / scale)
    norm = length(gradients)
    times(gradients, min(1.0, max_norm / max(norm, 1e-30)))
    return norm


@mistake("unscale_and_clip", "clipped, but not unscaled")
def only_clips(gradients, scale, max_norm):
    norm = length(gradients) / scale
    times(gradients, min(1.0, max_norm / max(norm, 1e-30)))
    return norm


@mistake("unscale_and_clip", "unscaled, but not clipped")
def only_unscales(gradients, scale, max_norm):
    times(gradients, 1 / scale)
    return length(gradients)


@mistake("unscale_and_clip", "each tensor is clipped by its own norm")
def clips_tensor_by_tensor(gradients, scale, max_norm):
    times(gradients, 1 / scale)
    norm = length(gradients)
    for g in gradients:
        g *= min(1.0, max_norm / max(g.norm().item(), 1e-30))
    return norm


@mistake("unscale_and_clip", "gradients shorter than max_norm are made longer")
def stretches(gradients, scale, max_norm):
    times(gradients, 1 / scale)
    norm = length(gradients)
    times(gradients, max_norm / max(norm, 1e-30))
    return norm


@mistake("unscale_and_clip", "the norm of the scaled gradients")
def returns_the_scaled_norm(gradients, scale, max_norm):
    norm = length(gradients)
    times(gradients, min(1.0, max_norm * scale / max(norm, 1e-30)) / scale)
    return norm


@mistake("unscale_and_clip", "it returns the norm after clipping")
def returns_the_new_norm(gradients, scale, max_norm):
    times(gradients, min(1.0, max_norm * scale / max(length(gradients), 1e-30)) / scale)
    return length(gradients)


@mistake("unscale_and_clip", "nothing has changed")
def changes_copies(gradients, scale, max_norm):
    unscaled = [g / scale for g in gradients]
    norm = length(unscaled)
    unscaled = [g * min(1.0, max_norm / max(norm, 1e-30)) for g in unscaled]
    return norm


@mistake("unscale_and_clip", "gradients that are all zero become NaN")
def divides_by_zero(gradients, scale, max_norm):
    total = torch.stack([(g / scale).square().sum().double() for g in gradients]).sum().sqrt()
    for g in gradients:
        g.mul_(max_norm / total if not total > max_norm and total == 0 else (max_norm / total).clamp(max=1)).div_(scale)
    return total.item()


@mistake("unscale_and_clip", "1e-6 was added to the norm")
def as_torch_clips(gradients, scale, max_norm):
    times(gradients, 1 / scale)
    norm = length(gradients)
    times(gradients, min(1.0, max_norm / (norm + 1e-6)))
    return norm


@mistake("unscale_and_clip", "it is the norm that is bounded")
def clips_values(gradients, scale, max_norm):
    times(gradients, 1 / scale)
    norm = length(gradients)
    for g in gradients:
        g.clamp_(-max_norm, max_norm)
    return norm


@mistake("unscale_and_clip", "other tensors were put into the list")
def replaces_them_in_the_list(gradients, scale, max_norm):
    norm = length(gradients) / scale
    for i, g in enumerate(gradients):
        gradients[i] = g / scale * min(1.0, max_norm / max(norm, 1e-30))
    return norm


@mistake("unscale_and_clip", "a Python number is asked for")
def returns_the_norm_as_a_tensor(gradients, scale, max_norm):
    times(gradients, 1 / scale)
    norm = torch.tensor(length(gradients))
    times(gradients, min(1.0, max_norm / max(length(gradients), 1e-30)))
    return norm


@mistake("unscale_and_clip", "gradients shorter than max_norm are made longer")
def stretches_with_an_epsilon(gradients, scale, max_norm):
    times(gradients, 1 / scale)
    norm = length(gradients)
    times(gradients, max_norm / (norm + 1e-6))
    return norm


@right("unscale_and_clip")
def by_torch(gradients, scale, max_norm):
    for g in gradients:
        g.div_(scale)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    if norm > max_norm:
        for g in gradients:
            g.mul_(max_norm / norm)
    return norm.item()


@right("unscale_and_clip")
def with_a_scaled_bound(gradients, scale, max_norm):
    norm = length(gradients)
    times(gradients, min(1.0, max_norm * scale / max(norm, 1e-30)))
    times(gradients, 1 / scale)
    return norm / scale


# ---- shares_by_speed ------------------------------------------------------------------------------------------


@mistake("shares_by_speed", "each was rounded down, and what is left belongs to nobody")
def rounds_down(rows, speeds):
    return [int(rows * v / sum(speeds)) for v in speeds]


@mistake("shares_by_speed", "each was rounded by itself")
def rounds_each(rows, speeds):
    return [round(rows * v / sum(speeds)) for v in speeds]


@mistake("shares_by_speed", "each was rounded up")
def rounds_up(rows, speeds):
    return [math.ceil(rows * v / sum(speeds)) for v in speeds]


@mistake("shares_by_speed", "equal shares: the speeds are ignored")
def ignores_speeds(rows, speeds):
    return [rows // len(speeds) + (r < rows % len(speeds)) for r in range(len(speeds))]


@mistake("shares_by_speed", "the shares follow the time for a row, not the speed")
def upside_down(rows, speeds):
    return greedy(rows, [1 / v for v in speeds])


def greedy(rows, speeds):
    shares = [0] * len(speeds)
    for _ in range(rows):
        shares[min(range(len(speeds)), key=lambda r: (shares[r] + 1) / speeds[r])] += 1
    return shares


@mistake("shares_by_speed", "what was left over went to the last rank")
def the_rest_to_the_last(rows, speeds):
    shares = [int(rows * v / sum(speeds)) for v in speeds]
    shares[-1] += rows - sum(shares)
    return shares


@mistake("shares_by_speed", "what was left over went to the first rank")
def the_rest_to_the_first(rows, speeds):
    shares = [int(rows * v / sum(speeds)) for v in speeds]
    shares[0] += rows - sum(shares)
    return shares


@mistake("shares_by_speed", "a share is not an int")
def leaves_fractions(rows, speeds):
    return [rows * v / sum(speeds) for v in speeds]


@mistake("shares_by_speed", "all rows went to the fastest rank")
def all_to_the_fastest(rows, speeds):
    return [rows * (r == speeds.index(max(speeds))) for r in range(len(speeds))]


@mistake("shares_by_speed", "the largest remainders")
def largest_remainders(rows, speeds):
    exact = [rows * v / sum(speeds) for v in speeds]
    shares = [int(x) for x in exact]
    order = sorted(range(len(speeds)), key=lambda r: shares[r] - exact[r])
    for r in order[: rows - sum(shares)]:
        shares[r] += 1
    return shares


@mistake("shares_by_speed", "rounded, and the last rank takes what is left")
def rounds_all_but_the_last(rows, speeds):
    shares = [round(rows * v / sum(speeds)) for v in speeds[:-1]]
    return [*shares, rows - sum(shares)]


@mistake("shares_by_speed", "done first without it")
def to_whoever_is_done(rows, speeds):
    shares = [int(rows * v / sum(speeds)) for v in speeds]
    while sum(shares) < rows:
        shares[min(range(len(speeds)), key=lambda r: shares[r] / speeds[r])] += 1
    return shares


@mistake("shares_by_speed", "every rank gets a row at least")
def one_for_everybody(rows, speeds):
    shares = [min(1, rows) if len(speeds) <= rows else 0 for _ in speeds]
    while sum(shares) < rows:
        shares[min(range(len(speeds)), key=lambda r: (shares[r] + 1) / speeds[r])] += 1
    return shares


@mistake("shares_by_speed", "the course's own `shares_of`")
def takes_the_courses(rows, speeds):
    return uneven.shares_of(rows, speeds)


@right("shares_by_speed")
def floors_and_the_rest(rows, speeds):
    shares = [int(rows * v / sum(speeds)) for v in speeds]
    while sum(shares) < rows:
        r = min(range(len(speeds)), key=lambda r: (shares[r] + 1) / speeds[r])
        shares[r] += 1
    return shares


@right("shares_by_speed")
def by_deadlines(rows, speeds):
    ends = sorted((k / v, r) for r, v in enumerate(speeds) for k in range(1, rows + 1))[:rows]
    return [sum(r == who for _, who in ends) for r in range(len(speeds))]


# ---- mean_by_rows ---------------------------------------------------------------------------------------------


def summed(value, group=None):
    value = torch.tensor([float(value)], dtype=torch.float64)
    dist.all_reduce(value, group=group)
    return value.item()


def weighted(gradient, rows):
    return gradient * rows if rows else torch.zeros_like(gradient)


@mistake("mean_by_rows", "a mean of means")
def mean_of_means(gradient, rows, group=None):
    mean = gradient.nan_to_num().clone()
    dist.all_reduce(mean, group=group)
    return mean / dist.get_world_size(group)


@mistake("mean_by_rows", "multiplied by the rows and never divided")
def never_divides(gradient, rows, group=None):
    total = weighted(gradient, rows)
    dist.all_reduce(total, group=group)
    return total


@mistake("mean_by_rows", "ranks, not by all")
def divides_by_ranks(gradient, rows, group=None):
    total = weighted(gradient, rows)
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


@mistake("mean_by_rows", "the weight is n · n_r / N")
def weights_as_for_ddp(gradient, rows, group=None):
    total = weighted(gradient, rows) * dist.get_world_size(group) / summed(rows, group)
    dist.all_reduce(total, group=group)
    return total


@mistake("mean_by_rows", "ranks as well: the weights n_r / N add up to 1 already")
def weights_and_averages(gradient, rows, group=None):
    total = weighted(gradient, rows) / summed(rows, group)
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


@mistake("mean_by_rows", "divided by this rank's own rows")
def divides_by_own_rows(gradient, rows, group=None):
    total = weighted(gradient, rows)
    dist.all_reduce(total, group=group)
    return total / max(rows, 1)


@mistake("mean_by_rows", "each has to be multiplied by its own rows first")
def forgets_the_weights(gradient, rows, group=None):
    total = gradient.nan_to_num().clone()
    dist.all_reduce(total, group=group)
    return total / summed(rows, group)


@mistake("mean_by_rows", "a rank without rows makes everybody's mean NaN")
def multiplies_nan_by_zero(gradient, rows, group=None):
    total = gradient * rows
    dist.all_reduce(total, group=group)
    return total / summed(rows, group)


@mistake("mean_by_rows", "a rank without rows takes part, with zeros")
def stays_away_without_rows(gradient, rows, group=None):
    if not rows:
        return torch.zeros_like(gradient)
    total = gradient * rows
    dist.all_reduce(total, group=group)
    return total / summed(rows, group)


@mistake("mean_by_rows", "the group argument is ignored: this is the mean over all ranks")
def forgets_the_group(gradient, rows, group=None):
    total = weighted(gradient, rows)
    dist.all_reduce(total)
    return total / summed(rows)


@mistake("mean_by_rows", "the group argument is ignored where the rows are added up")
def forgets_the_group_once(gradient, rows, group=None):
    total = weighted(gradient, rows)
    dist.all_reduce(total, group=group)
    return total / summed(rows)


@mistake("mean_by_rows", "`gradient` has changed")
def writes_into_the_gradient(gradient, rows, group=None):
    gradient.mul_(rows).nan_to_num_()
    dist.all_reduce(gradient, group=group)
    return gradient / summed(rows, group)


@mistake("mean_by_rows", "nothing was exchanged")
def stays_alone(gradient, rows, group=None):
    return gradient.clone()


@mistake("mean_by_rows", "the mean hides it")
def mends_every_nan(gradient, rows, group=None):
    total = gradient.nan_to_num() * rows
    dist.all_reduce(total, group=group)
    return total / summed(rows, group)


@mistake("mean_by_rows", "a tensor of 8 bits")
def counts_in_a_byte(gradient, rows, group=None):
    total, many = weighted(gradient, rows), torch.tensor([rows], dtype=torch.uint8)
    dist.all_reduce(total, group=group)
    dist.all_reduce(many, group=group)
    return total / many.item()


@right("mean_by_rows")
def in_one_message(gradient, rows, group=None):
    line = torch.cat([gradient * rows if rows else torch.zeros_like(gradient), gradient.new_tensor([float(rows)])])
    dist.all_reduce(line, group=group)
    return line[:-1] / line[-1]


@right("mean_by_rows")
def weights_first(gradient, rows, group=None):
    share = rows / summed(rows, group)
    mean = share * gradient if rows else gradient.new_zeros(gradient.shape)
    dist.all_reduce(mean, group=group)
    return mean


# ---- mean_without_late ----------------------------------------------------------------------------------------


def both(total, many, group=None):
    total, many = total.clone(), torch.as_tensor(many)
    dist.all_reduce(total, group=group)
    dist.all_reduce(many, group=group)
    return total, many if many.dim() else int(many)


@mistake("mean_without_late", "the dropped ranks' rows are still counted")
def counts_dropped_rows(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), rows, group)
    return total / many, many


@mistake("mean_without_late", "late ranks are not dropped")
def drops_nobody(gradient, rows, late, group=None):
    total, many = both(gradient, rows, group)
    return total / many, many


@mistake("mean_without_late", "the late ranks' gradients are still in it, only their rows are not")
def drops_rows_only(gradient, rows, late, group=None):
    total, many = both(gradient, 0 if late else rows, group)
    return total / many, many


@mistake("mean_without_late", "a late rank has to take part in the all_reduce")
def goes_home(gradient, rows, late, group=None):
    if late:
        return gradient, 0
    total, many = both(gradient, rows, group)
    return total / many, many


@mistake("mean_without_late", "ranks that were in time: by their rows")
def divides_by_punctual_ranks(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), 0 if late else rows, group)
    return total / int(summed(not late, group)), many


@mistake("mean_without_late", "a mean of means")
def averages_means(gradient, rows, late, group=None):
    both_counts = torch.tensor([0 if late else rows, 0 if late else 1])
    mean, (many, ranks) = both(gradient * 0 if late else gradient / max(rows, 1), both_counts, group)
    return mean / ranks.item(), int(many)


@mistake("mean_without_late", "multiplied by the rows")
def takes_sums_for_means(gradient, rows, late, group=None):
    total, many = both(gradient * 0 if late else gradient * rows, 0 if late else rows, group)
    return total / many, many


@mistake("mean_without_late", "the punctual were dropped")
def drops_the_punctual(gradient, rows, late, group=None):
    total, many = both(gradient * late, rows if late else 0, group)
    return total / max(many, 1), many


@mistake("mean_without_late", "a late rank keeps its own gradient")
def keeps_its_own(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), 0 if late else rows, group)
    return (gradient.clone() if late else total / many), many


@mistake("mean_without_late", "the number of rows is all ranks' rows")
def tells_all_rows(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), torch.tensor([0 if late else rows, rows]), group)
    return total / many[0].item(), int(many[1])


@mistake("mean_without_late", "the number of rows is this rank's own rows")
def tells_its_own_rows(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), 0 if late else rows, group)
    return total / many, rows


@mistake("mean_without_late", "the group argument is ignored where the rows are added up")
def forgets_the_group_for_rows(gradient, rows, late, group=None):
    total = gradient * (not late)
    dist.all_reduce(total, group=group)
    many = int(summed(0 if late else rows))
    return total / many, many


@mistake("mean_without_late", "`gradient` has changed")
def writes_into_its_gradient(gradient, rows, late, group=None):
    if late:
        gradient.zero_()
    total, many = both(gradient, 0 if late else rows, group)
    return total / many, many


@mistake("mean_without_late", "the number of rows is to be an int")
def returns_a_tensor(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), 0 if late else rows, group)
    return total / many, float(many)


@mistake("mean_without_late", "a tensor of 8 bits")
def counts_them_in_a_byte(gradient, rows, late, group=None):
    total, many = both(gradient * (not late), torch.tensor(0 if late else rows, dtype=torch.uint8), group)
    return total / many, many


@right("mean_without_late")
def one_line(gradient, rows, late, group=None):
    line = torch.cat([gradient, gradient.new_tensor([float(rows)])]) * (0.0 if late else 1.0)
    dist.all_reduce(line, group=group)
    return line[:-1] / line[-1], round(line[-1].item())
