"""Wrong answers to padded_shard, as people really write them, and unusual right ones."""

import math

import torch

from tests.lessons.planted import mistake, right


@mistake("padded_shard", "shards of 2 elements hold 8 of 10: the length has to be rounded up")
def rounds_down(numel, rank, n):
    length = numel // n
    return rank * length, (rank + 1) * length, 0


@mistake("padded_shard", "stop is 12, but the flat parameter has 10 elements: what lies beyond is padding")
def runs_over(numel, rank, n):
    length = -(-numel // n)
    return rank * length, (rank + 1) * length, max(0, (rank + 1) * length - numel)


@mistake("padded_shard", "padding 2 is what the whole flat parameter needs: each shard has only its own part of it")
def all_the_padding(numel, rank, n):
    length = -(-numel // n)
    return min(rank * length, numel), min((rank + 1) * length, numel), n * length - numel


@mistake("padded_shard", "start 6 is beyond stop 5: a shard of padding alone begins and ends at 5")
def start_is_not_cut_off(numel, rank, n):
    length = -(-numel // n)
    stop = min((rank + 1) * length, numel)
    return rank * length, stop, length - max(0, stop - rank * length)


@mistake("padded_shard", "this cuts the flat parameter evenly: with padding, every shard but the last ones is full")
def without_padding(numel, rank, n):
    sizes = [numel // n + (r < numel % n) for r in range(n)]
    return sum(sizes[:rank]), sum(sizes[: rank + 1]), -(-numel // n) - sizes[rank]


@mistake("padded_shard", "stop is one too small: flat[start:stop] does not include it")
def last_index(numel, rank, n):
    length = -(-numel // n)
    return min(rank * length, numel), min((rank + 1) * length, numel) - 1, 0


@mistake("padded_shard", "whole numbers (int) are asked for: use // instead of /")
def divides(numel, rank, n):
    length = max(1, numel / n)
    return rank * length, (rank + 1) * length, 0


@mistake("padded_shard", "three whole numbers (start, stop, padding) are asked for")
def only_a_pair(numel, rank, n):
    length = -(-numel // n)
    return rank * length, (rank + 1) * length


@mistake("padded_shard", "start and stop are right, padding is not: shards are 3 long with it")
def no_padding_told(numel, rank, n):
    length = -(-numel // n)
    return min(rank * length, numel), min((rank + 1) * length, numel), 0


@mistake("padded_shard", "with padding every shard is 3 long, and rank 0's begins at 0 · 3")
def one_more_for_each(numel, rank, n):
    length = numel // n + 2 * (numel % n > 0)
    start, stop = min(rank * length, numel), min((rank + 1) * length, numel)
    return start, stop, length - (stop - start)


def full_shards(numel, rank, length):
    start, stop = min(rank * length, numel), min((rank + 1) * length, numel)
    return start, stop, length - (stop - start)


@mistake("padded_shard", "this is right for 4 ranks, and here are 3: is a 4 written into it?")
def for_four_ranks(numel, rank, n):
    return full_shards(numel, rank, -(-numel // 4))


@mistake("padded_shard", "a shard of padding alone begins and ends where the flat parameter does, at 5")
def padding_at_the_beginning(numel, rank, n):
    start, stop, padding = full_shards(numel, rank, -(-numel // n))
    return (start, stop, padding) if start < stop else (0, 0, padding)


@mistake("padded_shard", "stop is where the shard ends in the flat parameter, at 4: 2 is its length")
def start_and_length(numel, rank, n):
    start, stop, padding = full_shards(numel, rank, -(-numel // n))
    return start, stop - start, padding


@right("padded_shard")
def by_counting_what_is_left(numel, rank, n):
    length = math.ceil(numel / n)
    real = sorted([0, numel - rank * length, length])[1]
    start = min(numel, rank * length)
    return [start, start + real, length - real]


@mistake("padded_shard", "the third number is the shard's length, 2: its padding, 0, is asked for")
def length_in_place_of_padding(numel, rank, n):
    start, stop, _ = full_shards(numel, rank, -(-numel // n))
    return start, stop, stop - start


@mistake("padded_shard", "whole numbers (int) are asked for: a Tensor is among them")
def numbers_as_tensors(numel, rank, n):
    return tuple(torch.tensor(full_shards(numel, rank, -(-numel // n))))


@right("padded_shard")
def by_slicing_a_range(numel, rank, n):
    length = (numel + n - 1) // n
    mine = range(numel)[rank * length : (rank + 1) * length]
    return mine.start, mine.stop, length - len(mine)
