"""Which rank sees which sample."""

import torch
from torch.utils.data import Sampler

from ..group import rank_and_size


class ExactDistributedSampler(Sampler):
    """This rank's samples of an epoch: together the ranks see every sample exactly once, whatever their number.

    Use it as `DataLoader(data, batch_size, sampler=ExactDistributedSampler(data))` and call `set_epoch` before each
    epoch, or all epochs have the same order. All ranks shuffle alike (by seed + epoch, as torch's DistributedSampler
    does) and rank r takes every n-th sample, beginning with the r-th. So the k-th batches of all ranks together are
    the k-th batch, n times as large, of one process that shuffles so.

    torch's DistributedSampler repeats some samples (or drops some), so that all ranks have as many. Here the first
    len(data) % n ranks have one more, and perhaps one batch more: see `DataParallel.join`.

    data: anything with a length, or the number of samples itself. group: the ranks; or rank and num_replicas.
    Raises ValueError where there are fewer samples than ranks.
    """

    def __init__(self, data, group=None, *, rank=None, num_replicas=None, shuffle=True, seed=0):
        if (rank is None) != (num_replicas is None):
            raise ValueError("give both rank and num_replicas, or neither")
        self.rank, self.n = rank_and_size(group) if rank is None else (rank, num_replicas)
        if not 0 <= self.rank < self.n:
            raise ValueError(f"rank {rank} is not one of {num_replicas}: they count from 0")
        self.length = data if isinstance(data, int) else len(data)
        if self.length < self.n:
            raise ValueError(f"{self.length} samples are not enough for {self.n} ranks: some would have none")
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch):
        """Choose the epoch's order: the same number on all ranks."""
        self.epoch = epoch

    def __iter__(self):
        order = torch.arange(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        return iter(order[self.rank :: self.n].tolist())

    def __len__(self):
        return len(range(self.rank, self.length, self.n))
