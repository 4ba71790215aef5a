"""average_gradients: each gradient's mean over the ranks of a group. Typically wrong: a sum, or a mean in a copy."""

import torch

from ..exercises.cases import F32, F64, groups_of
from ..exercises.exercise import Exercise
from ..exercises.gradients import Sample, average, gradients, judge_average, loss_of, rows_of_rank
from ..exercises.judge import same

hints = (
    "After backward() each rank has its own gradients in p.grad, for each p of model.parameters(). "
    "dist.all_reduce(t, group=group) replaces t by the sum over the ranks, on every rank.",
    "A mean is a sum divided by how many there are: dist.get_world_size(group). Divide in place (/=), or the "
    "result does not reach p.grad.",
    "Loop over model.parameters(); where p.grad is not None, all-reduce p.grad, then divide it.",
)


def check(run):
    for same_weights, dtype in ((False, F64), (True, F32)):
        judge_average(run(average, 1, dtype, same_weights), groups_of(False), "4 ranks")
    _equals_whole_batch(run)
    judge_average(run(average, 3, F64, True, True), groups_of(True), "two groups of 2 ranks")
    judge_average(run(average, 4, F64, n=3, about="3 ranks"), groups_of(False, 3), "3 ranks")
    about = "4 ranks, all gradients of rank 1 zero"
    stuck = "rank 1 does not make the calls that the others make: its gradients are zero here, not None, and count"
    seen = run(average, 7, F64, True, False, range(4), [1], about=about, stuck=stuck)
    judge_average(seen, groups_of(False), about)


def _equals_whole_batch(run):
    """Equal weights and shards of equal size: the mean is the gradient of all rows in one process."""
    seen, alone = run(average, 2, F64), Sample(2, F64)
    loss_of(alone, torch.cat([rows_of_rank(2, rank, F64) for rank in range(4)])).backward()
    for name, expected in gradients(alone).items():
        if expected is not None:
            same([one.kept["after"][name] for one in seen], expected, f"the gradient of {name}", "4 ranks")


WHY = (
    "The mean of equal shards' gradients is the gradient of the whole batch. DDP sends the same bytes, but packs "
    "gradients into buckets and starts on one while backward still works on the next (lesson 6)."
)
exercise = Exercise(hints, check, minutes=10, level="easy", why=WHY)
