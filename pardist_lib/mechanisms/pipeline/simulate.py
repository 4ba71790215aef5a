"""A schedule run in the head: each rank does its row, an action as soon as its rank is free and its inputs are there.

Everything here is plain numbers: nothing is computed or sent.
"""

import math


def waits_for(action, stages):
    """[(stage, kind, micro-batch) that have to be finished before this action]; "I" is half of a B, and stands for it.

    A forward needs the stage before; a backward its own forward and the stage behind; W needs its own I.
    """
    stage, kind, micro_batch = action
    if kind == "F":
        return [(stage - 1, "F", micro_batch)] if stage > 0 else []
    if kind == "W":
        return [(stage, "I", micro_batch)]
    behind = [(stage + 1, "I", micro_batch)] if stage < stages - 1 else []
    return [(stage, "F", micro_batch), *behind]


def run(schedule, seconds=None, message=0):
    """[[(action, start, end), …] of each rank], each rank as far as it can come: rows that end early are stuck.

    seconds: {(stage, kind): of one action}, none for 0; message: seconds on the way to another rank.
    """
    stages, rank_of = schedule.stages, schedule.rank_of
    finished, timed = {}, [[] for _ in schedule.rows]

    def can_start(action, rank):
        """The earliest time, or None where something that it waits for is not yet known to finish."""
        needs = waits_for(action, stages)
        if all(need in finished for need in needs):
            arrivals = [finished[need] + message * (rank_of[need[0]] != rank) for need in needs]
            free = timed[rank][-1][2] if timed[rank] else 0
            return max([free, *arrivals])

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.rows):
            for action in row[len(timed[rank]) :]:
                start = can_start(action, rank)
                if start is None:
                    break
                stage, kind, micro_batch = action
                end = start + (seconds[stage, kind] if seconds else 0)
                finished[stage, "I" if kind == "B" else kind, micro_batch] = end
                timed[rank].append((action, start, end))
                moved = True
    return timed


def most_held(row):
    """The most (stage, micro-batch) pairs between F and B or W at once, in one rank's row."""
    held = most = 0
    for action in row:
        held += (action.kind == "F") - (action.kind in "BW")
        most = max(most, held)
    return most


def seconds_of(schedule, F, I, W):  # noqa: E741
    """{(stage, kind): seconds of one action}. F, I, W: as of Schedule.times, whose errors these are."""
    rank_of = schedule.rank_of
    seconds = {}
    for kind, given in (("F", F), ("I", I), ("W", W)):
        whole = isinstance(given, str) or not hasattr(given, "__len__")
        if not whole and len(given) != schedule.stages:
            raise ValueError(
                f"{kind} has {len(given)} times for {schedule.stages} stages: one for each, or one for all"
            )
        for stage, rank in enumerate(rank_of):
            time = not_negative(kind, given if whole else given[stage])
            seconds[stage, kind] = time / rank_of.count(rank) if whole else time
    return seconds | {(s, "B"): seconds[s, "I"] + seconds[s, "W"] for s in range(schedule.stages)}


def seconds_of_ranks(schedule, F, I, W):  # noqa: E741
    """[seconds in which each rank computes, for one micro-batch]."""
    work = [0] * schedule.ranks
    for (stage, kind), seconds in seconds_of(schedule, F, I, W).items():
        work[schedule.rank_of[stage]] += seconds * (kind != "B")
    return work


def not_negative(name, time):
    """The time as it is. Raises ValueError where it is no finite number from 0 on."""
    try:
        good = math.isfinite(time) and time >= 0
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{name} is {time!r}: seconds are a finite number, 0 or more")
    return time
