"""Smaller worlds on the same ranks, and four ranks where the reader has others."""

import pytest
import torch
import torch.distributed as dist

from pardist_lib.lessons.worlds import four_of, in_world
from pardist_lib.ranks import RankError

pytestmark = pytest.mark.usefixtures("ranks")


def who_am_i():
    total = torch.ones(1)
    dist.all_reduce(total)
    everyone = dist.get_process_group_ranks(dist.group.WORLD)
    return dist.get_rank(), dist.get_world_size(), total.item(), everyone


def test_smaller_worlds_on_the_same_ranks(ranks):
    for n in (1, 2, 3, 4):
        seen = ranks.run(in_world, n, who_am_i)
        assert seen == [(rank, n, float(n), list(range(n))) for rank in range(n)] + [None] * (4 - n)
    assert ranks.run(who_am_i) == [(rank, 4, 4.0, [0, 1, 2, 3]) for rank in range(4)]


def test_a_failure_in_a_smaller_world_leaves_the_whole_one(ranks):
    def fails():
        raise KeyError(dist.get_world_size())

    with pytest.raises(RankError):
        ranks.run(in_world, 2, fails)
    assert ranks.run(who_am_i)[3] == (3, 4, 4.0, [0, 1, 2, 3])


def test_four_ranks_for_a_cell_that_needs_them(ranks, ranks_of, capsys):
    with four_of(ranks, "it is a square") as four:
        assert four is ranks and not capsys.readouterr().out
    with four_of(ranks_of(2), "it is a square") as four:
        assert four.run(dist.get_world_size) == [4] * 4
    assert four.state == "closed" and ranks_of(2).run(dist.get_world_size) == [2, 2]
    assert "made for four ranks, as it is a square: four others run this cell" in capsys.readouterr().out
