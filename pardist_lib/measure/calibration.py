"""Measure the reader's machine, as a `Machine` that planner.py predicts with.

Everything is measured with all ranks at work, as in training: ranks that share cores slow each other down, and on such
a machine a message is work for the processor, too. No parallel layout is run: every rank trains small models of its
own, which do not communicate, and collectives are timed by themselves. What a step takes besides matrix products
(a layer's many small operations, memory that is touched, the optimizer) is fitted from those.
"""

import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from .alpha_beta import fit, sweep
from .costs import STATES, Plan, Transformer, forward_flops
from .planner import Link, Machine, _besides

MODELS = (  # (model, sequences in a micro-batch): narrow and wide, few and many tokens
    (Transformer(96, 2, 4, 160, 48, dropout=False, fused=True), 2),
    (Transformer(96, 6, 4, 160, 48, dropout=False, fused=True), 4),
    (Transformer(192, 3, 4, 320, 96, dropout=False, fused=True), 2),
    (Transformer(320, 1, 8, 640, 48, dropout=False, fused=True), 1),
    (Transformer(384, 1, 8, 320, 64, dropout=False, fused=True), 3),
)
SIZES = (1 << 12, 1 << 15, 1 << 18, 1 << 20, 1 << 22, 1 << 23)  # the last is beyond most caches


def calibrate(ranks, operations=None, *, rounds=5, memory=1e9):
    """A `Machine` that describes the ranks of a `Ranks`: what they sustain while all of them work.

    operations  {"all_reduce" | "reduce_scatter" | "all_gather" | "exchange": f(tensor, group)}, where training does
                not use torch's own
    rounds      how often everything is measured, in turn; medians count
    memory      bytes that a plan may fill on each rank

    flops is what is sustained, so efficiency is 1; overlap is 0, since a message needs the same cores.
    """
    return describe(readings(ranks, operations, rounds), memory)[0]


