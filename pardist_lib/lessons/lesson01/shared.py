"""What several exercises of this lesson share."""

import math

from ..exercises.cases import call_with_tensor, every_case, values
from ..exercises.judge import by_hand


def on_every_tensor(run, judge, split=False):
    """`judge(seen, before, about)` in each of `every_case`, where nothing but send and receive was called."""

    def one(n, shape, dtype, seed, about):
        seen = run(call_with_tensor, shape, dtype, seed, n=n, about=about)
        by_hand(seen)
        judge(seen, [values(shape, dtype, rank, seed) for rank in range(n)], about)

    every_case(one, split)


def rounded(formula):
    """What people get who make a whole number of it."""
    why = "rounded to a whole number: the formula's own value is asked for, divide with / and leave it at that"
    return [(why, lambda *args, whole=whole: whole(formula(*args))) for whole in (math.floor, round, math.ceil)]
