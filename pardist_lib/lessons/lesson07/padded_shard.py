"""The exercise padded_shard."""

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, type_of
from ..exercises.watch import watched

hints = (
    "All n shards together must have room for numel elements: how long is the shortest shard that does it? "
    "-(-a // b) is a / b rounded up.",
    "Without regard to the end of the line the rank's shard is rank * length to (rank + 1) * length. Both can lie "
    "beyond numel: min(…, numel) cuts them off.",
    "What is missing to the full length is padding: length - (stop - start).",
)


def check(run):
    cases = [(8, 4), (10, 4), (7, 3), (5, 4), (3, 4), (0, 2), (6, 1), (1_000_003, 64)]
    [seen] = run(_all_shards, cases, n=1)
    for (numel, n), shards in zip(cases, seen.result, strict=True):
        _judge_shards(numel, n, shards)


def _all_shards(answer, cases):
    return watched(lambda: [[answer(numel, rank, n) for rank in range(n)] for numel, n in cases])


def _judge_shards(numel, n, shards):
    length = -(-numel // n)
    right = [(min(r * length, numel), min((r + 1) * length, numel)) for r in range(n)]
    right = [(start, stop, length - (stop - start)) for start, stop in right]
    for rank, (got, want) in enumerate(zip(shards, right, strict=True)):
        where = f"rank {rank}, {numel:,} elements on {n} rank{'s' * (n > 1)}"
        shown = {"expected": str(want), "got": str(got)}
        if not isinstance(got, (tuple, list)) or len(got) != 3:
            raise Wrong(f"it returns {type_of(got)}: three whole numbers (start, stop, padding) are asked for", where)
        if strange := [v for v in got if not isinstance(v, int) or isinstance(v, bool)]:
            use = "use // instead of /" if isinstance(strange[0], float) else f"a {type_of(strange[0])} is among them"
            raise Wrong(f"whole numbers (int) are asked for: {use}", where, **shown)
        if tuple(got) != want:
            raise Wrong(_why(numel, n, rank, got, want, length), where, **shown)


def _why(numel, n, rank, got, want, length):
    start, stop, padding = got
    down, (start_wanted, stop_wanted, _) = numel // n, want
    four = -(-numel // 4)
    if n != 4 and tuple(got) == (a := min(rank * four, numel), b := min(a + four, numel), four - (b - a)):
        return f"this is right for 4 ranks, and here are {n}: is a 4 written into it?"
    if numel % n and stop - start == down and length > down and stop == (rank + 1) * down:
        return f"shards of {down} elements hold {n * down} of {numel}: the length has to be rounded up"
    if stop > numel:
        return f"stop is {stop}, but the line has {numel} elements: what lies beyond is padding"
    if start > stop:
        return f"start {start} is beyond stop {stop}: a shard of padding alone begins and ends at {numel}"
    if start == stop and start_wanted == numel:
        return f"a shard of padding alone begins and ends at the line's end, at {numel}"
    if start == start_wanted and stop == stop_wanted - start_wanted != stop_wanted:
        return f"stop is where the shard ends on the line, at {stop_wanted}: {stop} is its length"
    if (start, stop) == (start_wanted, stop_wanted):
        if padding == n * length - numel:
            return f"padding {padding} is what the whole line needs: each shard has only its own part of it"
        if padding == stop - start:
            return f"the third number is the shard's length, {padding}: its padding, {want[2]}, is asked for"
        return f"start and stop are right, padding is not: shards are {length} long with it"
    uneven = [down + (r < numel % n) for r in range(n)]
    if (start, stop) == (sum(uneven[:rank]), sum(uneven[: rank + 1])):
        return "this cuts the line evenly: with padding, every shard but the last ones is full"
    if start == start_wanted and stop == stop_wanted - 1:
        return "stop is one too small: line[start:stop] does not include it"
    return f"with padding every shard is {length} long, and rank {rank}'s begins at {rank} · {length}"


exercise = Exercise(hints, check)
