"""Answers to fewest_ranks: wrong ones as people write them, and unusual right ones."""

import math

from tests.lessons.planted import mistake, right

SHARED = (0, 12, 14, 16)


@mistake("fewest_ranks", "round up")
def rounds_down_ranks(parameters, memory, stage):
    shared = SHARED[stage] * parameters
    room = memory - (16 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return max(1, shared // room) if room > 0 else None


@mistake("fewest_ranks", "one more than is needed")
def adds_one(parameters, memory, stage):
    shared = SHARED[stage] * parameters
    room = memory - (16 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return shared // room + 1 if room > 0 else None


@mistake("fewest_ranks", "≤, not <")
def strictly_less(parameters, memory, stage):
    shared = SHARED[stage] * parameters
    room = memory - 1 - (16 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return -(-shared // room) if room > 0 else None


@mistake("fewest_ranks", "only powers of two are tried")
def doubles(parameters, memory, stage):
    for k in range(40):
        if (16 - SHARED[stage]) * parameters * 2**k + SHARED[stage] * parameters <= memory * 2**k:
            return 2**k
    return None


@mistake("fewest_ranks", "only stage 3 does that")
def all_of_it(parameters, memory, stage):
    return -(-16 * parameters // memory)


@mistake("fewest_ranks", "the stages are one too low")
def shifted(parameters, memory, stage):
    shared = (0, 0, 12, 14)[stage] * parameters
    room = memory - (16 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return -(-shared // room) if room > 0 else None


@mistake("fewest_ranks", "18 bytes a parameter")
def eighteen(parameters, memory, stage):
    shared = (0, 12, 16, 18)[stage] * parameters
    room = memory - (18 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return -(-shared // room) if room > 0 else None


@mistake("fewest_ranks", "4 + 4 + 8")
def in_float32(parameters, memory, stage):
    shared = (0, 8, 12, 16)[stage] * parameters
    room = memory - (16 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return -(-shared // room) if room > 0 else None


@mistake("fewest_ranks", "are left out")
def shares_alone(parameters, memory, stage):
    if stage == 0:
        return 1 if 16 * parameters <= memory else None
    return math.ceil(SHARED[stage] * parameters / memory)


@mistake("fewest_ranks", "it is 1 or None")
def ranks_for_stage_0(parameters, memory, stage):
    shared = SHARED[stage] * parameters
    room = memory - (16 * parameters - shared)
    if not shared:
        return math.ceil(16 * parameters / memory)
    return -(-shared // room) if room > 0 else None


@mistake("fewest_ranks", "a whole number of ranks, or None, is asked for")
def a_fraction(parameters, memory, stage):
    shared = SHARED[stage] * parameters
    room = memory - (16 * parameters - shared)
    return shared / room if room > 0 else None


@mistake("fewest_ranks", "no number of ranks is enough here")
def never_none(parameters, memory, stage):
    shared = SHARED[stage] * parameters
    room = memory - (16 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return -(-shared // room) if room > 0 else 10**9


@mistake("fewest_ranks", "is there a largest number that is tried?")
def up_to_a_thousand(parameters, memory, stage):
    shared = SHARED[stage]
    fits = (n for n in range(1, 1025) if (16 - shared) * parameters * n + shared * parameters <= memory * n)
    return next(fits, None)


@right("fewest_ranks")
def of_whole_parameters(parameters, memory, stage):
    def held(n):
        return (16 - SHARED[stage]) * parameters + SHARED[stage] * -(-parameters // n)

    return next((n for n in range(1, 100_000) if held(n) <= memory), None)


@right("fewest_ranks")
def by_searching(parameters, memory, stage):
    def fits(n):
        return (16 - SHARED[stage]) * parameters * n + SHARED[stage] * parameters <= memory * n

    n = 1
    while not fits(n):
        n *= 2
        if n > 10**15:
            return None
    low = n // 2
    while n - low > 1:
        middle = (low + n) // 2
        low, n = (low, middle) if fits(middle) else (middle, n)
    return n
