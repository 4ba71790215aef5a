"""one_f_one_b_row: a rank's order. Typically wrong: the warm-up is one too long, or m smaller than p is forgotten."""

import re

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, type_of
from ..exercises.runs import results

hints = (
    "Begin with the last rank: nobody is behind it, so its backward can follow each forward at once. The rank before "
    "has to send one more micro-batch ahead, and so on.",
    "warm_up = min(p - rank - 1, m) forwards. Then m - warm_up times: the next forward, and the backward of the oldest "
    "micro-batch that is still kept.",
    "In turn k of those the forward is of micro-batch warm_up + k, the backward of micro-batch k. At the end the "
    "backwards from m - warm_up to m - 1 are left.",
)
CASES = [(3, 4, 8), (2, 4, 8), (0, 4, 8), (1, 4, 4), (0, 1, 3), (0, 4, 2), (1, 5, 3), (0, 2, 5), (5, 12, 20), (0, 3, 1)]


def check(run):
    labels = [f"rank {rank}, p = {p}, m = {m}" for rank, p, m in CASES]
    got = results(run, CASES, labels)
    for row, label in zip(got, labels, strict=True):
        if not isinstance(row, (list, tuple)) or not all(isinstance(action, str) for action in row):
            kind = type_of(row) if not isinstance(row, (list, tuple)) else f"a list with {type_of(_odd(row))}"
            raise Wrong(f"it returns {kind}: a list of texts such as '2F0' is asked for", label)
    wrong = [i for i, case in enumerate(CASES) if list(got[i]) != _row(*case)]
    if not wrong:
        return
    first = wrong[0]
    for why, rule in MISTAKES:
        if all(list(got[i]) == rule(*CASES[i]) for i in wrong):
            raise Wrong(why, labels[first], _said(_row(*CASES[first])), _said(got[first]))
    raise Wrong(_what(got[first], *CASES[first]), labels[first], _said(_row(*CASES[first])), _said(got[first]))


def _odd(row):
    return next(action for action in row if not isinstance(action, str))


def _said(row):
    return " ".join(row)[:200]


def _row(rank, p, m, warm_up=None, reverse=False, left=True, short=True):
    """The right row, or one with a mistake."""
    ahead = p - rank - 1 if warm_up is None else warm_up(rank, p, m)
    ahead = max(0, min(ahead, m) if short else ahead)
    row = [f"{rank}F{i}" for i in range(ahead)]
    for i in range(max(0, m - ahead)):
        row += [f"{rank}F{ahead + i}", f"{rank}B{i}"]
    rest = range(max(0, m - ahead), m)
    return row + [f"{rank}B{i}" for i in (reversed(rest) if reverse else rest) if left]


def _all_then_all(rank, p, m):
    return _row(rank, p, m, warm_up=lambda rank, p, m: m)


def _from_one(rank, p, m):
    return [f"{rank}{a[len(str(rank))]}{int(a[len(str(rank)) + 1 :]) + 1}" for a in _row(rank, p, m)]


def _without_stage(rank, p, m):
    return [action[len(str(rank)) :] for action in _row(rank, p, m)]


def _same_number(rank, p, m):
    """In steady state forward and backward of the same micro-batch, or what comes near it."""
    ahead = min(p - rank - 1, m)
    row = [f"{rank}F{i}" for i in range(ahead)]
    for i in range(m - ahead):
        row += [f"{rank}F{ahead + i}", f"{rank}B{ahead + i}"]
    return row + [f"{rank}B{i}" for i in range(ahead)]


def _starts_again(rank, p, m):
    ahead = min(p - rank - 1, m)
    row = [f"{rank}F{i}" for i in range(ahead)]
    for i in range(m - ahead):
        row += [f"{rank}F{i}", f"{rank}B{i}"]
    return row + [f"{rank}B{i}" for i in range(m - ahead, m)]


MISTAKES = [  # (diagnosis, the row that it would give)
    ("this is GPipe: all forwards first. Its backward may begin as soon as a micro-batch has come back", _all_then_all),
    ("the warm-up is one forward too long: p - rank - 1 ranks are behind this one, and the next forward belongs to the "
     "first pair", lambda *case: _row(*case, warm_up=lambda rank, p, m: p - rank)),
    ("the warm-up is one forward too short: p - rank - 1 ranks are behind this one",
     lambda *case: _row(*case, warm_up=lambda rank, p, m: p - rank - 2)),
    ("every rank warms up as long as rank 0: p - rank - 1 is another number on each",
     lambda *case: _row(*case, warm_up=lambda rank, p, m: p - 1)),
    ("the warm-up is the other way round: the first rank is the one with most ranks behind it",
     lambda *case: _row(*case, warm_up=lambda rank, p, m: rank)),
    ("there is no warm-up: rank 0 would do one micro-batch after the other, and all others wait",
     lambda *case: _row(*case, warm_up=lambda rank, p, m: 0)),
    ("where m is smaller than the warm-up there are forwards of micro-batches that do not exist: min(p - rank - 1, m)",
     lambda *case: _row(*case, short=False)),
    ("the backwards that are left at the end are missing", lambda *case: _row(*case, left=False)),
    ("the last backwards are in reverse order: they come back in the order in which they went",
     lambda *case: _row(*case, reverse=True)),
    ("in a pair forward and backward are of the same micro-batch: the oldest one comes back, the newest one goes",
     _same_number),
    ("after the warm-up the forwards begin at 0 again", _starts_again),
    ("micro-batches are counted from 1: they begin at 0", _from_one),
    ("the stage is missing: '2F0', not 'F0'", _without_stage),
]  # fmt: skip


def _what(row, rank, p, m):
    """What is wrong with a row that is no mistake we know."""
    right, row = _row(rank, p, m), list(row)
    if missing := [action for action in right if action not in row]:
        return f"{missing[0]} is missing"
    if twice := [action for action in row if row.count(action) > 1]:
        return f"{twice[0]} is there twice"
    if strange := [action for action in row if action not in right]:
        stage, i = re.fullmatch("([0-9]*).([0-9]*)", strange[0]).groups() if strange[0] else ("", "")
        if stage == str(rank) and i.isdigit() and int(i) >= m:
            return f"{strange[0]}: with m = {m} there are only micro-batches 0 to {m - 1}"
        return f"{strange[0]} does not belong to this rank"
    place = next(i for i, (a, b) in enumerate(zip(row, right, strict=True)) if a != b)
    return f"at place {place} (from 0) there is {row[place]}, where {right[place]} is due"


WHY = (
    "With p - rank - 1 micro-batches ahead, once the pipeline is full, the next one to come back is due just when the "
    "next forward is done. Megatron-LM warms up as long. PyTorch's Schedule1F1B counts one more, p - rank, and goes on "
    "with backward, forward: the same order."
)
exercise = Exercise(hints, check, minutes=15, level="medium", why=WHY)
