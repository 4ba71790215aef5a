"""Answers to step_or_skip: wrong ones as people write them, and unusual right ones."""

import math

import torch
import torch.distributed as dist

from tests.lessons.planted import mistake, right


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
