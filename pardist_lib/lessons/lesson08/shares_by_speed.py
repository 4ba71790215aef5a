"""shares_by_speed: whole rows by speed, so that the last rank ends soonest; what rounding leaves over goes astray."""

import math

import torch

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, type_of
from ..exercises.runs import results

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
        (100, [3.0, 3.0, 3.0, 1.0]), (37, [4.0, 11.0, 10.0, 1.5, 9.0]), (8, [1.0] * 4), (10, [1.0, 1.0, 1.0]),
        (64, [5.0, 2.0, 9.0, 1.0]), (7, [100.0, 1.0, 1.0]), (30, [0.5, 0.25, 0.75]), (1, [2.0, 3.0]), (0, [1.0, 2.0]),
        (12, [4.0]), (5, [3.0] * 7), (9, [2.4, 2.4, 1.2]), (23, [7.0, 1.0, 1.0, 1.0]),
    ]  # fmt: skip
    labels = [f"{rows} rows, speeds {speeds}" for rows, speeds in inputs]
    got = results(run, inputs, labels, "`speeds` has changed: work on a new list")
    for (rows, speeds), shares, label in zip(inputs, got, labels, strict=True):
        if isinstance(shares, torch.Tensor):
            shares = shares.tolist()
        if not isinstance(shares, (list, tuple)):
            raise Wrong(f"it returns {type_of(shares)}: a list with one number a rank is asked for", label)
        if len(shares) != len(speeds):
            raise Wrong(f"{len(shares)} shares for {len(speeds)} ranks", label)
        if any(isinstance(s, bool) or not isinstance(s, int) for s in shares):
            raise Wrong("a share is not an int: half a row cannot be computed", label, got=str(list(shares)))
        best = _row_by_row(rows, speeds)
        if trouble := _trouble(rows, speeds, list(shares), best):
            raise Wrong(trouble, label, f"{best} (or another that ends as early)", str(list(shares)))


def _row_by_row(rows, speeds, shares=None, counted=1):
    """Each row to the rank that is done first with it; counted=0: to the one that is done first without it."""
    shares = list(shares or [0] * len(speeds))
    while sum(shares) < rows:
        shares[min(range(len(speeds)), key=lambda r: (shares[r] + counted) / speeds[r])] += 1
    return shares


def _trouble(rows, speeds, got, best):
    """What is wrong with these shares, in one sentence; None where they end as early as can be."""
    n, exact = len(speeds), [rows * v / sum(speeds) for v in speeds]
    floors, rounded = [int(x) for x in exact], [round(x) for x in exact]
    if min(got) < 0:
        return "a share is negative"
    if sum(got) != rows:
        known = [
            (": each was rounded down, and what is left belongs to nobody", floors),
            (": each was rounded by itself", rounded),
            (": each was rounded up", [math.ceil(x) for x in exact]),
            (": with at least one row each, others have to give", [max(1, x) for x in rounded]),
            (": with at least one row each, others have to give", [max(1, x) for x in floors]),
            (": equal shares, rounded down", [rows // n] * n),
        ]
        return f"the shares add up to {sum(got)}, not to {rows}" + _reason(known, got)
    last, soonest = (max(s / v for s, v in zip(shares, speeds, strict=True)) for shares in (got, best))
    if last <= soonest * (1 + 1e-9):
        return None
    if min(got) > 0 and 0 in best:
        return "every rank gets a row at least, and the others wait for a slow one: it may get none"
    left, ranks = rows - sum(floors), range(n)
    by_fraction = sorted(ranks, key=lambda r: floors[r] - exact[r])
    by_time = [rows / v / sum(1 / u for u in speeds) for v in speeds]

    def near(shares):
        return all(abs(s - x) <= n for s, x in zip(got, shares, strict=True))

    def one_each(favoured):
        return [f + (r in favoured[:left]) for r, f in enumerate(floors)]

    def all_to(lucky):
        return [f + left * (r == lucky) for r, f in enumerate(floors)]

    fastest, slowest = speeds.index(max(speeds)), speeds.index(min(speeds))
    behind = "what was left over went to the rank that is done first without it: look at when it would be done with it"
    known = [
        (behind, _row_by_row(rows, speeds, counted=0)),
        (behind, _row_by_row(rows, speeds, floors, counted=0)),
        ("equal shares: the speeds are ignored", [rows // n + (r < rows % n) for r in ranks]),
        ("the shares follow the time for a row, not the speed: the slowest gets most",
         got if near(by_time) and not near(exact) else None),
        ("what was left over went to the last rank", all_to(n - 1)),
        ("what was left over went to the first rank", all_to(0)),
        ("what was left over went to the first ranks", one_each(ranks)),
        ("what was left over went to the largest remainders, which is fair, but does not end soonest: look at "
         "(share + 1) / speed", one_each(by_fraction)),
        ("what was left over went to the fastest rank", all_to(fastest)),
        ("what was left over went to the slowest rank", all_to(slowest)),
        ("all rows went to the fastest rank: the others help", [rows * (r == fastest) for r in ranks]),
        ("rounded, and the last rank takes what is left", [*rounded[:-1], rows - sum(rounded[:-1])]),
    ]  # fmt: skip
    return _reason(known, got) or f"another split ends sooner: this one takes {last:.4g} s"


def _reason(known, got):
    return next((why for why, shares in known if shares == got), "")


WHY = (
    "Each row goes to whoever would be done first with it, so no other split ends sooner. DDP's sampler knows "
    "equal shares only; there is no ready-made part for speeds in PyTorch."
)

exercise = Exercise(hints, check, minutes=15, level="medium", why=WHY)
