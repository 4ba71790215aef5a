"""How long messages take: latency α and bandwidth β of the reader's own links, and what algorithms make of them.

A call on S bytes takes α + S/β seconds. `alpha_beta` measures some sizes on live ranks and fits the two, with how sure
they are. From the α and β of a single message, and γ, the seconds to add up one byte, follow the formulas of whole
algorithms; where two of them cross is where one should change to the other.

Sources: Hockney, "The communication challenge for MPP" (1994), for α and β; Thakur, Rabenseifner, Gropp, "Optimization
of Collective Communication Operations in MPICH" (2005), sections 3 and 4, for the algorithms; Patarasuk, Yuan (2009),
for the ring.
"""

import time
from dataclasses import dataclass, field
from math import inf

import numpy as np
import torch
import torch.distributed as dist

SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 19, 1 << 22, 1 << 24)  # the last outweighs milliseconds of latency


@dataclass(frozen=True)
class Fit:
    """α and β of an operation on `ranks` ranks, each with its 95 % interval.

    latency    seconds of a call however small
    bandwidth  bytes a second that S bytes add (of the whole tensor, as the formulas' S); inf where size does not show
    sizes, times   what was measured: bytes, and for each of them the seconds of every repetition
    """

    operation: str
    ranks: int
    latency: float
    bandwidth: float
    latency_interval: tuple[float, float]
    bandwidth_interval: tuple[float, float]
    sizes: tuple = field(repr=False, default=())
    times: tuple = field(repr=False, default=())

    def seconds(self, size):
        """What a call on `size` bytes takes."""
        return self.latency + np.asarray(size) / self.bandwidth

    def __str__(self):
        (a, b), (c, d) = self.latency_interval, self.bandwidth_interval
        between = f"{c / 1e9:.2f} or more" if d == inf else f"{c / 1e9:.2f} to {d / 1e9:.2f}"
        rate = f"{self.bandwidth / 1e9:.2f} GB/s ({between})"
        if self.bandwidth == inf:
            rate = "a bandwidth that does not show: even the largest size took no longer than the latency" + (
                "" if c == inf else f" (it is {between} GB/s)"
            )
        latency = f"{self.latency * 1e3:.2f} ms ({a * 1e3:.2f} to {b * 1e3:.2f})"
        return f"{self.operation} on {self.ranks} ranks: {latency} and {rate}"


def alpha_beta(ranks, operation="all_reduce", *, n=None, sizes=SIZES, repeats=9):
    """Measure an operation on live ranks and fit α and β: a `Fit`.

    ranks      a `Ranks`
    operation  "all_reduce", "reduce_scatter", "all_gather", "broadcast" (torch's), "exchange" (a message to the next
               rank and one from the previous one at the same time: a step of a ring), or f(tensor, group)
    n          ranks in a group; all groups of n that there are work at the same time. None: one group of all ranks

    A call is timed from barrier to barrier on rank 0. Raises ValueError where n does not divide the ranks, for fewer
    than two sizes, for less than one repetition, and for an operation that there is not.
    """
    n = ranks.n if n is None else n
    _check(operation, n, ranks.n, sizes, repeats)
    times = ranks.run(sweep, operation, tuple(sizes), repeats, n, quiet=True)[0]
    name = operation if isinstance(operation, str) else operation.__name__
    return fit(sizes, times, name, n)


def fit(sizes, times, operation="", ranks=0, *, resamples=300, seed=0):
    """The `Fit` of measured seconds: times[i] has those of sizes[i], as many as there are.

    A line through the medians: the one whose relative errors add up to least, which a single slow size cannot pull
    away, with α ≥ 0 and β > 0. The intervals are those of a percentile bootstrap, each size's repetitions drawn anew.
    """
    sizes, times = np.asarray(sizes, float), [np.asarray(t, float) for t in times]
    if len(sizes) < 2 or len(sizes) != len(times) or not all(t.size and (t > 0).all() for t in times):
        raise ValueError("fit needs at least two sizes, and for each of them one or more times above 0")
    if len(set(sizes)) < 2 or (sizes < 0).any():
        raise ValueError(f"two different sizes of 0 or more bytes are needed, not {sizes.tolist()}")
    draw = np.random.default_rng(seed)
    medians = [np.median(draw.choice(t, (resamples, t.size)), axis=1) for t in times]
    again = np.array([_line(sizes, column) for column in np.array(medians).T])
    alpha, per_byte = _line(sizes, np.array([np.median(t) for t in times]))
    low, high = np.percentile(again, [2.5, 97.5], axis=0)
    return Fit(
        operation, ranks, float(alpha), _inverse(per_byte), (float(low[0]), float(high[0])),
        (_inverse(high[1]), _inverse(low[1])), tuple(sizes.astype(int).tolist()), tuple(map(tuple, times)),
    )  # fmt: skip


