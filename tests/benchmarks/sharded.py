"""Sharded training steps against PyTorch's own: stage 3 against FSDP2, ZeRO-1 against DDP + ZeroRedundancyOptimizer."""

import time
from statistics import median

import torch
import torch.distributed as dist
from torch import nn

from pardist_lib import Ranks
from pardist_lib.mechanisms.sharded import ShardedDataParallel, ShardedOptimizer

from .paired import interleave, paired_ratio

MODELS = {1: (4, 256), 16: (4, 1024), 64: (16, 1024)}  # MB of float32: layers, width
BATCH = 64  # rows on each rank


def rows(pairs=30):
    """One dict for each figure: name, ranks, median, low, high, target. A step is forward, backward and AdamW, from
    barrier to barrier; the same step against itself is what this machine calls equal."""
    for n in (2, 4):
        with Ranks(n) as ranks:
            for size, (layers, width) in MODELS.items():
                for (a, b), target in PAIRS.items():
                    a_times, b_times = ranks.run(compare, a, b, layers, width, pairs, quiet=True, timeout=300)[0]
                    name = f"{size} MB, {a} / {b} ({median(b_times) * 1e3:.0f} ms)"
                    values = zip(("median", "low", "high"), paired_ratio(a_times, b_times), strict=True)
                    yield {"name": name, "ranks": n, "target": target, **dict(values)}


PAIRS = {
    ("stage 3", "FSDP2"): "≤ 0.7",
    ("ZeRO-1", "DDP + ZeroRedundancyOptimizer"): "≤ 0.9",
    ("stage 3", "stage 3 without overlap"): "stated",
    ("stage 2", "DDP + ZeroRedundancyOptimizer"): "stated",
    ("FSDP2", "FSDP2"): "noise",
}


def compare(a, b, layers, width, pairs):
    """On a rank: the seconds of a step in two ways, time after time."""
    return interleave(make_step(a, layers, width), make_step(b, layers, width), pairs, dist.barrier)


def make_step(how, layers, width):
    """A function that does one training step in one of the ways, and returns its seconds."""
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width, bias=False), nn.ReLU())))
    x = torch.randn(BATCH, width)
    if how.startswith("stage"):
        model = ShardedDataParallel(model, int(how[6]), overlap="without" not in how)
        optimizer = torch.optim.AdamW(model.parameters())
    elif how == "ZeRO-1":
        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW)
    elif how == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters())
    else:
        from torch.distributed.optim import ZeroRedundancyOptimizer
        from torch.nn.parallel import DistributedDataParallel

        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW)

    def step():
        began = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        dist.barrier()
        return time.perf_counter() - began

    step()
    return step
