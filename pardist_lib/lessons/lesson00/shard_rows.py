"""shard_rows: each row to one rank, sizes at most 1 apart. Typically wrong: where the ranks do not divide the rows."""

import math
from collections import Counter
from itertools import pairwise

from pardist_lib.ranks.report import plural

from ..exercises.cases import what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, type_of
from ..exercises.watch import told, watched

hints = (
    "Start with a number of rows that the ranks share evenly: where does rank 1 begin if each one gets k rows?",
    "n // world_size rows each leave n % world_size rows over: the first ranks can take one more, and then every "
    "later rank begins that much further on.",
    "Without any case distinction: rank r begins at n * r // world_size, and ends where rank r + 1 begins.",
)


def check(run):
    cases = [(8, 4), (10, 4), (7, 3), (3, 4), (5, 1), (0, 2), (1797, 8), (61, 7), (15, 11), (122, 7)]
    [seen] = run(_all_shards, cases, n=1)
    for case, shards in zip(cases, seen.result, strict=True):
        with what_is_new("it works with 4 ranks, but not with 3 (is a 4 written into it?)" * (case == (7, 3))):
            _judge(*case, shards)


def _all_shards(answer, cases):
    return watched(lambda: [[told(answer, n, rank, size) for rank in range(size)] for n, size in cases])


def _judge(n, world_size, shards):
    about = f"{n} rows on {world_size} rank{'s' * (world_size > 1)}"
    for rank, rows in enumerate(shards):
        if not isinstance(rows, (range, slice)):
            what = "nothing, and" if rows is None else f"{rows!r:.60} ({type_of(rows)}):"
            raise Wrong(f"it returns {what} a range is asked for", f"rank {rank}, {about}")
    shards = [range(*rows.indices(n)) if isinstance(rows, slice) else rows for rows in shards]
    sizes, owners = [len(rows) for rows in shards], Counter(row for rows in shards for row in rows)
    missing, outside = sorted(set(range(n)) - set(owners)), sorted(set(owners) - set(range(n)))
    doubled = sorted(row for row, count in owners.items() if count > 1)
    ends = [rank * (n / world_size) for rank in range(world_size + 1)]
    by_floats = [[range(whole(x), whole(y)) for x, y in pairwise(ends)] for whole in (int, round, math.ceil)]
    if owners and world_size > 1 and len(set(map(tuple, shards))) == 1:
        why = "every rank gets the same rows: rank is not used"
    elif (doubled or missing or outside) and shards in by_floats:
        why = "n / world_size is a float, and times the rank it rounds to a neighbouring row: use //"
    elif doubled:
        everywhere = all(len(set(a) & set(b)) == 1 for a, b in zip(shards, shards[1:], strict=False))
        why = f"row {doubled[0]} belongs to {plural([r for r, rows in enumerate(shards) if doubled[0] in rows])}: "
        why += "a range's stop is not part of it" if everywhere else "each rank begins where the one before it ends"
    elif outside:
        why = f"there is no row {outside[0]}: the last shard runs over the end of {n} rows"
    elif missing:
        why = f"{_in_words(missing)} to no rank"
        ends = [rows.stop for rows in shards if rows.step == 1]
        if missing == sorted(set(ends)) and ends[-1] == n - 1:
            why += ": each shard ends one early (a range already leaves out its end)"
        elif missing == list(range(n // world_size * world_size, n)) and set(sizes) == {n // world_size}:
            why += ": n // world_size rows each leave the remainder out"
    elif max(sizes) - min(sizes) > 1:
        why = f"sizes {', '.join(map(str, sizes))} are more than 1 apart"
        if sizes[-1] == max(sizes) and len(set(sizes[:-1])) == 1:
            why += ": the last rank takes all that is left over"
        elif sizes[0] == -(-n // world_size):
            why += ": every rank but the last rounds up, and the last ones get what remains"
    else:
        return
    raise Wrong(why, about, "each row once, sizes at most 1 apart", ", ".join(map(_written, shards[:8])))


def _in_words(rows):
    if len(rows) == 1:
        return f"row {rows[0]} belongs"
    if rows[-1] - rows[0] + 1 == len(rows):
        return f"rows {rows[0]} to {rows[-1]} belong"
    return f"rows {', '.join(map(str, rows[:8]))}{', …' * (len(rows) > 8)} belong"


def _written(rows):
    return f"{rows.start}:{rows.stop}" + (f":{rows.step}" if rows.step != 1 else "") if len(rows) else "none"


WHY = (
    "Every row has one owner, and shares differ by one row at most, so that no rank waits long for another. "
    "torch's DistributedSampler makes them equal instead: it repeats some rows, or leaves some out, and deals the "
    "rest in turn."
)
exercise = Exercise(hints, check, minutes=10, level="easy", why=WHY)
