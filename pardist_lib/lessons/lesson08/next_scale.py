"""next_scale: the rule of dynamic loss scaling; off by one step, or the count is not started anew."""

import math

import torch

from ..exercises.cases import F64
from ..exercises.exercise import Exercise
from ..exercises.judge import equal, same
from ..exercises.runs import pair, silent
from ..exercises.watch import told, watched
from .shared import likeliest_first, number

hints = (
    "Three cases, and each returns both numbers: an overflow, an ordinary good step, a good step that completes "
    "the interval.",
    "This step counts too: where good_steps + 1 == interval, the scale doubles now, and counting begins at 0.",
    "An overflow makes the count 0 as well: `interval` good steps *in a row* are needed.",
)

HISTORIES = (  # scale, good steps, interval, in which of the next steps (x) there is an overflow
    (65536.0, 0, 3, "......."),
    (65536.0, 0, 4, "..x....xx."),
    (1024.0, 0, 2000, "xxx..."),
    (8.0, 1998, 2000, "...."),
    (4.0, 0, 1, "..x."),
    (1.0, 2, 5, "x......x"),
    (2.0**44, 0, 2, "...."),
)


def check(run):
    [seen] = run(_states, n=1)
    silent(seen)
    got, labels = [], [f"scale {s:g}, {g} good steps, interval {i}, then {x} (x: overflow)" for s, g, i, x in HISTORIES]
    for states, label in zip(seen.result, labels, strict=True):
        pairs = [pair(state, "(scale, good_steps)", label) for state in states]
        got.append(_columns([(number(s, "the scale", label), number(c, "the count", label)) for s, c in pairs]))
    right = _rule()

    def grows_first(scale, good, overflow, interval):
        new, count = right(scale, good, overflow, interval)
        return scale if overflow and good + 1 == interval else new, count

    rules = [
        ("the scale never falls: an overflow has to halve it", _rule(falls=1.0)),
        ("the scale never grows: after `interval` good steps it doubles", _rule(grows=1.0)),
        ("it grows after an overflow, which makes the next one certain: it has to fall", _rule(falls=2.0)),
        ("it grows one good step too late: this step counts too", _rule(late=1)),
        ("it grows one good step too early", _rule(late=-1)),
        ("an overflow does not start the count anew: the good steps have to be in a row", _rule(kept=1)),
        ("an overflow counts as a good step", _rule(kept=1, counted=1)),
        ("the count goes on after the scale has doubled: it starts at 0 again", _rule(restart=False)),
        ("once there have been `interval` good steps the scale doubles in every step: start the count at 0 again",
         _rule(restart=False, for_ever=True)),
        ("an overflow makes the scale a quarter: half is asked for", _rule(falls=0.25)),
        ("an overflow makes the scale 1: half is asked for",
         lambda s, g, overflow, i: (1.0, 0) if overflow else right(s, g, overflow, i)),
        ("a step that overflows completes the interval, and doubles the scale before it is halved: it is no good step",
         grows_first),
        ("`interval` is ignored: it is not always 2,000", lambda s, g, overflow, i: right(s, g, overflow, 2000)),
        *((f"the scale is held at {most:g}: nothing here bounds it", _rule(most=most))
          for most in (65504.0, 65536.0, 2.0**24, 2.0**32)),
    ]  # fmt: skip
    mistakes = [(why, [_columns(_through(rule, *history)) for history in HISTORIES]) for why, rule in rules]
    mistakes = likeliest_first(mistakes, got)
    for i, (history, label) in enumerate(zip(HISTORIES, labels, strict=True)):
        columns = [f"the scale after each step, {label}", f"the count after each step, {label}"]
        known = [(why, would[i]) for why, would in mistakes if all(map(equal, got[i], would[i]))]
        same(got[i], _columns(_through(right, *history)), "", mistakes=known, labels=columns)


def _states(answer):
    return watched(lambda: [_through(answer, *history) for history in HISTORIES])


def _through(rule, scale, good, interval, steps):
    """The states (scale, good steps) after each of these steps; no more of them after something else."""
    state, states = (scale, good), []
    for step in steps:
        state = told(rule, *state, step == "x", interval)
        states.append(state)
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            break
    return states


def _columns(states):
    return list(torch.tensor(states, dtype=F64).T)


def _rule(falls=0.5, grows=2.0, late=0, kept=0, counted=0, restart=True, for_ever=False, most=math.inf):
    """A rule for the scale, right or with one mistake, as a function (scale, good, overflow, interval) -> state."""

    def rule(scale, good, overflow, interval):
        if overflow:
            return scale * falls, kept * good + counted
        good += 1
        if good == interval + late or for_ever and good > interval:
            return min(scale * grows, most), 0 if restart else good
        return scale, good

    return rule


WHY = (
    "Overflows show at once, a scale too low does not: fall at the first, climb in trials. torch's GradScaler "
    "does the same on the device; Megatron waits for several overflows in a row (its hysteresis) before it "
    "halves."
)

exercise = Exercise(hints, check, minutes=5, level="easy", why=WHY)
