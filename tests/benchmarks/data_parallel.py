"""A training step with `DataParallel` against the same step with torch's DistributedDataParallel."""

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pardist_lib import Ranks
from pardist_lib.mechanisms.data_parallel import DataParallel

from .paired import interleave, paired_ratio

MODELS = [(1, 256, 4, 32), (16, 1024, 4, 32), (64, 2048, 4, 32)]  # MB, width, layers, rows of each rank


def rows(pairs=30):
    """One dict for each figure: name, ranks, size_mb, median, low, high, unit, target.

    A step is zero_grad, forward, backward, SGD; the slowest rank's time from a common start. Both are as they come:
    buckets of 25 MB, the first one of 1 MB, overlapped.
    """
    for n in (2, 4):
        with Ranks(n) as ranks:
            for mb, width, layers, batch in MODELS:
                by_rank = ranks.run(compare, width, layers, batch, pairs, quiet=True, timeout=300)
                ours, ddps = ([max(times) for times in zip(*kind, strict=True)] for kind in zip(*by_rank, strict=True))
                median, low, high = paired_ratio(ours, ddps)
                yield {
                    "name": f"DataParallel / DDP, step of a {mb} MB model", "ranks": n, "size_mb": mb,
                    "median": median, "low": low, "high": high, "unit": "×", "target": "≤ 1.0 within the interval",
                }  # fmt: skip


def compare(width, layers, batch, pairs):
    """On a rank: seconds of each step of ours, and of DDP's."""
    x, together = torch.randn(batch, width), torch.zeros(1)
    repeats = 4 if width < 1024 else 1  # a short step alone is mostly the start

    def step_of(wrap):
        torch.manual_seed(0)
        parts = [m for _ in range(layers) for m in (nn.Linear(width, width, bias=False), nn.ReLU())]
        model = wrap(nn.Sequential(*parts))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step():
            began = time.perf_counter()
            for _ in range(repeats):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            return time.perf_counter() - began

        step()  # DDP orders its buckets anew after its first step
        return step

    ours, ddp = step_of(DataParallel), step_of(DistributedDataParallel)
    return interleave(ours, ddp, pairs, before=lambda: dist.all_reduce(together))
