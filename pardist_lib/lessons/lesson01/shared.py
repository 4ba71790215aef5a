"""What several exercises of this lesson share."""

import math


def rounded(formula):
    """What people get who make a whole number of it."""
    why = "rounded to a whole number: the formula's own value is asked for, divide with / and leave it at that"
    return [(why, lambda *args, whole=whole: whole(formula(*args))) for whole in (math.floor, round, math.ceil)]
