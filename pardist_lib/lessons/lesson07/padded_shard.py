"""A rank's part of a padded flat parameter. Typical: rounded down, beyond the end, all padding on every rank."""

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, type_of
from ..exercises.watch import told, watched

hints = (
    "All n shards together must have room for numel elements: how long is the shortest shard that does it? "
    "-(-a // b) is a / b rounded up.",
    "Without regard to where the flat parameter ends the rank's shard is rank * length to (rank + 1) * length. Both "
    "can lie beyond numel: min(…, numel) cuts them off.",
    "What is missing to the full length is padding: length - (stop - start).",
)


def check(run):
    cases = [(8, 4), (10, 4), (7, 3), (5, 4), (3, 4), (0, 2), (6, 1), (1_000_003, 64)]
    [seen] = run(_all_shards, cases, n=1)
    for (numel, n), shards in zip(cases, seen.result, strict=True):
        for rank, got in enumerate(shards):
            at, expected = f"rank {rank}, {numel:,} elements on {n} rank{'s' * (n > 1)}", _shard(numel, rank, n)
            if not isinstance(got, (tuple, list)) or len(got) != 3:
                raise Wrong(f"it returns {type_of(got)}: three whole numbers (start, stop, padding) are asked for", at)
            if any(type(v) is not int for v in got) or tuple(got) != expected:
                raise Wrong(_why(numel, n, rank, tuple(got), expected), at, str(expected), str(got))


def _all_shards(answer, cases):
    return watched(lambda: [[told(answer, numel, rank, n) for rank in range(n)] for numel, n in cases])


def _shard(numel, rank, n):
    length = -(-numel // n)
    start, stop = min(rank * length, numel), min((rank + 1) * length, numel)
    return start, stop, length - (stop - start)


def _why(numel, n, rank, got, expected):
    (start, stop, padding), (right_start, right_stop, right_padding) = got, expected
    length, down = -(-numel // n), numel // n
    if strange := [v for v in got if type(v) is not int]:
        use = "use // instead of /" if isinstance(strange[0], float) else f"a {type_of(strange[0])} is among them"
        return f"whole numbers (int) are asked for: {use}"
    evenly = [sum(down + (r < numel % n) for r in range(until)) for until in (rank, rank + 1)]
    if n != 4 and got == _shard(numel, rank, 4):
        return f"this is right for 4 ranks, and here are {n}: is a 4 written into it?"
    if numel % n and stop - start == down and stop == (rank + 1) * down:
        return f"shards of {down} elements hold {n * down} of {numel}: the length has to be rounded up"
    if stop > numel:
        return f"stop is {stop}, but the flat parameter has {numel} elements: what lies beyond is padding"
    if start > stop:
        return f"start {start} is beyond stop {stop}: a shard of padding alone begins and ends at {numel}"
    if start == stop and right_start == numel:
        return f"a shard of padding alone begins and ends where the flat parameter does, at {numel}"
    if start == right_start and stop == right_stop - right_start != right_stop:
        return f"stop is where the shard ends in the flat parameter, at {right_stop}: {stop} is its length"
    if (start, stop) == (right_start, right_stop):
        if padding == n * length - numel:
            return f"padding {padding} is what the whole flat parameter needs: each shard has only its own part of it"
        if padding == stop - start:
            return f"the third number is the shard's length, {padding}: its padding, {right_padding}, is asked for"
        return f"start and stop are right, padding is not: shards are {length} long with it"
    if [start, stop] == evenly:
        return "this cuts the flat parameter evenly: with padding, every shard but the last ones is full"
    if start == right_start and stop == right_stop - 1:
        return "stop is one too small: flat[start:stop] does not include it"
    return f"with padding every shard is {length} long, and rank {rank}'s begins at {rank} · {length}"


why = (
    "All shards have the length of numel / n rounded up, and what is cut off at numel is padding. FSDP1 and DeepSpeed "
    "pad so, as NCCL's all-gather wants equal parts; FSDP2 pads each parameter's rows instead."
)
exercise = Exercise(hints, check, minutes=10, level="easy", why=why)
