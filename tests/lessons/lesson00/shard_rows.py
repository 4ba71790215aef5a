"""Wrong answers to shard_rows, as people really write them, and unusual right ones."""

import numpy as np
import torch

from tests.lessons.planted import mistake, right


@mistake("shard_rows", "rows 8 to 9 belong to no rank: n // world_size rows each leave the remainder out")
def drops_the_remainder(n, rank, world_size):
    each = n // world_size
    return range(rank * each, (rank + 1) * each)


@mistake("shard_rows", "every rank but the last rounds up")
def rounds_up(n, rank, world_size):
    each = -(-n // world_size)
    return range(min(n, rank * each), min(n, (rank + 1) * each))


@mistake("shard_rows", "there is no row 10: the last shard runs over the end of 10 rows")
def runs_over_the_end(n, rank, world_size):
    each = -(-n // world_size)
    return range(rank * each, (rank + 1) * each)


@mistake("shard_rows", "the last rank takes all that is left over")
def last_takes_the_rest(n, rank, world_size):
    each = n // world_size
    return range(rank * each, n if rank == world_size - 1 else (rank + 1) * each)


@mistake("shard_rows", "row 2 belongs to ranks 0, 1: a range's stop is not part of it")
def stop_belongs_to_it(n, rank, world_size):
    return range(n * rank // world_size, min(n, n * (rank + 1) // world_size + 1))


@mistake("shard_rows", "every rank gets the same rows: rank is not used")
def same_rows_for_all(n, rank, world_size):
    return range(n // world_size)


@mistake("shard_rows", "(int): a range is asked for")
def how_many(n, rank, world_size):
    return n // world_size + (rank < n % world_size)


@mistake("shard_rows", "(tuple): a range is asked for")
def start_and_stop(n, rank, world_size):
    return n * rank // world_size, n * (rank + 1) // world_size


@mistake("shard_rows", "belongs to ranks 0, 1")
def forgets_that_later_ones_move_on(n, rank, world_size):
    each, left = divmod(n, world_size)
    return range(rank * each, (rank + 1) * each + (rank < left))


@mistake("shard_rows", "is a float, and times the rank it rounds to a neighbouring row: use //")
def divides_into_floats(n, rank, world_size):
    return range(int(rank * (n / world_size)), int((rank + 1) * (n / world_size)))


@mistake("shard_rows", "is a float, and times the rank it rounds to a neighbouring row: use //")
def divides_into_floats_first(n, rank, world_size):
    each = n / world_size
    return range(int(each * rank), int(each * rank + each))


@mistake("shard_rows", "rows 1, 3, 5, 7 belong to no rank: each shard ends one early")
def leaves_out_the_end_twice(n, rank, world_size):
    return range(n * rank // world_size, n * (rank + 1) // world_size - 1)


@mistake("shard_rows", "it returns nothing, and a range is asked for: did you print it instead of returning it?")
def prints_it(n, rank, world_size):
    print(range(n * rank // world_size, n * (rank + 1) // world_size))


@right("shard_rows")
def every_nth(n, rank, world_size):
    return range(rank, n, world_size)


@right("shard_rows")
def a_slice(n, rank, world_size):
    each, left = divmod(n, world_size)
    start = rank * each + min(rank, left)
    return slice(start, start + each + (rank < left))


@right("shard_rows")
def by_numpy(n, rank, world_size):
    rows = np.array_split(np.arange(n), world_size)[rank]
    return range(int(rows[0]), int(rows[-1]) + 1) if len(rows) else range(0)


@mistake("shard_rows", "there are fewer parts than ranks: torch.chunk can give fewer")
def chunks(n, rank, world_size):
    rows = torch.arange(n).chunk(world_size)[rank]
    return range(int(rows[0]), int(rows[-1]) + 1)
