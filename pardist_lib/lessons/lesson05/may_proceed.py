"""The exercise may_proceed."""

import itertools

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, type_of
from ..exercises.watch import watched

hints = (
    "Who holds a worker back is the slowest of all: min(clocks). How far ahead of it is this one?",
    "More than staleness steps ahead has to wait; exactly staleness steps ahead may still go on. And staleness "
    "may be None.",
)


def check(run):
    some = itertools.product(((3, 3, 3), (5, 3, 4), (3, 6, 4), (0, 1, 0), (7, 7, 2)), range(3), (None, 0, 1, 2, 3))
    inputs = [*some, ((4,), 0, 0), ((10, 3), 0, 6), ((10, 3), 0, 7), ((2, 2, 0, 1), 1, 1), ((2, 2, 0, 1), 3, 1)]
    [seen] = run(_asked, inputs, n=1)
    if seen.calls:
        raise Wrong(f"it calls {seen.calls[0].op}: this one is plain arithmetic, in one process")
    _judge_proceed(inputs, seen.result)


def _asked(answer, inputs):
    def all_of_them():
        results = []
        for clocks, worker, staleness in inputs:
            given = list(clocks)
            try:
                results.append((answer(given, worker, staleness), given == list(clocks)))
            except Exception as error:
                error.args = (", ".join([*map(str, error.args), _call(clocks, worker, staleness)]),)
                raise
        return results

    return watched(all_of_them)


def _call(clocks, worker, staleness):
    return f"may_proceed({list(clocks)}, {worker}, {staleness})"


def _judge_proceed(inputs, results):
    expected = [s is None or c[w] - min(c) <= s for c, w, s in inputs]
    labels = [_call(*one) for one in inputs]
    got = []
    for (value, kept), label in zip(results, labels, strict=True):
        if not isinstance(value, bool):
            raise Wrong(f"it returns {value!r:.40} ({type_of(value)}): True or False is asked for", label)
        if not kept:
            raise Wrong("clocks was changed: only look at it", label)
        got.append(value)
    mistakes = [
        ("exactly `staleness` steps ahead may still go on: only more than that has to wait",
         lambda c, w, s: c[w] - min(c) < s),
        ("the wrong way round: it holds the slow worker back, who is the one that all wait for",
         lambda c, w, s: max(c) - c[w] <= s),
        ("True and False are swapped: the question is whether it may go on", lambda c, w, s: not c[w] - min(c) <= s),
        ("compared with the fastest: the slowest is the one that holds the others back",
         lambda c, w, s: max(c) - min(c) <= s),
        ("compared with the mean of the clocks: the slowest is the one that counts",
         lambda c, w, s: c[w] - sum(c) / len(c) <= s),
        ("the clock itself is compared: it is how far ahead of the slowest it is that counts",
         lambda c, w, s: c[w] <= s),
        ("one step too generous: staleness + 1 steps ahead has to wait", lambda c, w, s: c[w] - min(c) <= s + 1),
        ("only workers exactly `staleness` ahead, or level, are looked at: any lead up to it may go on",
         lambda c, w, s: c[w] - min(c) in (0, s)),
        ("compared with worker 0's clock: the slowest may be another one", lambda c, w, s: c[w] - c[0] <= s),
        ("compared with the next worker's clock: the slowest may be another one",
         lambda c, w, s: c[w] - c[(w + 1) % len(c)] <= s),
        ("0 is a bound like any other, not None: `if not staleness` takes it for that",
         lambda c, w, s: s == 0 or c[w] - min(c) <= s),
        ("workers that have not begun are left out: they are the slowest",
         lambda c, w, s: c[w] - min((x for x in c if x), default=0) <= s),
        ("only the slowest may go on", lambda c, w, s: c[w] == min(c)),
    ]  # fmt: skip
    if got == expected:
        return
    no_bound = [i for i, (*_, s) in enumerate(inputs) if s is None]
    first = next(i for i in range(len(got)) if got[i] != expected[i])
    if all(not got[i] for i in no_bound) and all(got[i] == expected[i] for i in range(len(got)) if i not in no_bound):
        why = "staleness None means that nobody waits"
    else:
        why = "the worker is let go" if got[first] else "the worker is held back"
        clocks, worker, _ = inputs[first]
        ahead = clocks[worker] - min(clocks)
        why += f", {ahead} step{'s' * (ahead != 1)} ahead of the slowest"
        for said, rule in mistakes:
            if all(s is None or rule(c, w, s) == g for (c, w, s), g in zip(inputs, got, strict=True)):
                why = said
                break
    raise Wrong(why, labels[first], str(expected[first]), str(got[first]))


exercise = Exercise(hints, check)
