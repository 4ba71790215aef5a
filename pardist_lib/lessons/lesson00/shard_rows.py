"""The exercise shard_rows."""

import math
from collections import Counter

from pardist_lib.ranks.report import plural

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong
from ..exercises.watch import Other, watched

hints = (
    "Start with a number of rows that the ranks share evenly: where does rank 1 begin if each one gets k rows?",
    "n // world_size rows each leave n % world_size rows over: the first ranks can take one more, and then every "
    "later rank begins that much further on.",
    "Without any case distinction: rank r begins at n * r // world_size, and ends where rank r + 1 begins.",
)


def check(run):
    cases = [(8, 4), (10, 4), (7, 3), (3, 4), (5, 1), (0, 2), (1797, 8), (61, 7), (15, 11), (122, 7)]
    [seen] = run(_all_shards, cases, n=1)
    for (n, world_size), shards in zip(cases, seen.result, strict=True):
        try:
            _judge_shards(n, world_size, shards)
        except Wrong as wrong:
            if (n, world_size) == (7, 3):  # the first without 4 ranks
                wrong.diagnosis = f"it works with 4 ranks, but not with 3 (is a 4 written into it?): {wrong.diagnosis}"
            raise


def _all_shards(answer, cases):
    return watched(lambda: [[answer(n, rank, size) for rank in range(size)] for n, size in cases])


def _judge_shards(n, world_size, shards):
    about = f"{n} rows on {world_size} rank{'s' * (world_size > 1)}"
    for rank, rows in enumerate(shards):
        if not isinstance(rows, (range, slice)):
            kind = rows.type if isinstance(rows, Other) else type(rows).__name__
            what = "nothing, and" if rows is None else f"{rows!r:.60} ({kind}):"
            raise Wrong(f"it returns {what} a range is asked for", f"rank {rank}, {about}")
    shards = [range(*rows.indices(n)) if isinstance(rows, slice) else rows for rows in shards]
    sizes, owners = [len(rows) for rows in shards], Counter(row for rows in shards for row in rows)
    shown = {"expected": "each row once, sizes at most 1 apart", "got": ", ".join(map(_written, shards[:8]))}
    missing = sorted(set(range(n)) - set(owners))
    outside = sorted(set(owners) - set(range(n)))
    doubled = sorted(row for row, count in owners.items() if count > 1)
    if owners and world_size > 1 and len(set(map(tuple, shards))) == 1:
        raise Wrong("every rank gets the same rows: rank is not used", about, **shown)
    if (doubled or missing or outside) and shards in _by_floats(n, world_size):
        raise Wrong(
            "n / world_size is a float, and times the rank it rounds to a neighbouring row: use //", about, **shown
        )
    if doubled:
        who = plural([rank for rank, rows in enumerate(shards) if doubled[0] in rows])
        everywhere = all(len(set(a) & set(b)) == 1 for a, b in zip(shards, shards[1:], strict=False))
        why = "a range's stop is not part of it" if everywhere else "each rank begins where the one before it ends"
        raise Wrong(f"row {doubled[0]} belongs to {who}: {why}", about, **shown)
    if outside:
        raise Wrong(f"there is no row {outside[0]}: the last shard runs over the end of {n} rows", about, **shown)
    if missing:
        lost = f"row {missing[0]} belongs" if len(missing) == 1 else f"{_rows_in_words(missing)} belong"
        at_the_end = missing == list(range(n // world_size * world_size, n)) and set(sizes) == {n // world_size}
        ends = [rows.stop for rows in shards if rows.step == 1]
        why = ": n // world_size rows each leave the remainder out" if at_the_end else ""
        if missing == sorted(set(ends)) and ends[-1] == n - 1:
            why = ": each shard ends one early (a range already leaves out its end)"
        raise Wrong(f"{lost} to no rank{why}", about, **shown)
    if max(sizes) - min(sizes) > 1:
        why = f"sizes {', '.join(map(str, sizes))} are more than 1 apart"
        if sizes[-1] == max(sizes) and len(set(sizes[:-1])) == 1:
            why += ": the last rank takes all that is left over"
        elif sizes[0] == -(-n // world_size):
            why += ": every rank but the last rounds up, and the last ones get what remains"
        raise Wrong(why, about, **shown)


def _by_floats(n, world_size):
    """What people get who divide by / before they multiply."""
    share = n / world_size
    return [
        [range(whole(rank * share), whole((rank + 1) * share)) for rank in range(world_size)]
        for whole in (int, round, math.ceil)
    ]


def _rows_in_words(rows):
    if rows[-1] - rows[0] + 1 == len(rows):
        return f"rows {rows[0]} to {rows[-1]}"
    return "rows " + ", ".join(map(str, rows[:8])) + ", …" * (len(rows) > 8)


def _written(rows):
    return f"{rows.start}:{rows.stop}" + (f":{rows.step}" if rows.step != 1 else "") if len(rows) else "none"


exercise = Exercise(hints, check)
