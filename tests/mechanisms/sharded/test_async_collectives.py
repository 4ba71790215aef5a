"""Collectives under way: several at once, ended in any order, and the memory that is kept for them."""

import pytest
import torch
import torch.distributed as dist

from pardist_lib.mechanisms.group import split_sizes
from pardist_lib.mechanisms.sharded.async_collectives import ONE_CALL_BYTES, AsyncCollectives


def moved(length, apart, in_order):
    """Four flat tensors reduced and gathered; what is wrong, and the bytes of the rooms."""
    rank, n = dist.get_rank(), dist.get_world_size()
    sizes, wrong, collectives = split_sizes(length, n), [], AsyncCollectives(apart=apart)
    flats = [torch.arange(length, dtype=torch.float64) + 10 * rank + k for k in range(4)]
    means = [(torch.arange(length, dtype=torch.float64) + 5 * (n - 1) + k).split(sizes)[rank] for k in range(4)]
    started = [collectives.reduce_scatter(flat, sizes) for flat in flats]
    for k in range(4) if in_order else reversed(range(4)):
        if not torch.equal(started[k].result(), means[k]):
            wrong.append(f"mean {k}")
    rooms = [room.numel() for room in collectives.rooms]
    started = [collectives.all_gather(torch.empty_like(flat), flat.split(sizes)[rank].clone(), sizes) for flat in flats]
    for k in range(4) if in_order else reversed(range(4)):
        whole = torch.cat([(torch.arange(length) + 10 * r + k).split(sizes)[r] for r in range(n)]).double()
        if not torch.equal(started[k].result(), whole):
            wrong.append(f"flat {k}")
    collectives.reduce_scatter(flats[0], sizes).result()
    one_after_the_other = [room.numel() for room in collectives.rooms]
    collectives.let_go()
    return wrong, rooms, one_after_the_other, [room.numel() for room in collectives.rooms]


@pytest.mark.parametrize("length", [ONE_CALL_BYTES // 8, ONE_CALL_BYTES // 8 + 5, 7, 1])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_several_may_be_under_way_together_and_end_in_any_order(ranks_of, n, length):
    for apart, in_order in ((True, False), (False, True)):
        for rank, (wrong, *_, rest) in enumerate(ranks_of(n).run(moved, length, apart, in_order, quiet=True)):
            assert not wrong and rest == [0, 0], (rank, wrong, rest)


def one_at_a_time(length):
    collectives, sizes = AsyncCollectives(), split_sizes(length, dist.get_world_size())
    for _ in range(3):
        collectives.reduce_scatter(torch.ones(length), sizes).result()
    return [room.numel() for room in collectives.rooms]


def test_one_at_a_time_keeps_one_room(ranks_of):
    assert ranks_of(4).run(one_at_a_time, 400, quiet=True) == [[1600, 0]] * 4