def readings(ranks, operations=None, rounds=1):
    """What `describe` makes a `Machine` of: a list with one reading for each round. Lists taken at several times can
    be added up."""
    if rounds < 1:
        raise ValueError(f"rounds is 1 or more, not {rounds!r}")
    n, operations = ranks.n, operations or {}
    sizes = [d for d in range(2, n + 1) if n % d == 0]
    wanted = [(name, d) for d in sizes for name in ("all_reduce", "reduce_scatter", "all_gather")]
    wanted += [("exchange", 2)] if n % 2 == 0 else []
    calls = [(operations.get(name, name), d) for name, d in wanted]
    counts = sorted({1, 2, n // 2, n} & {*range(1, n + 1)})

    def all_of(function, cases):
        """A run for each case, at whose end ranks give memory back; what each rank said of all of them."""
        return list(zip(*(ranks.run(function, *case, quiet=True) for case in cases), strict=True))

    taken = []
    for _ in range(rounds):
        steps, moved, work = all_of(_train, MODELS), all_of(_move, calls), all_of(_work, [(k,) for k in counts])
        mine = [{"steps": s, "calls": c, "work": w} for s, c, w in zip(steps, moved, work, strict=True)]
        taken.append({"n": n, "wanted": wanted, "counts": counts, "of ranks": mine})
    return taken


def describe(taken, memory=1e9):
    """(`Machine`, details) from `readings`. details: {"fits": {(operation, ranks): Fit}, "busy", "measured": seconds
    of (forward and backward, optimizer) of each of MODELS, "fitted": what the machine says of them}."""
    n, wanted, counts = (taken[0][key] for key in ("n", "wanted", "counts"))
    steps = np.array([[r["steps"] for r in one["of ranks"]] for one in taken])  # (rounds, ranks, models, 2)
    measured = np.median(steps.max(1), axis=0)  # a step is over when the last rank is ready
    table = np.array([_features(model, micro) for model, micro in MODELS], float)
    speeds = nonnegative(table[:, :3], measured[:, 0])  # seconds of a FLOP, of a byte touched, of a layer
    updates = nonnegative(table[:, 3:], measured[:, 1])  # seconds of a byte of states, of a layer
    fits = {}
    for k, (name, d) in enumerate(wanted):
        times = [[one["of ranks"][0]["calls"][k][i] for one in taken] for i in range(len(SIZES))]
        fits[name, d] = fit(SIZES, times, name, d)
    work = [
        np.median([max(r["work"][c] for r in one["of ranks"][:count]) for one in taken])
        for c, count in enumerate(counts)
    ]
    busy = {count: float(seconds / work[-1]) for count, seconds in zip(counts, work, strict=True)}
    calls = {key: Link(f.latency, f.bandwidth) for key, f in fits.items()}
    link = calls.get(("exchange", 2)) or next(iter(calls.values()), Link(0, np.inf))
    machine = Machine(
        flops=_per(speeds[0]), memory=memory, node=n, within=link, between=link, efficiency=1.0, overlap=0.0,
        touch=_per(speeds[1]), layer=float(speeds[2]), update=_per(updates[0]), update_layer=float(updates[1]),
        calls=calls, busy=busy,
    )  # fmt: skip
    fitted = np.stack([table[:, :3] @ speeds, table[:, 3:] @ updates], 1)
    return machine, {"fits": fits, "busy": busy, "measured": measured, "fitted": fitted}


def _features(model, micro):
    """(FLOPs, bytes touched, layers, bytes of states, layers) of a step of one micro-batch on one rank."""
    products, scores, logits = forward_flops(model)
    flops = micro * model.sequence * (model.layers * (3 * products + 3.5 * scores) + 3 * logits)
    touched, visits = _besides(model, Plan(micro=micro), model.layers, 4, 0)
    return flops, touched, visits, sum(STATES["float32"]) * model.parameters(), model.layers + 1


def _per(seconds):
    return float(1 / seconds) if seconds > 0 else np.inf


def nonnegative(features, seconds):
    """Coefficients ≥ 0 with the least squares of relative errors: features @ coefficients ≈ seconds.

    The best over all subsets of features: exact, for the few that there are.
    """
    scaled = features / np.asarray(seconds)[:, None]
    best, chosen = np.inf, np.zeros(scaled.shape[1])
    for mask in range(1, 1 << scaled.shape[1]):
        some = [k for k in range(scaled.shape[1]) if mask >> k & 1]
        x, *_ = np.linalg.lstsq(scaled[:, some], np.ones(len(scaled)), rcond=None)
        error = ((scaled[:, some] @ x - 1) ** 2).sum()
        if (x >= 0).all() and error < best - 1e-12:
            best, chosen = error, np.zeros(scaled.shape[1])
            chosen[some] = x
    return chosen


# ---- on a rank ------------------------------------------------------------------------------------------------


def _train(model, micro):
    """On a rank: seconds of a model's step, after one that warms up."""
    step = _step(model, micro)
    step()
    dist.barrier()
    return step()


def _move(operation, n):
    """On a rank: seconds of an operation on n ranks, for each of SIZES."""
    return [t[0] for t in sweep(operation, SIZES, 1, n, calls=4)]


def _work(count, size=256, times=24):
    """Seconds of some matrix products on this rank, while `count` ranks make them and the others wait."""
    a = torch.ones(size, size)
    dist.barrier()
    began = time.perf_counter()
    if dist.get_rank() < count:
        for _ in range(times):
            a @ a
    mine = time.perf_counter() - began
    dist.barrier()
    return mine


class Layer(nn.Module):
    """A pre-norm layer with fused causal attention: the operations that a transformer's layer is made of."""

    def __init__(self, model):
        super().__init__()
        h, self.heads = model.hidden, model.heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(h), nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.norm2, self.up, self.down = nn.LayerNorm(h), nn.Linear(h, model.ffn), nn.Linear(model.ffn, h)

    def forward(self, x):
        b, s, h = x.shape
        q, k, v = (part.view(b, s, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, h)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _step(model, micro):
    """A function that trains a small model for a step: (seconds of forward and backward, of the optimizer's step)."""
    torch.manual_seed(0)
    table = nn.Embedding(model.vocab, model.hidden)
    position = nn.Parameter(torch.zeros(model.sequence, model.hidden))
    layers = nn.Sequential(*(Layer(model) for _ in range(model.layers)), nn.LayerNorm(model.hidden))
    optimizer = torch.optim.AdamW([*table.parameters(), position, *layers.parameters()])
    tokens = torch.randint(model.vocab, (micro, model.sequence))

    def step():
        optimizer.zero_grad()
        began = time.perf_counter()
        logits = F.linear(layers(table(tokens) + position), table.weight)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        backward = time.perf_counter() - began
        dist.barrier()
        began = time.perf_counter()
        optimizer.step()
        return backward, time.perf_counter() - began

    return step
