"""Answers to unscale_and_clip: wrong ones as people write them, and unusual right ones."""

import math

import torch

from tests.lessons.planted import mistake, right


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
