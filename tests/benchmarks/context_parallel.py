"""Attention of a dealt-out sequence: what the zigzag order gains, and a ring's step beside other ways to the result.

The order's gain is of work, and two cores cannot show the work of four ranks: there each block of scores is a sleep as
long as it has scores, forward and backward, and all else is real, messages included.
"""

import time
from statistics import median

import torch
from torch.nn import functional as F

from pardist_lib import Ranks
from pardist_lib.mechanisms.collectives import all_gather_from_group
from pardist_lib.mechanisms.context_parallel import all_to_all_attention, deal, ring, ring_attention, shares
from pardist_lib.mechanisms.context_parallel.order import in_order
from pardist_lib.mechanisms.group import rank_and_size

from .paired import paired_ratio
from .tensor_parallel import in_turns, peak_of, row

LENGTHS = (512, 2048, 4096)  # tokens of the whole sequence
EMULATED = 8192
STEP_SECONDS = 0.1  # for all queries of a rank against all keys of another one


def rows(pairs=30):
    """One dict for each figure: name, ranks, median, low, high, unit, target.

    A step is forward and backward of causal attention, 8 heads of 64, float32, from barrier to barrier. "gathered":
    all-gather K and V, the own queries' attention to all they may see, and in backward a reduce-scatter. "peak
    tensors": as in tensor_parallel, the largest of all ranks.
    """
    with Ranks(4) as ranks:
        times = ranks.run(emulated, max(3, pairs // 5), quiet=True, timeout=300)[0]
        ratio = paired_ratio(times["contiguous"], times["zigzag"])
        name = f"causal ring, contiguous / zigzag, {EMULATED} tokens, work emulated"
        yield row(name, 4, *ratio, "×", "(n − ½)/(n/2) = 1.75 ± 10 %")
    for n in (2, 4):
        with Ranks(n) as ranks:
            for s in LENGTHS:
                results = ranks.run(beside_others, s, pairs, quiet=True, timeout=300)
                times, _ = results[0]
                peaks = {way: max(peaks[way] for _, peaks in results) for way in WAYS}
                for a, b in (("ring", "gathered"), ("all to all", "gathered")):
                    name = f"{s} tokens, {a} / {b} ({median(times[b]) * 1e3:.0f} ms)"
                    yield row(name, n, *paired_ratio(times[a], times[b]), "×", "stated")
                    ratio = peaks[a] / peaks[b]
                    name = f"{s} tokens, peak tensors, {a} / {b} ({peaks[b] / 1e6:.1f} MB)"
                    yield row(name, n, ratio, ratio, ratio, "×", "stated")


# ---- the order ------------------------------------------------------------------------------------------------


def emulated(pairs):
    """On a rank: {order: seconds of each step}."""
    own = EMULATED // rank_and_size()[1]
    saved = ring.attend, ring.attend_backward

    def attend(q, k, v, visible):
        time.sleep(STEP_SECONDS * q.size(-2) * k.size(-2) / own**2)
        return torch.zeros(*q.shape[:-1], v.size(-1)), torch.zeros(*q.shape[:-1], 1)

    def attend_backward(q, lse, grad, delta, dq, k, v, dk, dv, visible):
        time.sleep(2 * STEP_SECONDS * q.size(-2) * k.size(-2) / own**2)

    x = torch.zeros(1, 1, own, 2, requires_grad=True)
    ring.attend, ring.attend_backward = attend, attend_backward
    try:
        return in_turns({order: step_of(ring_attention, [x, x, x], order=order) for order in ORDERS}, pairs)
    finally:
        ring.attend, ring.attend_backward = saved


ORDERS = ("contiguous", "zigzag")


# ---- a real step ----------------------------------------------------------------------------------------------


def gathered_attention(q, k, v):
    """As ring_attention(q, k, v), with all keys and values on every rank."""
    rank, n = rank_and_size()
    everyones = shares(q.size(2) * n, n)
    k, v = (in_order(all_gather_from_group(x, 2), 2, everyones) for x in (k, v))
    parts = []
    for run, queries in zip(everyones[rank], q.split([len(run) for run in everyones[rank]], 2), strict=True):
        seen = torch.arange(run.start, run.stop)[:, None] >= torch.arange(run.stop)
        parts.append(F.scaled_dot_product_attention(queries, k[:, :, : run.stop], v[:, :, : run.stop], seen))
    return torch.cat(parts, 2)


WAYS = {"ring": ring_attention, "all to all": all_to_all_attention, "gathered": gathered_attention}


def beside_others(s, pairs):
    """On a rank: ({way: seconds of each step}, {way: its peak of tensors, in bytes})."""
    torch.manual_seed(0)
    tensors = [deal(x, dim=2).requires_grad_() for x in torch.randn(3, 1, 8, s, 64)]
    results = {way: attention(*tensors).detach() for way, attention in WAYS.items()}
    assert all(torch.allclose(y, results["gathered"], atol=1e-5) for y in results.values())
    steps = {way: step_of(attention, tensors) for way, attention in WAYS.items()}
    peaks = {way: min(peak_of(step) for _ in range(3)) for way, step in steps.items()}
    return in_turns(steps, pairs), peaks


def step_of(attention, tensors, **options):
    def step():
        for x in tensors:
            x.grad = None
        attention(*tensors, **options).sum().backward()

    return step


if __name__ == "__main__":
    import sys

    for each in rows(int(sys.argv[1]) if len(sys.argv) > 1 else 30):
        interval = f"{each['median']:.3f} ({each['low']:.3f}–{each['high']:.3f})"
        print(f"{each['ranks']} ranks  {interval}  {each['name']}", flush=True)
