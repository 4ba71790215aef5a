"""fit_alpha_beta: latency and bandwidth from measured times. Typically wrong: the largest messages alone decide."""

import torch

from ..exercises.cases import F64, number
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
        given = _measured(seed, latency, bandwidth)
        [seen] = run(_fitted, *given, n=1)
        _judge(seen, *given)


def _measured(seed, latency, bandwidth):
    """Sizes in mixed order and made-up times, up to a quarter off; one message is slower than one twice as large."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1024 << k for k in torch.randperm(13, generator=generator).tolist()]
    off = 0.75 + 0.5 * torch.rand(len(sizes), generator=generator, dtype=F64)
    seconds = [(latency + size / bandwidth) * o for size, o in zip(sizes, off.tolist(), strict=True)]
    one, twice = sizes.index(1 << 20), sizes.index(1 << 21)
    seconds[one], seconds[twice] = 1.1 * seconds[twice], 0.9 * seconds[one]
    return sizes, seconds


def _fitted(answer, sizes, seconds):
    seen = watched(answer, sizes, seconds)
    seen.kept = sizes, seconds
    return seen


def _line(x, y, weights=1.0):
    """(intercept, slope) of the least-squares line."""
    w = weights * torch.ones_like(x)
    x0, y0 = (w * x).sum() / w.sum(), (w * y).sum() / w.sum()
    slope = (w * (x - x0) * (y - y0)).sum() / (w * (x - x0) ** 2).sum()
    return (y0 - slope * x0).item(), slope.item()


def _through(x, y, i, j):
    """The same of the line through two of the points."""
    slope = ((y[j] - y[i]) / (x[j] - x[i])).item()
    return y[i].item() - slope * x[i].item(), slope


def _judge(seen, sizes, seconds):
    result, about = seen.result, f"{len(sizes)} measurements"
    if seen.kept != (sizes, seconds):
        raise Wrong("the lists that it was given have changed: work on copies, sorted(…) instead of .sort()")
    if isinstance(result, torch.Tensor) and result.numel() == 2:
        result = result.flatten().tolist()
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong(f"it returns {type_of(result)}: the pair (latency, bandwidth) is asked for")
    x, y = torch.tensor(sizes, dtype=F64), torch.tensor(seconds, dtype=F64)
    latency, slope = _line(x, y, 1 / y**2)
    turned, turned_slope = _line(y, x)
    power, exponent = _line(x.log(), y.log())
    seconds_count = "seconds that it is off count alike here, so that the largest messages alone decide: (measured - "
    seconds_count += "model) / measured is asked for, as a share of what was measured"
    weights = "the squares are weighed with 1 / seconds: it is the differences that are divided by what was measured, "
    origin = "the line goes through the origin: the model has a latency too"
    logarithms = "fitted on logarithms: that is a power of the size, not a straight line"
    lines = [  # (why, (intercept, slope))
        ("the latency is 0 while the bandwidth is right: was it forgotten?", (0.0, slope)),
        (origin, (0.0, ((x * y).sum() / (x * x).sum()).item())),
        (origin, (0.0, ((x / y).sum() / ((x / y) ** 2).sum()).item())),
        ("sizes and seconds were sorted each by itself: which time belongs to which size is lost",
         _line(x.sort()[0], y.sort()[0], 1 / y.sort()[0] ** 2)),
        (seconds_count, _line(x, y)),
        (f"{weights}the squares by its square", _line(x, y, 1 / y)),
        ("the line goes through the smallest and the largest message only: all measurements count",
         _through(x, y, x.argmin(), x.argmax())),
        ("the line goes through the first and the last measurement only: all of them count", _through(x, y, 0, -1)),
        ("sizes are fitted to seconds: seconds = latency + size / bandwidth is the other way round",
         (-turned / turned_slope, 1 / turned_slope)),
        (logarithms, (power, exponent)),
        (logarithms, (torch.tensor(power).exp().item(), exponent)),
        ("the latency is taken from the smallest message: the line says it better", (y[x.argmin()].item(), slope)),
        ("the latency is taken from the fastest message: the line says it better", (y.min().item(), slope)),
        ("bandwidth is the mean of size / seconds: that counts the latency in", (latency, 1 / (x / y).mean().item())),
        ("bandwidth is all bytes by all seconds: that counts the latency in", (latency, (y.sum() / x.sum()).item())),
        ("latency is in milliseconds: seconds are asked for", (latency * 1e3, slope)),
        ("latency is in microseconds: seconds are asked for", (latency * 1e6, slope)),
        ("bandwidth is in MB per second: bytes per second are asked for", (latency, 1e6 * slope)),
        ("bandwidth is in GB per second: bytes per second are asked for", (latency, 1e9 * slope)),
        ("bandwidth is in bits per second: bytes per second are asked for", (latency, slope / 8)),
    ]  # fmt: skip
    pairs = [
        ("bandwidth and latency are swapped: (latency, bandwidth) is asked for", (1 / slope, latency)),
        ("the slope is in seconds per byte: bandwidth is its inverse, 1 / slope", (latency, slope)),
        ("slope and latency are swapped, and the slope is not the bandwidth but its inverse", (slope, latency)),
        *((why, (intercept, 1 / slope)) for why, (intercept, slope) in lines),
    ]
    got, expected = [number(value) for value in result], [number(latency), number(1 / slope)]
    if "float32" in seen.dtypes and not all(equal(g, e, (1e-3, 0)) for g, e in zip(got, expected, strict=True)):
        why = "float32 is too short here, sizes and seconds are ten powers of ten apart: use dtype=torch.float64"
        raise Wrong(why, about)
    mistakes = [(why, [number(value) for value in pair]) for why, pair in pairs]
    same(got, expected, "", about, mistakes, labels=["latency", "bandwidth"], tolerance=(1e-3, 0))


WHY = (
    "Divided by what was measured, a microsecond weighs as much in a short message as in a long one. "
    "pardist_lib's own fit takes the line with the least sum of relative errors, not of their squares: one slow "
    "size cannot pull it away."
)
exercise = Exercise(hints, check, minutes=20, level="medium", why=WHY)