def _line(sizes, times):
    """(α, 1/β), neither below 0, with the least sum of |predicted / measured − 1|.

    Such a line goes through two of the points, or through one of them and has no slope, or begins at 0.
    """
    i, j = np.triu_indices(len(sizes), 1)
    different = sizes[i] != sizes[j]
    i, j = i[different], j[different]
    slopes = (times[j] - times[i]) / (sizes[j] - sizes[i])
    lines = np.stack([times[i] - slopes * sizes[i], slopes], 1)
    through_zero = times[sizes > 0] / sizes[sizes > 0]
    flat = np.stack([times, np.zeros_like(times)], 1)
    steep = np.stack([np.zeros_like(through_zero), through_zero], 1)
    lines = np.concatenate([lines[(lines >= 0).all(1)], flat, steep])
    errors = np.abs((lines[:, :1] + lines[:, 1:] * sizes) / times - 1).sum(1)
    return lines[errors.argmin()]


def _inverse(per_byte):
    return float(1 / per_byte) if per_byte > 0 else inf


# ---- on a rank ------------------------------------------------------------------------------------------------


def sweep(operation, sizes, repeats, n, calls=4):
    """On a rank: seconds of a call for each of `sizes`, `repeats` times, the sizes in turn. Each is the mean of
    `calls` calls in a row, of a quarter as many above 1 MB."""
    group = group_of(n)
    call = operation if callable(operation) else OPERATIONS[operation]
    counts = [max(size // 4, n) // n * n for size in sizes]  # float32, divisible by the ranks
    whole = torch.ones(max(counts))
    tensors = [whole[:count] for count in counts]
    times = [[] for _ in sizes]
    for turn in range(-1, repeats):
        for tensor, kept in zip(tensors, times, strict=True):
            dist.barrier()
            began = time.perf_counter()
            many = max(1, calls // 4) if tensor.nbytes > 1 << 20 else calls
            for _ in range(many):
                call(tensor, group)
            dist.barrier()
            if turn >= 0:
                kept.append((time.perf_counter() - began) / many)
            tensor.fill_(1)
    return times


_groups = {}


def group_of(n):
    """The group of n neighbouring ranks that this rank is in. All ranks call it; groups are made once."""
    for first in range(0, dist.get_world_size(), n):
        members = range(first, first + n)
        if members not in _groups:
            _groups[members] = dist.new_group(list(members)) if n < dist.get_world_size() else dist.group.WORLD
        if dist.get_rank() in members:
            mine = _groups[members]
    return mine


def _exchange(tensor, group):
    members = dist.get_process_group_ranks(group)
    place = members.index(dist.get_rank())
    arriving = torch.empty_like(tensor)
    sending = dist.isend(tensor, members[(place + 1) % len(members)], group)
    dist.recv(arriving, members[place - 1], group)
    sending.wait()


def _reduce_scatter(tensor, group):
    dist.reduce_scatter_tensor(tensor.new_empty(len(tensor) // dist.get_world_size(group)), tensor, group=group)


def _all_gather(tensor, group):
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    dist.all_gather_into_tensor(torch.empty_like(tensor), tensor.chunk(n)[rank].clone(), group=group)


OPERATIONS = {
    "all_reduce": lambda tensor, group: dist.all_reduce(tensor, group=group),
    "broadcast": lambda tensor, group: dist.broadcast(tensor, dist.get_process_group_ranks(group)[0], group),
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "exchange": _exchange,
}


def _check(operation, n, world, sizes, repeats):
    if not callable(operation) and operation not in OPERATIONS:
        raise ValueError(f"there is no operation {operation!r}: {', '.join(OPERATIONS)}, or f(tensor, group)")
    if n < 2 or world % n:
        fits = [d for d in range(2, world + 1) if world % d == 0]
        near = min(fits, key=lambda d: abs(d - n)) if fits else None
        way_out = f"n={near} does" if near else "start more ranks: a message needs two"
        raise ValueError(f"groups of {n} do not fill {world} ranks: {way_out}")
    if len(set(sizes)) < 2 or min(sizes) < 0:
        raise ValueError(f"at least two different sizes of 0 or more bytes are needed, not {list(sizes)}")
    if repeats < 1:
        raise ValueError(f"repeats is 1 or more, not {repeats!r}")


# ---- what algorithms make of it -------------------------------------------------------------------------------


def all_reduce_seconds(algorithm, n, size, latency, bandwidth, per_byte_added=0.0):
    """Seconds of an all-reduce of `size` bytes on n ranks by one of ALGORITHMS.

    latency, bandwidth   α and β of one message between two ranks, each of which sends and receives at the same time
    per_byte_added       γ: seconds to add one received byte to one's own

        ring                 2(n − 1)·α + 2(n−1)/n·S/β + (n−1)/n·S·γ
        tree                 2⌈log₂ n⌉·(α + S/β) + ⌈log₂ n⌉·S·γ
        recursive doubling   log₂ n·(α + S/β + S·γ)
        Rabenseifner         2·log₂ n·α + 2(n−1)/n·S/β + (n−1)/n·S·γ
        naive                2(n − 1)·(α + S/β) + (n − 1)·S·γ

    For recursive doubling and Rabenseifner's halving and doubling n counts as the power of two below it, and where it
    is none two messages of S and one addition come on top. Raises ValueError for another algorithm, n < 1, S < 0, and
    for a latency or a γ below 0 or a bandwidth not above it.
    """
    if np.min(size) < 0:
        raise ValueError(f"an all-reduce has 0 or more bytes, not {size!r}")
    constant, slope = _coefficients(algorithm, n, latency, bandwidth, per_byte_added)
    return constant + slope * np.asarray(size)


ALGORITHMS = ("ring", "tree", "recursive doubling", "Rabenseifner", "naive")


def _coefficients(algorithm, n, a, bandwidth, g):
    """(seconds, seconds a byte)"""
    if not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"an all-reduce has 1 or more ranks, a whole number of them, not {n!r}")
    if not (a >= 0 and bandwidth > 0 and g >= 0):
        raise ValueError(
            f"latency and the seconds to add a byte are 0 or more, a bandwidth is above 0 bytes a second, not {a!r}, "
            f"{g!r}, {bandwidth!r}"
        )
    n, b = int(n), 1 / bandwidth
    up, down = int(n - 1).bit_length(), n.bit_length() - 1
    even = 1 << down  # the power of two that is not above n
    extra = (2 * a, 2 * b + g) if even < n else (0, 0)
    both = {
        "ring": (2 * (n - 1) * a, (n - 1) / n * (2 * b + g)),
        "tree": (2 * up * a, up * (2 * b + g)),
        "recursive doubling": (down * a + extra[0], down * (b + g) + extra[1]),
        "Rabenseifner": (2 * down * a + extra[0], (even - 1) / even * (2 * b + g) + extra[1]),
        "naive": (2 * (n - 1) * a, (n - 1) * (2 * b + g)),
    }
    if algorithm not in both:
        raise ValueError(f"there is no algorithm {algorithm!r}: {', '.join(ALGORITHMS)}")
    return both[algorithm]


def crossover(short, long, n, latency, bandwidth, per_byte_added=0.0):
    """The size in bytes from which the algorithm `long` is faster than `short`; 0 where it always is, inf where never.

    Both are lines over the size, so there is one such size: (A_long − A_short)/(B_short − B_long).
    """
    (a1, b1), (a2, b2) = (_coefficients(name, n, latency, bandwidth, per_byte_added) for name in (short, long))
    if b1 <= b2:
        return 0.0 if a2 < a1 else inf
    return max(0.0, (a2 - a1) / (b1 - b2))


def race(ranks, operations, sizes, repeats=9, n=None):
    """{name: [median seconds for each size]} of several operations, timed in turn: {name: f(tensor, group)}."""
    n = ranks.n if n is None else n
    for operation in operations.values():
        _check(operation, n, ranks.n, sizes, repeats)
    times = ranks.run(_race, tuple(operations.values()), tuple(sizes), repeats, n, quiet=True)[0]
    return {name: [float(np.median(t)) for t in each] for name, each in zip(operations, times, strict=True)}


def _race(operations, sizes, repeats, n):
    turns = [[sweep(f, sizes, 1, n) for f in operations] for _ in range(repeats)]
    return [[[turn[k][i][0] for turn in turns] for i in range(len(sizes))] for k in range(len(operations))]


def measured_crossover(sizes, short, long):
    """The size from which on `long` was faster, between two sizes on a logarithmic scale; 0 where it always was, inf
    where it was not at the largest size. short, long: seconds for each of `sizes`, ascending."""
    ahead = np.log(np.asarray(long, float) / np.asarray(short, float))
    behind = np.flatnonzero(ahead > 0)
    if not len(behind):
        return 0.0
    i = behind[-1]
    if i == len(sizes) - 1:
        return inf
    share = ahead[i] / (ahead[i] - ahead[i + 1])
    return float(np.exp(np.log(sizes[i]) + share * (np.log(sizes[i + 1]) - np.log(sizes[i]))))
