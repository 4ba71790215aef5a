"""A part of a tensor for every rank: the first rank's values, exactly, and no more bytes than needed."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import group_of
from pardist_lib.mechanisms.group import split_sizes
from pardist_lib.mechanisms.tensor_parallel.splitting import first_ranks_copy, first_ranks_part, parameter

SHAPES = [(6, 4), (5, 7), (2, 3), (0, 3), (7,), (4, 3, 2, 2)]


def whole_of(rank, shape, dtype):
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def split_and_copied(members=None):
    """On every rank: its part along every dimension, and its copy, of tensors whose values differ between ranks."""
    group = group_of(members) if members else None
    if members and dist.get_rank() not in members:
        return None
    found = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            mine = whole_of(dist.get_rank(), shape, dtype)
            for dim in range(len(shape)):
                turned = mine.transpose(0, -1).contiguous().transpose(0, -1)  # the same numbers, another order
                found.append((shape, dtype, dim, first_ranks_part(turned, dim, group)))
            found.append((shape, dtype, None, first_ranks_copy(mine, group)))
            assert torch.equal(mine, whole_of(dist.get_rank(), shape, dtype)), "the input changed"
            assert not mine.numel() or found[-1][-1].data_ptr() != mine.data_ptr()
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_rank_has_its_part_of_the_first_ranks_tensor(ranks_of, n):
    for rank, found in enumerate(ranks_of(n).run(split_and_copied, quiet=True)):
        for shape, dtype, dim, got in found:
            whole = whole_of(0, shape, dtype)
            wanted = whole if dim is None else whole.tensor_split(n, dim)[rank]
            assert (n == 1 or got.is_contiguous()) and got.dtype == dtype and torch.equal(got, wanted), (shape, dtype)


def test_a_groups_first_rank_is_the_one(ranks_of):
    results = ranks_of(4).run(split_and_copied, (1, 3), quiet=True)
    assert results[0] is results[2] is None
    for place, found in enumerate(results[1::2]):
        for shape, dtype, dim, got in found:
            whole = whole_of(1, shape, dtype)
            assert torch.equal(got, whole if dim is None else whole.tensor_split(2, dim)[place])


def split_along(dim):
    first_ranks_part(torch.ones(5, 6), dim)


def copied():
    first_ranks_copy(torch.ones(5, 6))


def test_the_first_rank_sends_what_is_not_its_own_and_the_others_nothing(ranks_of):
    for dim in (0, 1):
        trace = ranks_of(4).trace(split_along, dim, quiet=True)
        own = split_sizes((5, 6)[dim], 4)[0] * (6, 5)[dim]
        assert [trace.bytes("send", rank) for rank in range(4)] == [(30 - own) * 4, 0, 0, 0]
    trace = ranks_of(4).trace(copied, quiet=True)
    assert [(e.name, e.bytes) for e in trace.collectives if e.rank == 1] == [("broadcast", 120)]


def of_no_memory():
    with torch.device("meta"):
        whole = torch.empty(5, 3)
    part, copy = first_ranks_part(whole, 0), first_ranks_copy(whole)
    return part.is_meta and copy.is_meta, tuple(part.shape)


def test_what_has_no_memory_is_cut_without_a_message(ranks_of):
    trace = ranks_of(2).trace(of_no_memory, quiet=True)
    assert trace.results == [(True, (3, 3)), (True, (2, 3))] and trace.collectives == []


def test_a_parameter_is_frozen_where_the_whole_one_is():
    for trained in (True, False):
        like = nn.Parameter(torch.ones(2), requires_grad=trained)
        made = parameter(torch.zeros(1), like)
        assert isinstance(made, nn.Parameter) and made.requires_grad is trained
