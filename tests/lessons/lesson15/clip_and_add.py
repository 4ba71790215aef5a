"""Answers to clip_and_add: wrong ones as people write them, and unusual right ones."""

import torch

from tests.lessons.planted import mistake, right


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
