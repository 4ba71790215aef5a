"""in_flight: the most micro-batches kept at once. Typically wrong: I lets go already, or several stages count once."""

import re

from pardist_lib.mechanisms.pipeline import gpipe, interleaved, one_f_one_b, zbv, zero_bubble

from ..exercises.cases import numbers
from ..exercises.exercise import Exercise

hints = (
    "Go through the row with a counter: which kinds of action make it larger, which smaller? What is asked for is the "
    "most that it ever was.",
    "F keeps one more. B lets go of one, and so does W. After I the weights' gradients are still to come, and they "
    "need the activations: nothing is let go of.",
    'held += ("F" in action) - ("B" in action or "W" in action); most = max(most, held)',
)
TWICE = "0F0 0I0 0W0 0F1 0F2 0I1 0W1 0I2 0W2"  # whoever lets go at I and at W has one too few here


def check(run):
    rows = [
        *gpipe(2, 3).rows[:1], *one_f_one_b(4, 8).rows, *one_f_one_b(4, 2).rows[:1], *zero_bubble(4, 6).rows,
        *interleaved(2, 4, 2).rows, *zbv(2, 5).rows, *zero_bubble(12, 12).rows[10:],
    ]  # fmt: skip
    inputs = [([str(action) for action in row],) for row in [*rows, TWICE.split()]]
    labels = [f"in_flight({' '.join(row)})" for (row,) in inputs]
    expected = [_counted(row) for (row,) in inputs]
    numbers(run, inputs, expected, labels, MISTAKES)


def _split(action):
    return re.fullmatch("([0-9]+)([FBIW])([0-9]+)", action).groups()


def _counted(row, F=1, B=-1, I=0, W=-1, last=False):  # noqa: E741 - the field's letters
    """The right count, or one in which a kind changes it otherwise; last: what is held at the end."""
    held = most = 0
    for action in row:
        held += {"F": F, "B": B, "I": I, "W": W}[_split(action)[1]]
        most = max(most, held)
    return held if last else most


def _without_stages(row):
    """Each micro-batch once, on whichever stage it is."""
    held, most = set(), 0
    for _, kind, i in map(_split, row):
        held = held | {i} if kind == "F" else held - {i} if kind in "BW" else held
        most = max(most, len(held))
    return most


def _of_one_stage(row):
    stages = {_split(action)[0] for action in row}
    return max(_counted([action for action in row if _split(action)[0] == stage]) for stage in stages)


MISTAKES = [  # (diagnosis, what it would give)
    ("I lets go of nothing: the weights' gradients, which come with W, need the activations still",
     lambda row: _counted(row, I=-1, W=0)),
    ("I and W together let go of one micro-batch, not of two: count W", lambda row: _counted(row, I=-1)),
    ("where backward is in halves nothing is let go of: after W it is", lambda row: _counted(row, W=0)),
    ("where backward is whole, B, nothing is let go of", lambda row: _counted(row, B=0)),
    ("these are all forwards of the row: what has come back is kept no longer", lambda row: _counted(row, B=0, W=0)),
    ("a stage may have two digits, '10F0': find the letter, it is not always the second character",
     lambda row: _counted([action for action in row if action[1] in "FBIW"])),
    ("this is what is kept at the end of the row: the most that ever was is asked for",
     lambda row: _counted(row, last=True)),
    ("a micro-batch counts once for each stage that keeps it", _without_stages),
    ("these are the micro-batches of one stage: those of all stages of the rank are in its memory together",
     _of_one_stage),
    ("one too few: the micro-batch whose forward it is counts, too", lambda row: _counted(row) - 1),
    ("one too many", lambda row: _counted(row) + 1),
    ("it counts actions, not micro-batches", len),
]  # fmt: skip


WHY = (
    "With whole backwards a rank's activation memory is this count times what a stage keeps of one micro-batch, as you "
    "saw measured; between I and W the gradients that W needs are kept, too. "
    "Megatron-LM's 1F1B is built for it: p - rank, however many micro-batches there are."
)
exercise = Exercise(hints, check, minutes=5, level="easy", why=WHY)
