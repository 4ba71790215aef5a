"""The exercise shares_by_speed."""

import math

import torch

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, type_of
from ..exercises.watch import plain, watched
from .shared import unsent

hints = (
    "rows * speed / sum(speeds) is right but for the rounding, and rounding is all the trouble: the whole numbers "
    "have to add up to rows.",
    "Begin with what is surely right, int(rows * v / sum(speeds)), rounded down. A few rows are left, fewer than "
    "there are ranks.",
    "Give those one by one to the rank that would be done first with one more: the smallest (share + 1) / speed. "
    "(Or give away all rows like that, from the start.)",
)


def check(run):
    inputs = [
        (100, [3.0, 3.0, 3.0, 1.0]), (37, [4.0, 11.0, 10.0, 1.5, 9.0]), (8, [1.0] * 4),
        (10, [1.0, 1.0, 1.0]), (64, [5.0, 2.0, 9.0, 1.0]),
        (7, [100.0, 1.0, 1.0]), (30, [0.5, 0.25, 0.75]), (1, [2.0, 3.0]), (0, [1.0, 2.0]), (12, [4.0]),
        (5, [3.0] * 7), (9, [2.4, 2.4, 1.2]), (23, [7.0, 1.0, 1.0, 1.0]),
    ]  # fmt: skip
    [seen] = run(_shares, inputs, n=1)
    unsent(seen)
    for (rows, speeds), got, kept in zip(inputs, seen.result, seen.kept, strict=True):
        label = f"{rows} rows, speeds {speeds}"
        if not kept:
            raise Wrong("`speeds` has changed: work on a new list", label)
        if isinstance(got, torch.Tensor):
            got = got.tolist()
        if not isinstance(got, (list, tuple)):
            raise Wrong(f"it returns {type_of(got)}: a list with one number a rank is asked for", label)
        if len(got) != len(speeds):
            raise Wrong(f"{len(got)} shares for {len(speeds)} ranks", label)
        if any(isinstance(s, bool) or not isinstance(s, int) for s in got):
            raise Wrong("a share is not an int: half a row cannot be computed", label, got=str(list(got)))
        _judge_shares(rows, speeds, list(got), label)


def _shares(answer, inputs):
    given = [(rows, list(speeds)) for rows, speeds in inputs]
    seen = watched(lambda: [plain(answer(*args)) for args in given])
    seen.kept = [tuple(map(_tupled, a)) == tuple(map(_tupled, b)) for a, b in zip(given, inputs, strict=True)]
    return seen


def _tupled(value):
    return tuple(value) if isinstance(value, list) else value


def _best(rows, speeds):
    shares = [0] * len(speeds)
    for _ in range(rows):
        r = min(range(len(speeds)), key=lambda r: (shares[r] + 1) / speeds[r])
        shares[r] += 1
    return shares


def _by_end(rows, speeds, shares):
    """Row by row to whoever is done first, as it is *before* the row."""
    shares = list(shares)
    while sum(shares) < rows:
        shares[min(range(len(speeds)), key=lambda r: shares[r] / speeds[r])] += 1
    return shares


def _judge_shares(rows, speeds, got, label):
    n, whole, best = len(speeds), sum(speeds), _best(rows, speeds)
    exact, slow = [rows * v / whole for v in speeds], [rows / v / sum(1 / u for u in speeds) for v in speeds]
    floors = [int(x) for x in exact]
    left = rows - sum(floors)
    shown = {"expected": f"{best} (or another that ends as early)", "got": str(got)}
    if min(got) < 0:
        raise Wrong("a share is negative", label, **shown)
    if sum(got) != rows:
        why = f"the shares add up to {sum(got)}, not to {rows}"
        if got == floors:
            why += ": each was rounded down, and what is left belongs to nobody"
        elif got == [round(x) for x in exact]:
            why += ": each was rounded by itself"
        elif got == [math.ceil(x) for x in exact]:
            why += ": each was rounded up"
        elif got == [max(1, round(x)) for x in exact] or got == [max(1, x) for x in floors]:
            why += ": with at least one row each, others have to give"
        elif got == [rows // n] * n:
            why += ": equal shares, rounded down"
        raise Wrong(why, label, **shown)
    last = max(s / v for s, v in zip(got, speeds, strict=True))
    if last <= max(s / v for s, v in zip(best, speeds, strict=True)) * (1 + 1e-9):
        return
    by_place = [floors[r] + (r < left) for r in range(n)]
    fractions = sorted(range(n), key=lambda r: -(exact[r] - floors[r]))
    by_fraction = [floors[r] + (r in fractions[:left]) for r in range(n)]
    equal = [rows // n + (r < rows % n) for r in range(n)]
    known = [
        ("equal shares: the speeds are ignored", equal),
        ("the shares follow the time for a row, not the speed: the slowest gets most", None),
        ("what was left over went to the last rank", [*floors[:-1], rows - sum(floors[:-1])]),
        ("what was left over went to the first rank", [rows - sum(floors[1:]), *floors[1:]]),
        ("what was left over went to the first ranks", by_place),
        ("what was left over went to the largest remainders, which is fair, but does not end soonest: look at "
         "(share + 1) / speed", by_fraction),
    ]  # fmt: skip
    fastest, slowest = speeds.index(max(speeds)), speeds.index(min(speeds))
    known += [
        ("what was left over went to the fastest rank", [f + left * (r == fastest) for r, f in enumerate(floors)]),
        ("what was left over went to the slowest rank", [f + left * (r == slowest) for r, f in enumerate(floors)]),
        ("all rows went to the fastest rank: the others help", [rows * (r == fastest) for r in range(n)]),
        ("rounded, and the last rank takes what is left",
         [*(round(x) for x in exact[:-1]), rows - sum(round(x) for x in exact[:-1])]),
    ]  # fmt: skip
    if min(got) > 0 and 0 in best:
        raise Wrong(
            "every rank gets a row at least, and the others wait for a slow one: it may get none", label, **shown
        )
    behind = "what was left over went to the rank that is done first without it: look at when it would be done with it"
    known = [(behind, _by_end(rows, speeds, [0] * n)), (behind, _by_end(rows, speeds, floors)), *known]
    for why, shares in known:
        if shares is None and max(abs(s - x) for s, x in zip(got, slow, strict=True)) <= n:
            if max(abs(s - x) for s, x in zip(got, exact, strict=True)) > n:
                raise Wrong(why, label, **shown)
        elif got == shares:
            raise Wrong(why, label, **shown)
    raise Wrong(f"another split ends sooner: this one takes {last:.4g} s", label, **shown)


exercise = Exercise(hints, check)
