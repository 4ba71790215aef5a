"""A training step of `Pipeline` against torch.distributed.pipelining's own schedule classes."""

import time
from statistics import median

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from pardist_lib import Ranks
from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.pipeline import Pipeline, gpipe, interleaved, one_f_one_b
from tests.mechanisms.pipeline.torchs import stepper, torchs_stages

from .paired import interleave, paired_ratio

STAGES = {"small": (64, 4, "≤ 0.7"), "20 ms": (1024, 160, "≤ 0.95")}  # width, rows of a micro-batch, target
M = 8  # micro-batches
KINDS = {
    "GPipe": (gpipe, ScheduleGPipe),
    "1F1B": (one_f_one_b, Schedule1F1B),
    "interleaved, v = 2": (lambda p, m: interleaved(p, m, 2), ScheduleInterleaved1F1B),
}


def rows(pairs=30):
    """One dict for each figure: name, ranks, median, low, high, unit, target.

    A step is zero_grad, forward and backward of 8 micro-batches through stages of two linear layers with ReLU, on the
    slowest rank from a common start; loss to every rank in ours, on the last in torch's.
    """
    with Ranks(4) as ranks:
        for n in (2, 4):
            for width, batch, target in STAGES.values():
                for name in KINDS:
                    by_rank = ranks.run(in_world, n, compare, name, width, batch, pairs, quiet=True, timeout=300)[:n]
                    both = zip(*(times for times, _ in by_rank), strict=True)
                    ours, theirs = ([max(times) for times in zip(*kind, strict=True)] for kind in both)
                    values = zip(("median", "low", "high"), paired_ratio(ours, theirs), strict=True)
                    stage = median(stage for _, stage in by_rank) * 1e3
                    what = f"{name}, stage of {stage:.1f} ms: ours / torch's ({median(theirs) * 1e3:.0f} ms)"
                    yield {"name": what, "ranks": n, "unit": "×", "target": target, **dict(values)}


def compare(name, width, batch, pairs):
    """On a rank: ((seconds of each step of ours, of torch's), seconds of one stage's forward and backward)."""
    ours, kind = KINDS[name]
    schedule, together = ours(dist.get_world_size(), M), torch.zeros(1)
    x, target = torch.randn(2, M * batch, width, generator=torch.Generator().manual_seed(0)).unbind()

    def layers():
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(2 * schedule.stages)]

    pipeline = Pipeline(layers(), schedule, nn.functional.mse_loss)
    stages = torchs_stages(layers(), schedule)
    stages = stages if "interleaved" in name else stages[0]
    step = stepper(kind(stages, M, loss_fn=nn.functional.mse_loss), schedule)
    modules = [stage.submod for stage in stages] if isinstance(stages, list) else [stages.submod]

    def of_ours():
        began = time.perf_counter()
        pipeline.zero_grad()
        pipeline.step(x, target)
        return time.perf_counter() - began

    def of_torchs():
        began = time.perf_counter()
        for module in modules:
            module.zero_grad()
        step(x, target)
        return time.perf_counter() - began

    for _ in range(2):
        of_ours(), of_torchs()
    alone = []
    for _ in range(5):
        began = time.perf_counter()
        modules[0](x[:batch].requires_grad_()).sum().backward()
        alone.append(time.perf_counter() - began)
    x.requires_grad_(False)
    return interleave(of_ours, of_torchs, pairs, before=lambda: dist.all_reduce(together)), min(alone)


if __name__ == "__main__":
    import sys

    for each in rows(int(sys.argv[1]) if len(sys.argv) > 1 else 30):
        interval = f"{each['median']:.3f} ({each['low']:.3f}–{each['high']:.3f})"
        print(f"{each['ranks']} ranks  {interval}  {each['name']}", flush=True)
