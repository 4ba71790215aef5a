"""Flat parameters: what n ranks hold of them is everything, once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pardist_lib.mechanisms.sharded.flat_parameter import FlatParameter


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(1, 5))
def test_local_shards_partition_every_parameter(sizes, n):
    """In one process: what n ranks would hold, by the same arithmetic."""
    from unittest import mock

    values = [torch.arange(float(size)) + 10 * i for i, size in enumerate(sizes)]
    found = [[] for _ in sizes]
    for rank in range(n):
        with (
            mock.patch("pardist_lib.mechanisms.sharded.flat_parameter.rank_and_size", lambda _, rank=rank: (rank, n)),
            mock.patch("torch.distributed.broadcast"),
            mock.patch("torch.distributed.get_process_group_ranks", lambda _: range(n)),
            mock.patch("torch.distributed.group"),
        ):
            flat = FlatParameter([nn.Parameter(v.clone()) for v in values], sizes, None, keep_unsharded=rank % 2)
        assert abs(len(flat.shard) - sum(sizes) / n) < 1
        for i, shard in enumerate(flat.local_shards):
            assert shard.sizes[rank] == len(shard) and sum(shard.sizes) == sizes[i]
            assert shard.numel() == 0 or shard.start == sum(shard.sizes[:rank])
            found[i].append(shard.detach())
    for parts, value in zip(found, values, strict=True):
        assert torch.equal(torch.cat(parts), value)
