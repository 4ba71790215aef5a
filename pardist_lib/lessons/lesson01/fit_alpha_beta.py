"""The exercise fit_alpha_beta."""

import torch

from ..exercises.cases import number
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, same, type_of
from ..exercises.watch import watched

hints = (
    "Drawn with size to the right and seconds upwards, the model is a straight line: latency is where it meets the "
    "axis, and its slope is seconds per byte, the inverse of the bandwidth.",
    "(measured - model) / measured is 1 - latency * (1 / measured) - (size / measured) / bandwidth: an ordinary "
    "least-squares problem with two columns, 1 / measured and size / measured, and 1 for every right-hand side.",
    "torch.linalg.lstsq(columns, ones) solves it in float64; or np.polyfit(sizes, seconds, 1, w=1 / seconds), "
    "whose weights multiply the differences. Its slope is 1 / bandwidth.",
)


def check(run):
    for seed, (latency, bandwidth) in enumerate([(2e-4, 1.5e9), (5e-5, 4e8)]):
        _judge_fit(run, *_measured(seed, latency, bandwidth))


def _measured(seed, latency, bandwidth):
    """Sizes in mixed order and made-up times, up to a quarter off; one message is slower than one twice as large."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1024 << k for k in range(0, 13)]
    sizes = [sizes[i] for i in torch.randperm(len(sizes), generator=generator)]
    off = 0.75 + 0.5 * torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    seconds = [(latency + size / bandwidth) * o for size, o in zip(sizes, off.tolist(), strict=True)]
    one, twice = sizes.index(1 << 20), sizes.index(1 << 21)
    seconds[one], seconds[twice] = 1.1 * seconds[twice], 0.9 * seconds[one]
    return sizes, seconds


def _line(x, y, weights=None):
    """(intercept, slope) of the least-squares line."""
    w = torch.ones_like(x) if weights is None else weights
    x0, y0 = (w * x).sum() / w.sum(), (w * y).sum() / w.sum()
    slope = (w * (x - x0) * (y - y0)).sum() / (w * (x - x0) ** 2).sum()
    return (y0 - slope * x0).item(), slope.item()


_ABSOLUTE = (
    "seconds that it is off count alike here, so that the largest messages alone decide: (measured - model) / measured "
    "is asked for, as a share of what was measured"
)


def _judge_fit(run, sizes, seconds):
    [seen] = run(_pair, sizes, seconds, n=1)
    result = seen.result
    if seen.kept != (sizes, seconds):
        raise Wrong("the lists that it was given have changed: work on copies, sorted(…) instead of .sort()")
    if isinstance(result, torch.Tensor) and result.numel() == 2:
        result = result.flatten().tolist()
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong(f"it returns {type_of(result)}: the pair (latency, bandwidth) is asked for")
    got = [number(value) for value in result]
    x, y = torch.tensor(sizes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    latency, slope = _line(x, y, 1 / y**2)
    absolute, absolute_slope = _line(x, y)
    twice_weighed, twice_slope = _line(x, y, 1 / y)
    apart, apart_slope = _line(x.sort()[0], y.sort()[0], 1 / y.sort()[0] ** 2)
    small, large = x.argmin(), x.argmax()
    ends = ((y[large] - y[small]) / (x[large] - x[small])).item()
    listed = ((y[-1] - y[0]) / (x[-1] - x[0])).item()
    turned, turned_slope = _line(y, x)
    logarithmic, power = _line(x.log(), y.log())
    through, fair = ((x * y).sum() / (x * x).sum()).item(), ((x / y).sum() / ((x / y) ** 2).sum()).item()
    mistakes = [
        ("bandwidth and latency are swapped: (latency, bandwidth) is asked for", (1 / slope, latency)),
        ("the slope is in seconds per byte: bandwidth is its inverse, 1 / slope", (latency, slope)),
        ("slope and latency are swapped, and the slope is not the bandwidth but its inverse", (slope, latency)),
        ("the latency is 0 while the bandwidth is right: was it forgotten?", (0.0, 1 / slope)),
        ("the line goes through the origin: the model has a latency too", (0.0, 1 / through)),
        ("the line goes through the origin: the model has a latency too", (0.0, 1 / fair)),
        ("sizes and seconds were sorted each by itself: which time belongs to which size is lost",
         (apart, 1 / apart_slope)),
        (_ABSOLUTE, (absolute, 1 / absolute_slope)),
        ("the squares are weighed with 1 / seconds: it is the differences that are divided by what was measured, the "
         "squares by its square", (twice_weighed, 1 / twice_slope)),
        ("the line goes through the smallest and the largest message only: all measurements count",
         (y[small].item() - ends * x[small].item(), 1 / ends)),
        ("the line goes through the first and the last measurement only: all of them count",
         (y[0].item() - listed * x[0].item(), 1 / listed)),
        ("sizes are fitted to seconds: seconds = latency + size / bandwidth is the other way round",
         (-turned / turned_slope, turned_slope)),
        ("fitted on logarithms: that is a power of the size, not a straight line", (logarithmic, 1 / power)),
        ("fitted on logarithms: that is a power of the size, not a straight line",
         (torch.tensor(logarithmic).exp().item(), 1 / power)),
        ("the latency is taken from the smallest message: the line says it better", (y[small].item(), 1 / slope)),
        ("the latency is taken from the fastest message: the line says it better", (y.min().item(), 1 / slope)),
        ("bandwidth is the mean of size / seconds: that counts the latency in", (latency, (x / y).mean().item())),
        ("bandwidth is all bytes by all seconds: that counts the latency in", (latency, (x.sum() / y.sum()).item())),
        ("latency is in milliseconds: seconds are asked for", (latency * 1e3, 1 / slope)),
        ("latency is in microseconds: seconds are asked for", (latency * 1e6, 1 / slope)),
        ("bandwidth is in MB per second: bytes per second are asked for", (latency, 1e-6 / slope)),
        ("bandwidth is in GB per second: bytes per second are asked for", (latency, 1e-9 / slope)),
        ("bandwidth is in bits per second: bytes per second are asked for", (latency, 8 / slope)),
    ]  # fmt: skip
    numbers = [torch.tensor(v, dtype=torch.float64) for v in (latency, 1 / slope)]
    if "float32" in seen.dtypes and not all(equal(g, e, (1e-3, 0)) for g, e in zip(got, numbers, strict=True)):
        why = "float32 is too short here, sizes and seconds are ten powers of ten apart: use dtype=torch.float64"
        raise Wrong(why, f"{len(sizes)} measurements")
    mistakes = [(why, [torch.tensor(v, dtype=torch.float64) for v in pair]) for why, pair in mistakes]
    same(got, numbers, "", f"{len(sizes)} measurements", mistakes, labels=["latency", "bandwidth"],
         tolerance=(1e-3, 0))  # fmt: skip


def _pair(answer, sizes, seconds):
    seen = watched(answer, sizes, seconds)
    seen.kept = sizes, seconds
    return seen


exercise = Exercise(hints, check)
