"""average_used_gradients: the same where a rank may use a part only. Typically wrong: ranks that make other calls."""

from pardist_lib.ranks.report import plural

from ..exercises.cases import F64, groups_of
from ..exercises.exercise import Exercise
from ..exercises.gradients import average, judge_average

hints = (
    "A rank that skips an all_reduce leaves the others waiting. So before the first one, all ranks have to know "
    "which parameters any of them used: that takes a message.",
    "Make a small tensor with one number for each parameter, 1 where p.grad is not None, and all-reduce it: where "
    "the sum is 0, no rank used the parameter, and all of them can skip it.",
    "Where the sum is above 0 and p.grad is None here, set p.grad = torch.zeros_like(p) first; then go on as in "
    "average_gradients. Leave out parameters whose requires_grad is False from the start.",
)


def check(run):
    stuck = "the ranks do not make the same calls: where p.grad is None one of them skips the all_reduce that the "
    stuck += "others make; let them agree first on what was used"
    everywhere, pairs = range(4), "two groups of 2 ranks, `extra` used "
    cases = [
        (f"4 ranks, `extra` used on {plural(on) if on else 'none'}", 5, False, on, [])
        for on in ([1, 2], everywhere, [0], [])
    ]
    cases += [
        (pairs + "on ranks 0, 1", 6, True, [0, 1], []),
        (pairs + "in one of them: ranks 1, 3", 9, True, [1, 3], []),
        ("4 ranks, all gradients zero (and not None)", 8, False, everywhere, everywhere),
    ]
    for about, seed, in_pairs, extra_on, zero_on in cases:
        seen = run(average, seed, F64, True, in_pairs, extra_on, zero_on, about=about, stuck=stuck)
        judge_average(seen, groups_of(in_pairs), about, flags=True)


WHY = (
    "All ranks make the same calls, because they first agreed on what was used. DDP does it so with "
    "find_unused_parameters=True; without that it waits for the missing gradient, and reports it in the next "
    "step."
)
exercise = Exercise(hints, check, minutes=25, level="hard", why=WHY)
