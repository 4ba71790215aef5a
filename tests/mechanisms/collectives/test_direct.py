"""Reduce-scatter and all-gather in one round, started and ended apart: what a rank computes in between."""

import pytest
import torch
import torch.distributed as dist

from pardist_lib.mechanisms import collectives
from pardist_lib.mechanisms.collectives import direct, point_to_point
from pardist_lib.mechanisms.group import split_sizes
from tests.mechanisms.collectives.cases import (
    case_of,
    same,
)
from tests.mechanisms.collectives.counted import sent_by


def started_and_ended():
    """A reduce-scatter and an all-gather under way at once; the receives of the latter before its shard is computed."""
    rank, n = dist.get_rank(), dist.get_world_size()
    chunks = [torch.full((2, 3), 10.0 * rank + to) for to in range(n)]
    theirs = torch.empty(n, 6)
    shards = [torch.zeros(size) for size in split_sizes(7, n)]
    adding = direct.started_exchange(chunks, theirs, None)
    receiving = direct.asked_for_shards(shards, None)
    shards[rank].fill_(rank + 1)
    sending = direct.sent_shard(shards, None)
    total = direct.added_up(adding, chunks, theirs, dist.ReduceOp.SUM, None, None)
    point_to_point.wait(receiving + sending)
    return total, torch.cat(shards), chunks


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_two_may_be_under_way_at_once(ranks_of, n):
    for rank, (total, gathered, chunks) in enumerate(ranks_of(n).run(started_and_ended, quiet=True)):
        same(total, torch.full((2, 3), sum(10.0 * r + rank for r in range(n))), "sum")
        same(gathered, torch.cat([torch.full((size,), r + 1.0) for r, size in enumerate(split_sizes(7, n))]), "shards")
        for to, chunk in enumerate(chunks):
            same(chunk, torch.full((2, 3), 10.0 * rank + to), "chunks stay")


def where_it_belongs():
    rank, n = dist.get_rank(), dist.get_world_size()
    whole = torch.zeros(n, 2)
    whole[rank] = rank + 1
    gathered = collectives.direct_all_gather(whole[rank : rank + 1], out=whole)
    out = torch.empty(1, 2)
    assert collectives.direct_reduce_scatter(whole, out=out).data_ptr() == out.data_ptr()
    return gathered.data_ptr() == whole.data_ptr(), whole, out


def test_into_given_memory(ranks_of):
    for rank, (same_memory, whole, out) in enumerate(ranks_of(3).run(where_it_belongs, quiet=True)):
        assert same_memory
        same(whole, torch.tensor([[1.0, 1], [2, 2], [3, 3]]), "all_gather")
        same(out, torch.full((1, 2), 3.0 * (rank + 1)), "reduce_scatter")


def test_all_messages_go_out_at_once(ranks_of):
    cases = [case_of("direct_reduce_scatter", 4, rows=8), case_of("direct_all_gather", 4, sizes=[3] * 4)]
    for messages, _ in ranks_of(4).run(sent_by, cases, quiet=True):
        assert messages == [[8] * 3, [12] * 3]
