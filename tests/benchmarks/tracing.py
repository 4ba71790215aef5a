"""What a trace costs: steps of DistributedDataParallel inside `record` against the same steps outside of it."""

import time
from itertools import permutations
from statistics import median, quantiles

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pardist_lib import Ranks
from pardist_lib.measure.trace import record

from .paired import paired_ratio

STEPS = [  # layers, width, batch, target; with 4 ranks on 2 cores 8–15, 10–20, 40–80 and 80–160 ms
    (4, 32, 16, "stated"),
    (4, 256, 64, "stated"),
    (8, 512, 64, "≤ 1.10"),
    (8, 768, 64, "≤ 1.10"),
]


def rows(pairs=30):
    """One dict for each figure: name, ranks, median, low, high, unit, target.

    A step's time is from barrier to barrier, over three steps. Starting the profiler and reading it out afterwards
    is a row of its own, and so is the same step against itself: what this machine calls equal.
    """
    with Ranks(4) as ranks:
        for layers, width, batch, target in STEPS:
            times, around = ranks.run(compare, layers, width, batch, pairs, quiet=True, timeout=120)[0]
            name = f"DDP step, {layers} layers of {width} ({median(times['plain']) * 1e3:.0f} ms)"
            yield row(f"{name}: traced / untraced", *paired_ratio(times["traced"], times["plain"]), "×", target)
            yield row(f"{name}: untraced / untraced", *paired_ratio(times["again"], times["plain"]), "×", "noise")
            low, *_, high = quantiles(around, n=40)
            values = (v * 1e3 for v in (median(around), low, high))
            yield row(f"{name}: before and after a trace", *values, "ms", "stated")


def row(name, median, low, high, unit, target):
    return {"name": name, "ranks": 4, "median": median, "low": low, "high": high, "unit": unit, "target": target}


def compare(layers, width, batch, pairs):
    """On a rank: {how: seconds of a step, time after time}, and the seconds that `record` takes besides."""
    torch.manual_seed(0)
    model = [m for _ in range(layers) for m in (torch.nn.Linear(width, width), torch.nn.ReLU())]
    model = DistributedDataParallel(torch.nn.Sequential(*model))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=1e-3), torch.randn(batch, width)

    def steps(n=3):
        dist.barrier()
        began = time.perf_counter()
        for _ in range(n):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        dist.barrier()
        return (time.perf_counter() - began) / n

    steps(), record(steps)
    times, around = {"plain": [], "again": [], "traced": []}, []
    orders = list(permutations(times))  # each goes first, and comes after each other one, equally often
    for pair in range(pairs):
        for how in orders[pair % len(orders)]:
            began = time.perf_counter()
            times[how].append(record(steps)[0] if how == "traced" else steps())
            if how == "traced":
                around.append(time.perf_counter() - began - 3 * times[how][-1])
    return times, around
