"""Who am I, how many are we, who has which share; and whose parameters the optimizer has."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.group import check_optimizer, rank_and_size, split_sizes, within


def in_pairs():
    """What each rank is told of all ranks, of its own pair, of the other pair; and the numbers of roots in its pair."""
    pairs = {members: group_of(members) for members in ((1, 3), (0, 2))}
    mine = (1, 3) if dist.get_rank() % 2 else (0, 2)
    theirs = (0, 2) if mine == (1, 3) else (1, 3)
    heard = []
    for call in (
        lambda: rank_and_size(pairs[theirs]),
        lambda: within(pairs[theirs], mine[0]),
        lambda: within(pairs[mine], theirs[0]),
        lambda: within(None, 4),
    ):
        try:
            call()
        except ValueError as error:
            heard.append(str(error))
    return rank_and_size(), rank_and_size(pairs[mine]), [within(pairs[mine], root) for root in mine], heard


def test_a_rank_counts_within_its_group_and_outsiders_are_told(ranks_of):
    for rank, (world, pair, roots, heard) in enumerate(ranks_of(4).run(in_pairs, quiet=True)):
        assert world == (rank, 4) and pair == (rank // 2, 2) and roots == [0, 1]
        outside = f"rank {rank} is not in this group: only its members may call its collectives"
        mine, other = ([1, 3], 0) if rank % 2 else ([0, 2], 1)
        assert heard == [
            outside,
            outside,
            f"rank {other} is not in the group of ranks {mine}",
            "rank 4 is not in the group of ranks [0, 1, 2, 3]",
        ]


def test_a_smaller_world_is_all_there_is(ranks_of):
    assert ranks_of(4).run(in_world, 3, rank_and_size, quiet=True) == [(0, 3), (1, 3), (2, 3), None]
    assert ranks_of(4).run(in_world, 3, within, None, 2, quiet=True)[:3] == [2, 2, 2]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_sizes_are_those_that_tensor_split_cuts(n):
    for length in range(20):
        assert split_sizes(length, n) == [len(part) for part in torch.arange(length).tensor_split(n)]


def test_an_optimizer_of_other_parameters_is_refused():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    check_optimizer(model, torch.optim.SGD(model.parameters()))
    check_optimizer(model, torch.optim.SGD([model.weight]))  # not all of them: the others stay as they are
    check_optimizer(model, torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 1}]))
    for held, many in (([*model.parameters(), other.weight], "1 of the optimizer's 3"), (other.parameters(), "2 of")):
        with pytest.raises(ValueError, match=f"{many}.* are not the module's: make it of module.parameters"):
            check_optimizer(model, torch.optim.SGD(held))
