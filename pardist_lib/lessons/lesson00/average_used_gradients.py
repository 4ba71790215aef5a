"""The exercise average_used_gradients."""

import torch

from pardist_lib.ranks.report import plural

from ..exercises.exercise import Exercise
from ..exercises.gradients import ALL, EVERYWHERE, PAIRS, average, judge_average

hints = (
    "A rank that skips an all_reduce leaves the others waiting. So before the first one, all ranks have to know "
    "which parameters any of them used: that takes a message.",
    "Make a small tensor with one number for each parameter, 1 where p.grad is not None, and all-reduce it: where "
    "the sum is 0, no rank used the parameter, and all of them can skip it.",
    "Where the sum is above 0 and p.grad is None here, set p.grad = torch.zeros_like(p) first; then go on as in "
    "average_gradients. Leave out parameters whose requires_grad is False from the start.",
)


def check(run):
    stuck = (
        "the ranks do not make the same calls: where p.grad is None one of them skips the all_reduce that the "
        "others make; let them agree first on what was used"
    )
    for extra_on in ([1, 2], EVERYWHERE, [0], []):
        about = f"4 ranks, `extra` used on {plural(list(extra_on)) if extra_on else 'none'}"
        seen = run(average, 5, torch.float64, True, False, extra_on, about=about, stuck=stuck)
        judge_average(seen, ALL, about, flags=True)
    about = "two groups of 2 ranks, `extra` used on ranks 0, 1"
    seen = run(average, 6, torch.float64, True, True, [0, 1], about=about, stuck=stuck)
    judge_average(seen, PAIRS, about, flags=True)
    about = "two groups of 2 ranks, `extra` used in one of them: ranks 1, 3"
    seen = run(average, 9, torch.float64, True, True, [1, 3], about=about, stuck=stuck)
    judge_average(seen, PAIRS, about, flags=True)
    about = "4 ranks, all gradients zero (and not None)"
    seen = run(average, 8, torch.float64, True, False, EVERYWHERE, EVERYWHERE, about=about, stuck=stuck)
    judge_average(seen, ALL, about, flags=True)


exercise = Exercise(hints, check)
