"""Hand-written ring collectives against gloo's own, float32; and bytes on the wire beside the payload's formula."""

import time
import warnings

import torch
import torch.distributed as dist

from pardist_lib import Ranks
from pardist_lib.measure.wire import bytes_on_the_wire
from pardist_lib.mechanisms.collectives import ring_all_gather, ring_all_reduce, ring_reduce_scatter

from .paired import interleave, paired_ratio

COMPARED = [  # name, MB of the whole tensor, target of ours / gloo's
    ("all_reduce", 16, "≤ 1.1"),
    ("all_reduce", 64, "≤ 1.1"),
    ("reduce_scatter", 64, "≤ 0.6"),
    ("all_gather", 64, "≤ 0.6"),
]
ROUNDS = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}  # the payload is this times (n − 1)/n·S


def rows(pairs=30):
    """One dict for each figure: name, ranks, size_mb, median, low, high, unit, target.

    Times are the slowest rank's, from a common start, into memory that was there before (torch's functions are given
    their output, too). Wire bytes are the mean, least and most of the ranks, in multiples of the tensor's bytes S.
    """
    for n in (2, 3, 4):
        with Ranks(n) as ranks:
            for name, mb, target in COMPARED:
                by_rank = ranks.run(compare, name, mb, pairs, quiet=True, timeout=300)
                ours, gloos = (slowest(times) for times in zip(*by_rank, strict=True))
                yield row(f"ring_{name} / gloo's, {mb} MB", n, mb, *paired_ratio(ours, gloos), "×", target)
            for name in ROUNDS:
                sent = zip(*ranks.run(on_the_wire, name, 64, quiet=True), strict=True)
                for whose, of_rank in zip((f"ring_{name}", f"gloo's {name}"), sent, strict=True):
                    payload = f"payload {ROUNDS[name] * (n - 1) / n:.4f}" if whose.startswith("ring") else "stated"
                    figures = sum(of_rank) / n, min(of_rank), max(of_rank)
                    yield row(f"bytes on the wire of {whose}, 64 MB", n, 64, *figures, "S", payload)


def row(name, n, mb, median, low, high, unit, target):
    figures = {"median": median, "low": low, "high": high, "unit": unit, "target": target}
    return {"name": name, "ranks": n, "size_mb": mb} | figures


def slowest(times_by_rank):
    return [max(times) for times in zip(*times_by_rank, strict=True)]


def calls(name, mb):
    """(our call, gloo's call) on this rank, for a whole tensor of `mb` MB or the next smaller multiple of n."""
    n = dist.get_world_size()
    whole = torch.zeros((mb << 18) // n * n)
    chunk = torch.zeros(len(whole) // n)
    return {
        "all_reduce": (lambda: ring_all_reduce(whole), lambda: dist.all_reduce(whole)),
        "reduce_scatter": (
            lambda: ring_reduce_scatter(whole, out=chunk),
            lambda: dist.reduce_scatter_tensor(chunk, whole),
        ),
        "all_gather": (
            lambda: ring_all_gather(chunk, out=whole),
            lambda: dist.all_gather_into_tensor(whole, chunk),
        ),
    }[name]


def compare(name, mb, pairs):
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames two of them
    together = torch.zeros(1)
    return interleave(*calls(name, mb), pairs, before=lambda: dist.all_reduce(together))


def on_the_wire(name, mb):
    """Bytes that this rank sends for one call of ours and one of gloo's, in multiples of the tensor's bytes."""
    warnings.simplefilter("ignore", FutureWarning)
    sent = []
    for call in calls(name, mb):
        counts = []
        for _ in range(2):
            call()  # the first one opens the connections
            time.sleep(0.1)  # a send ends when the kernel has the bytes: they may not have left yet
            counts.append(bytes_on_the_wire())
        sent.append((counts[1] - counts[0]) / (mb << 20))
    return sent
