"""The exercise next_scale."""

import torch

from ..exercises.cases import F64
from ..exercises.exercise import Exercise
from ..exercises.judge import same
from ..exercises.watch import plain, watched
from .shared import number, pair, unsent

hints = (
    "Three cases, and each returns both numbers: an overflow, an ordinary good step, a good step that completes "
    "the interval.",
    "This step counts too: where good_steps + 1 == interval, the scale doubles now, and counting begins at 0.",
    "An overflow makes the count 0 as well: `interval` good steps *in a row* are needed.",
)


def check(run):
    histories = [
        (65536.0, 0, 3, [False] * 7),
        (65536.0, 0, 4, [False, False, True, False, False, False, False, True, True, False]),
        (1024.0, 0, 2000, [True] * 3 + [False] * 3),
        (8.0, 1998, 2000, [False] * 4),
        (4.0, 0, 1, [False, False, True, False]),
        (1.0, 2, 5, [True, False, False, False, False, False, False, True]),
        (2.0**44, 0, 2, [False] * 4),
    ]
    [seen] = run(_histories, histories, n=1)
    unsent(seen)
    wrong_rules = [
        ("the scale never falls: an overflow has to halve it", _rule(back=False)),
        ("the scale never grows: after `interval` good steps it doubles", _rule(growth=1.0)),
        ("it grows after an overflow, which makes the next one certain: it has to fall",
         _rule(grow_on_overflow=True)),
        ("it grows one good step too late: this step counts too", _rule(after=1)),
        ("it grows one good step too early", _rule(after=-1)),
        ("an overflow does not start the count anew: the good steps have to be in a row",
         _rule(reset_on_overflow=False)),
        ("an overflow counts as a good step", _rule(reset_on_overflow=None)),
        ("the count goes on after the scale has doubled: it starts at 0 again", _rule(reset_on_growth=False)),
        ("once there have been `interval` good steps the scale doubles in every step: start the count at 0 again",
         _rule(reset_on_growth=False, keep_growing=True)),
        ("an overflow makes the scale a quarter: half is asked for", _rule(0.25)),
        ("an overflow makes the scale 1: half is asked for",
         lambda s, g, o, i: (1.0, 0) if o else _rule()(s, g, o, i)),
        ("a step that overflows completes the interval, and doubles the scale before it is halved: it is no good "
         "step", lambda s, g, o, i: (s if o and g + 1 == i else _rule()(s, g, o, i)[0], _rule()(s, g, o, i)[1])),
        ("`interval` is ignored: it is not always 2,000", lambda s, g, o, i: _rule()(s, g, o, 2000)),
        *((f"the scale is held at {b:g}: nothing here bounds it", _bounded(b))
          for b in (65504.0, 65536.0, 2.0**24, 2.0**32)),
    ]  # fmt: skip
    cases = []
    for (scale, good, interval, overflows), states in zip(histories, seen.result, strict=True):
        said = "".join("x" if o else "." for o in overflows)
        about = f"scale {scale:g}, {good} good steps, interval {interval}, then {said} (x: overflow)"
        got = []
        for state in states:
            new, count = pair(state, "(scale, good_steps)", about)
            got.append([number(new, "the scale", about), number(count, "the count", about)])

        def through(rule, first=(scale, good), overflows=overflows, interval=interval):
            found, state = [], first
            for overflow in overflows:
                state = rule(*state, overflow, interval)
                found.append(state)
            return torch.tensor(found, dtype=F64)

        mine, would = torch.tensor(got, dtype=F64), [through(rule) for _, rule in wrong_rules]
        cases.append((about, mine, through(_rule()), would))
    wholly = [all(torch.equal(mine, would[i]) for _, mine, _, would in cases) for i in range(len(wrong_rules))]
    for about, mine, expected, would in cases:
        order = sorted(range(len(wrong_rules)), key=lambda i: not wholly[i])
        likely = [(wrong_rules[i][0], would[i]) for i in order if torch.equal(would[i], mine)]
        for column, what in ((0, "the scale after each step"), (1, "the count after each step")):
            known = [(why, [w[:, column]]) for why, w in likely]
            same([mine[:, column]], [expected[:, column]], what, "", known, labels=[f"{what}, {about}"])


def _histories(answer, histories):
    """On one rank: the states (scale, good steps) that the answer goes through in each history."""

    def all_of_them():
        found = []
        for scale, good, interval, overflows in histories:
            states, state = [], (scale, good)
            for overflow in overflows:
                state = answer(*state, overflow, interval)
                states.append(plain(state))
                if not isinstance(state, (tuple, list)) or len(state) != 2:
                    break
            found.append(states)
        return found

    return watched(all_of_them)


def _rule(overflow_factor=0.5, after=0, back=True, reset_on_overflow=True, reset_on_growth=True, grow_on_overflow=False,
          keep_growing=False, growth=2.0, below=0):  # fmt: skip
    """A rule for the scale, right or with one mistake, as a function (scale, good, overflow, interval) -> state."""

    def rule(scale, good, overflow, interval):
        if overflow:
            scale = scale * (2.0 if grow_on_overflow else overflow_factor if back else 1.0)
            return scale, 0 if reset_on_overflow else good + (reset_on_overflow is None)
        good += 1
        if (good >= interval + after) if keep_growing else (good == interval + after):
            return scale * growth, 0 if reset_on_growth else good
        return scale, good

    return rule


def _bounded(most):
    def rule(scale, good, overflow, interval):
        new, good = _rule()(scale, good, overflow, interval)
        return (min(new, most) if new > scale else new), good

    return rule


exercise = Exercise(hints, check)
