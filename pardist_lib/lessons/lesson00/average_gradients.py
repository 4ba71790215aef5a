"""The exercise average_gradients."""

import torch

from ..exercises.exercise import Exercise
from ..exercises.gradients import (
    ALL,
    EVERYWHERE,
    PAIRS,
    Sample,
    average,
    gradients,
    judge_average,
    loss_of,
    rows_of_rank,
)
from ..exercises.judge import same

hints = (
    "After backward() each rank has its own gradients in p.grad, for each p of model.parameters(). "
    "dist.all_reduce(t, group=group) replaces t by the sum over the ranks, on every rank.",
    "A mean is a sum divided by how many there are: dist.get_world_size(group). Divide in place (/=), or the "
    "result does not reach p.grad.",
    "Loop over model.parameters(); where p.grad is not None, all-reduce p.grad, then divide it.",
)


def check(run):
    for dtype, same_weights in ((torch.float64, False), (torch.float32, True)):
        seen = run(average, 1, dtype, same_weights)
        judge_average(seen, ALL, "4 ranks")
    _judge_whole_batch(run)
    seen = run(average, 3, torch.float64, True, True)
    judge_average(seen, PAIRS, "two groups of 2 ranks")
    seen = run(average, 4, torch.float64, n=3, about="3 ranks")
    judge_average(seen, [[0, 1, 2]], "3 ranks")
    about = "4 ranks, all gradients of rank 1 zero"
    stuck = "rank 1 does not make the calls that the others make: its gradients are zero here, not None, and count"
    seen = run(average, 7, torch.float64, True, False, EVERYWHERE, [1], about=about, stuck=stuck)
    judge_average(seen, ALL, about)


def _judge_whole_batch(run):
    """Equal weights and shards of equal size: the mean is the gradient of all rows in one process."""
    seen = run(average, 2, torch.float64)
    alone = Sample(2, torch.float64)
    loss_of(alone, torch.cat([rows_of_rank(2, rank, torch.float64) for rank in range(4)])).backward()
    for name, expected in gradients(alone).items():
        if expected is not None:
            same([one.kept["after"][name] for one in seen], [expected] * 4, f"the gradient of {name}", "4 ranks")


exercise = Exercise(hints, check)
