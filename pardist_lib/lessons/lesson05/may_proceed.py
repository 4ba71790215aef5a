"""Bounded staleness; typically off by one, compared with others than the slowest, or 0 taken for None."""

import itertools

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, type_of
from ..exercises.watch import told, watched

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
    for (value, intact), case in zip(seen.result, inputs, strict=True):
        if not isinstance(value, bool):
            raise Wrong(f"it returns {value!r:.40} ({type_of(value)}): True or False is asked for", _spelled(*case))
        if not intact:
            raise Wrong("clocks was changed: only look at it", _spelled(*case))
    _judge(inputs, [value for value, _ in seen.result])


def _asked(answer, inputs):
    def all_of_them():
        results = []
        for clocks, worker, staleness in inputs:
            given = list(clocks)
            results.append((told(answer, given, worker, staleness), given == list(clocks)))
        return results

    return watched(all_of_them)


def _spelled(clocks, worker, staleness):
    return f"may_proceed({list(clocks)}, {worker}, {staleness})"


RULES = {  # how mistaken answers decide, where there is a bound; c: clocks, w: worker, s: staleness
    "exactly `staleness` steps ahead may still go on: only more than that has to wait": lambda c, w, s: (
        c[w] - min(c) < s
    ),
    "the wrong way round: it holds the slow worker back, whom all wait for": lambda c, w, s: max(c) - c[w] <= s,
    "True and False are swapped: the question is whether it may go on": lambda c, w, s: not c[w] - min(c) <= s,
    "compared with the fastest: the slowest holds the others back": lambda c, w, s: max(c) - min(c) <= s,
    "compared with the mean of the clocks: the slowest counts": lambda c, w, s: c[w] - sum(c) / len(c) <= s,
    "the clock itself is compared: it is how far ahead of the slowest it is that counts": lambda c, w, s: c[w] <= s,
    "one step too generous: staleness + 1 steps ahead has to wait": lambda c, w, s: c[w] - min(c) <= s + 1,
    "only workers exactly `staleness` ahead, or level, go on: any lead up to it may": lambda c, w, s: (
        c[w] - min(c) in (0, s)
    ),
    "compared with worker 0's clock: the slowest may be another one": lambda c, w, s: c[w] - c[0] <= s,
    "compared with the next worker's: the slowest may be another one": lambda c, w, s: c[w] - c[(w + 1) % len(c)] <= s,
    "0 is a bound like any other, not None: `if not staleness` takes it for that": lambda c, w, s: (
        s == 0 or c[w] - min(c) <= s
    ),
    "workers that have not begun are left out: they are the slowest": lambda c, w, s: (
        c[w] - min(filter(None, c), default=0) <= s
    ),
    "only the slowest may go on": lambda c, w, s: c[w] == min(c),
}


def _judge(inputs, got):
    expected = [s is None or c[w] - min(c) <= s for c, w, s in inputs]
    if got == expected:
        return
    first = next(i for i in range(len(got)) if got[i] != expected[i])
    (clocks, worker, _), bounded = inputs[first], [i for i, (*_, s) in enumerate(inputs) if s is not None]
    ahead, done = clocks[worker] - min(clocks), "let go" if got[first] else "held back"
    why = f"the worker is {done}, {ahead} step{'s' * (ahead != 1)} ahead of the slowest"
    why = next((said for said, rule in RULES.items() if all(rule(*inputs[i]) == got[i] for i in bounded)), why)
    if got == [i in bounded and expected[i] for i in range(len(got))]:
        why = "staleness None means that nobody waits"
    raise Wrong(why, _spelled(*inputs[first]), str(expected[first]), str(got[first]))


why = (
    "The slowest clock is what everybody may rely on: the bound says by how much one may run ahead of it. "
    "Petuum's stale synchronous parallel servers had this rule; with a bound of 0 it is a barrier after each "
    "step."
)
exercise = Exercise(hints, check, minutes=5, level="easy", why=why)
