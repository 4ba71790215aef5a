"""A split MLP's and a split transformer block's training step: ours against DTensor's, and what chunks gain."""

import gc
import time
from statistics import median

import torch
import torch.distributed as dist
from torch import nn

from pardist_lib import Ranks
from pardist_lib.mechanisms.tensor_parallel import ParallelMLP
from pardist_lib.mechanisms.tensor_parallel.attention import attend
from pardist_lib.mechanisms.tensor_parallel.transformer import ParallelTransformerBlock, TransformerBlock

from .paired import paired_ratio

HIDDEN = (256, 512, 1024)
SWEEP = [(64, 256), (256, 512), (512, 512), (512, 1024), (1024, 1024)]  # tokens, width
CHUNKS = (2, 4)


def rows(pairs=30):
    """One dict for each figure: name, ranks, median, low, high, unit, target.

    A step is forward, backward and an SGD update, from barrier to barrier; ours and DTensor's take turns within one
    run, on the same weights and the same batch (4 × 64 tokens). "peak tensors": the most bytes of tensor storage that
    a rank had at once during a step, beyond what it had before.
    """
    for n in (2, 4):
        with Ranks(n) as ranks:
            for kind, build in (("MLP", mlps), ("block", blocks)):
                for hidden in HIDDEN:
                    results = ranks.run(against_dtensor, build, hidden, pairs, quiet=True, timeout=300)
                    times, peaks = results[0]
                    target = "≤ 0.9" if hidden <= 256 else "interval reaches ≤ 1.0"
                    name = f"{kind}, hidden {hidden} ({median(times['ours']) * 1e3:.0f} ms)"
                    yield row(f"{name}: ours / DTensor", n, *paired_ratio(times["ours"], times["theirs"]), "×", target)
                    ratio = max(ours / theirs for _, (ours, theirs) in results)
                    yield row(f"{name}: peak tensors, ours / DTensor", n, ratio, ratio, ratio, "×", "≤ 1.0")
            for tokens, width in SWEEP:
                times, share = ranks.run(chunked, tokens, width, pairs, quiet=True, timeout=300)[0]
                name = f"MLP of {width} on {tokens} tokens, {share:.0%} of the step in messages"
                for chunks in CHUNKS:
                    ratio = paired_ratio(times[chunks], times[1])
                    yield row(f"{name}: {chunks} chunks / 1", n, *ratio, "×", "least where shares are equal")


def row(name, ranks, median, low, high, unit, target):
    return {"name": name, "ranks": ranks, "median": median, "low": low, "high": high, "unit": unit, "target": target}


# ---- against DTensor ------------------------------------------------------------------------------------------


def mlps(hidden, mesh):
    """(ours, theirs): hidden → 4·hidden → hidden, with the same weights."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
    ours = ParallelMLP.from_module(plain)
    return ours, parallelize_module(plain, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


class Heads(nn.Module):
    """Attention as it is written for parallelize_module: three projections, and as many heads as this rank has."""

    def __init__(self, whole, heads):
        super().__init__()
        width = whole.embed_dim
        self.heads, self.out = heads, whole.out
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        parts = zip((self.q, self.k, self.v), whole.qkv.weight.chunk(3), whole.qkv.bias.chunk(3), strict=True)
        for part, weight, bias in parts:
            part.weight.data.copy_(weight)
            part.bias.data.copy_(bias)

    def forward(self, x):
        qkv = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        return self.out(attend(qkv, self.heads, self.heads, causal=True))


def blocks(hidden, mesh):
    """(ours, theirs): a pre-norm transformer block with 8 heads, with the same weights.

    Theirs makes a DTensor of the attention's input once, so that Q, K and V share one all-reduce backward as ours do.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    plain = TransformerBlock(hidden, 8)
    ours = ParallelTransformerBlock.from_module(plain)
    plain.attention = Heads(plain.attention, 8 // mesh.size())
    plan = {"attention": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())}
    plan |= {f"attention.{name}": ColwiseParallel() for name in "qkv"} | {"mlp.0": ColwiseParallel()}
    plan |= {"attention.out": RowwiseParallel(), "mlp.2": RowwiseParallel()}
    return ours, parallelize_module(plain, mesh, plan)


def against_dtensor(build, hidden, pairs):
    """On a rank: ({whose: seconds of each step}, (our peak, theirs))."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    models = dict(zip(("ours", "theirs"), build(hidden, mesh), strict=True))
    x, target = torch.randn(2, 4, 64, hidden, generator=torch.Generator().manual_seed(1)).unbind()
    steps, peaks, losses = {}, [], []
    for name, model in models.items():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def step(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x.requires_grad_()), target)
            loss.backward()
            optimizer.step()
            return loss.item()

        losses.append([step() for _ in range(3)])
        steps[name] = step
        peaks.append(min(peak_of(step) for _ in range(5)))  # gloo's thread may let go of a tensor late
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4, losses
    return in_turns(steps, pairs), tuple(peaks)


def in_turns(steps, pairs):
    """{name: seconds of each call}, one after the other, the first one in turn; barriers before and after."""
    times = {name: [] for name in steps}
    for i in range(-2, pairs):
        for name in list(steps) if i % 2 else list(steps)[::-1]:
            dist.barrier()
            began = time.perf_counter()
            steps[name]()
            dist.barrier()
            if i >= 0:
                times[name].append(time.perf_counter() - began)
    return times


def peak_of(step):
    """The most bytes of tensor storage above what there was before, while `step` runs, from torch's own profiler."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        held += e.nbytes()
        most = max(most, held)
    return most


# ---- what chunks gain -----------------------------------------------------------------------------------------


def chunked(tokens, width, pairs):
    """On a rank: ({chunks: seconds of each step}, the share of a step that is messages when nothing overlaps)."""
    x, steps = torch.randn(tokens, width), {}
    for chunks in (1, *CHUNKS):
        torch.manual_seed(0)
        model = ParallelMLP(width, 4 * width, chunks=chunks)

        def step(model=model):
            model(x.requires_grad_()).sum().backward()

        steps[chunks] = step
    message = torch.empty(tokens, width)

    def talk():
        dist.all_reduce(message)
        dist.all_reduce(message)

    times = in_turns(steps | {"messages": talk}, pairs)
    return times, median(times["messages"]) / median(times[1])


if __name__ == "__main__":
    import sys

    for each in rows(int(sys.argv[1]) if len(sys.argv) > 1 else 30):
        interval = f"{each['median']:.3f} ({each['low']:.3f}–{each['high']:.3f})"
        print(f"{each['ranks']} ranks  {interval}  {each['name']}", flush=True)
