"""Answers to shares_by_speed: wrong ones as people write them, and unusual right ones."""

import math

from pardist_lib.mechanisms import uneven
from tests.lessons.planted import mistake, right


@mistake("shares_by_speed", "each was rounded down, and what is left belongs to nobody")
def rounds_down(rows, speeds):
    return [int(rows * v / sum(speeds)) for v in speeds]


@mistake("shares_by_speed", "each was rounded by itself")
def rounds_each(rows, speeds):
    return [round(rows * v / sum(speeds)) for v in speeds]


@mistake("shares_by_speed", "each was rounded up")
def rounds_up(rows, speeds):
    return [math.ceil(rows * v / sum(speeds)) for v in speeds]


@mistake("shares_by_speed", "equal shares: the speeds are ignored")
def ignores_speeds(rows, speeds):
    return [rows // len(speeds) + (r < rows % len(speeds)) for r in range(len(speeds))]


@mistake("shares_by_speed", "the shares follow the time for a row, not the speed")
def upside_down(rows, speeds):
    return greedy(rows, [1 / v for v in speeds])


def greedy(rows, speeds):
    shares = [0] * len(speeds)
    for _ in range(rows):
        shares[min(range(len(speeds)), key=lambda r: (shares[r] + 1) / speeds[r])] += 1
    return shares


@mistake("shares_by_speed", "what was left over went to the last rank")
def the_rest_to_the_last(rows, speeds):
    shares = [int(rows * v / sum(speeds)) for v in speeds]
    shares[-1] += rows - sum(shares)
    return shares


@mistake("shares_by_speed", "what was left over went to the first rank")
def the_rest_to_the_first(rows, speeds):
    shares = [int(rows * v / sum(speeds)) for v in speeds]
    shares[0] += rows - sum(shares)
    return shares


@mistake("shares_by_speed", "a share is not an int")
def leaves_fractions(rows, speeds):
    return [rows * v / sum(speeds) for v in speeds]


@mistake("shares_by_speed", "all rows went to the fastest rank")
def all_to_the_fastest(rows, speeds):
    return [rows * (r == speeds.index(max(speeds))) for r in range(len(speeds))]


@mistake("shares_by_speed", "the largest remainders")
def largest_remainders(rows, speeds):
    exact = [rows * v / sum(speeds) for v in speeds]
    shares = [int(x) for x in exact]
    order = sorted(range(len(speeds)), key=lambda r: shares[r] - exact[r])
    for r in order[: rows - sum(shares)]:
        shares[r] += 1
    return shares


@mistake("shares_by_speed", "rounded, and the last rank takes what is left")
def rounds_all_but_the_last(rows, speeds):
    shares = [round(rows * v / sum(speeds)) for v in speeds[:-1]]
    return [*shares, rows - sum(shares)]


@mistake("shares_by_speed", "done first without it")
def to_whoever_is_done(rows, speeds):
    shares = [int(rows * v / sum(speeds)) for v in speeds]
    while sum(shares) < rows:
        shares[min(range(len(speeds)), key=lambda r: shares[r] / speeds[r])] += 1
    return shares


@mistake("shares_by_speed", "every rank gets a row at least")
def one_for_everybody(rows, speeds):
    shares = [min(1, rows) if len(speeds) <= rows else 0 for _ in speeds]
    while sum(shares) < rows:
        shares[min(range(len(speeds)), key=lambda r: (shares[r] + 1) / speeds[r])] += 1
    return shares


@mistake("shares_by_speed", "the course's own `shares_of`")
def takes_the_courses(rows, speeds):
    return uneven.shares_of(rows, speeds)


@right("shares_by_speed")
def floors_and_the_rest(rows, speeds):
    shares = [int(rows * v / sum(speeds)) for v in speeds]
    while sum(shares) < rows:
        r = min(range(len(speeds)), key=lambda r: (shares[r] + 1) / speeds[r])
        shares[r] += 1
    return shares


@right("shares_by_speed")
def by_deadlines(rows, speeds):
    ends = sorted((k / v, r) for r, v in enumerate(speeds) for k in range(1, rows + 1))[:rows]
    return [sum(r == who for _, who in ends) for r in range(len(speeds))]
