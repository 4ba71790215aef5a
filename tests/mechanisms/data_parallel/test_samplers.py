"""The sampler that repeats nothing: against torch's where that is exact, and against one process's order."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.data_parallel.samplers import ExactDistributedSampler


def shards(length, n, **options):
    return [list(ExactDistributedSampler(length, rank=rank, num_replicas=n, **options)) for rank in range(n)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(0, 60), st.booleans(), st.integers(0, 3))
def test_every_sample_once_and_sizes_one_apart(n, more, shuffle, seed):
    length = n + more
    parts = shards(length, n, shuffle=shuffle, seed=seed)
    assert sorted(sum(parts, [])) == list(range(length))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == [len(ExactDistributedSampler(length, rank=rank, num_replicas=n)) for rank in range(n)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_where_torch_pads_nothing_it_is_torchs(shuffle):
    data = range(12)
    for rank in range(4):
        ours = ExactDistributedSampler(data, rank=rank, num_replicas=4, shuffle=shuffle, seed=3)
        theirs = DistributedSampler(data, rank=rank, num_replicas=4, shuffle=shuffle, seed=3)
        for epoch in range(3):
            ours.set_epoch(epoch)
            theirs.set_epoch(epoch)
            assert list(ours) == list(theirs)


def test_torchs_own_repeats_some():
    """What this one is for."""
    theirs = [list(DistributedSampler(range(10), rank=rank, num_replicas=4)) for rank in range(4)]
    assert len(sum(theirs, [])) == 12


def test_an_epoch_has_its_own_order_and_a_seed_another():
    sampler = ExactDistributedSampler(40, rank=1, num_replicas=4)
    first = list(sampler)
    assert list(sampler) == first, "without set_epoch the order stays"
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(ExactDistributedSampler(40, rank=1, num_replicas=4, seed=5)) != first


def loaded(workers):
    data = TensorDataset(torch.arange(11))
    loader = DataLoader(data, 2, sampler=ExactDistributedSampler(data), num_workers=workers)
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append([batch.tolist() for (batch,) in loader])
    return epochs


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_with_a_loader_the_batches_together_are_one_process_s(ranks_of, n):
    by_rank = ranks_of(4).run(in_world, n, loaded, 0, quiet=True)[:n]
    for epoch in range(2):
        order = torch.randperm(11, generator=torch.Generator().manual_seed(epoch)).tolist()
        for step in range(max(len(rank[epoch]) for rank in by_rank)):
            together = sum((rank[epoch][step] for rank in by_rank if step < len(rank[epoch])), [])
            assert sorted(together) == sorted(order[step * 2 * n : (step + 1) * 2 * n])


def in_pairs():
    return list(
        ExactDistributedSampler(6, group=[group_of([0, 2]), group_of([1, 3])][dist.get_rank() % 2], shuffle=False)
    )


def test_a_group_of_some_ranks(ranks_of):
    assert ranks_of(4).run(in_pairs, quiet=True) == [[0, 2, 4], [0, 2, 4], [1, 3, 5], [1, 3, 5]]


def test_bad_input():
    with pytest.raises(ValueError, match="3 samples are not enough for 4 ranks"):
        ExactDistributedSampler(3, rank=0, num_replicas=4)
    with pytest.raises(ValueError, match="rank 4 is not one of 4: they count from 0"):
        ExactDistributedSampler(30, rank=4, num_replicas=4)
    with pytest.raises(ValueError, match="both rank and num_replicas"):
        ExactDistributedSampler(30, rank=1)
