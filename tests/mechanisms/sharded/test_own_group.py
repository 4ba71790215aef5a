"""The process group that asynchronous collectives have for themselves. It is made with private functions of torch: what
a new version changes about them shows here."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pardist_lib.mechanisms.sharded.own_group import own_group


def one_more_of(*members):
    """A new group, as every rank knows it; made anew each time, so that ranks are in different numbers of groups."""
    return dist.new_group(list(members))


def made():
    rank, groups = dist.get_rank(), [None]
    one_more_of(0, 1)
    three = one_more_of(0, 1, 2)
    if rank < 3:
        groups.append(three)  # rank 3 does not call own_group for it
    found = []
    for group in groups:
        own, total = own_group(group), torch.full((3,), float(rank))
        dist.all_reduce(total, group=own)
        same = own_group(group) is own is not (group or dist.group.WORLD)
        found.append((same, dist.get_process_group_ranks(own), dist.get_rank(own), total.tolist()))
    return found


def test_it_is_made_once_of_the_same_ranks_and_works(ranks_of):
    for rank, (everyone, *three) in enumerate(ranks_of(4).run(made)):
        assert everyone == (True, [0, 1, 2, 3], rank, [6.0] * 3)
        assert three == ([(True, [0, 1, 2], rank, [3.0] * 3)] if rank < 3 else [])


def made_before():
    """dist.new_group, after some of the ranks have made a group of their own."""
    rank, three = dist.get_rank(), one_more_of(0, 1, 2)
    if rank < 3:
        own_group(three)
    later, total = one_more_of(1, 3), torch.full((1,), float(rank))
    if rank in (1, 3):
        dist.all_reduce(total, group=later)
        return later.group_name, total.item()


def test_groups_made_later_are_numbered_alike_on_every_rank(ranks_of):
    _, one, _, three = ranks_of(4).run(made_before)
    assert one == three and one[1] == 4


def crossed():
    """Half of the ranks begin with the one group, half with the other."""
    rank, own = dist.get_rank(), own_group()
    sums = [torch.full((100,), rank + 10.0 * k) for k in range(2)]
    todo = list(zip(sums, (None, own), strict=True))
    for work in [dist.all_reduce(t, group=group, async_op=True) for t, group in todo[:: 1 if rank % 2 else -1]]:
        work.wait()
    return [total[0].item() for total in sums]


def test_its_messages_and_the_callers_do_not_mix(ranks_of):
    assert ranks_of(4).run(crossed) == [[6, 46]] * 4


def public_names():
    """What dist.new_group([0, 1, 2], use_local_synchronization=True) would call the group, before and after two of its
    ranks are in one group more."""
    names = [distributed_c10d._process_group_name([0, 1, 2], use_hashed_name=True)]
    one_more_of(0, 1)
    return [*names, distributed_c10d._process_group_name([0, 1, 2], use_hashed_name=True)]


@pytest.mark.skipif(torch.__version__ >= "2.14", reason="the public way has one name, from torch 2.14 on")
def test_the_public_way_has_several_names_for_one_group(ranks_of):
    """Why own_group is needed before torch 2.14."""
    names = ranks_of(4).run(public_names)
    assert names[0] != names[2]
