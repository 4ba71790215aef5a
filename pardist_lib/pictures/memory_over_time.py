"""What every rank holds over time, by kind, stacked."""

import numpy as np

from . import palette
from .figure import WIDTH, Picture, block, chip, heading, paint, sheet, write_left
from .values import size

LEFT, TOP, RIGHT, TALL, GAP = 1.35, 0.95, 0.2, 1.15, 0.28  # inches
MOST = 1500  # points drawn of each rank


def memory_over_time(memory, *, title="memory over time", unit="ms", marks=None, most=None, until=None):
    """For each rank the bytes it held at every moment, stacked by kind, all ranks on one scale.

    memory: {rank: Memory} as `trace.memory` has it, or objects with times (k,), bytes (k, kinds) by rank.
    unit: "ms" where times are seconds; any other word where they count something else ("operations").
    marks: {rank: bytes}, a line across that rank's lane: what was computed.
    most: bytes where a lane's axis ends, until: seconds where time's does, both by default what is there. Give the same
    to pictures that are compared: they then share both axes.
    The alt text says each rank's peak, which every run repeats. Raises ValueError where there is nothing to draw, or
    more than `most` or `until` leave room for.
    """
    if not memory or not all(len(m.times) for m in memory.values()):
        raise ValueError("memory_over_time: there is nothing: was the trace taken with memory=True?")
    kinds = getattr(next(iter(memory.values())), "kinds", None) or KINDS
    rows = [{"rank": rank, **{f"{k} at the peak": v for k, v in _peak(m, kinds).items()},
             "peak": int(m.bytes.sum(1).max())} for rank, m in memory.items()]  # fmt: skip
    marks, fills = dict(marks or {}), [fill for fill, _ in palette.kind_styles(kinds).values()]
    first, last = (f(m.times[at] for m in memory.values()) for f, at in ((min, 0), (max, -1)))
    there = max([r["peak"] for r in rows] + list(marks.values())) or 1
    most, until = there if most is None else most, last - first if until is None else until
    if most < there or until < last - first:
        raise ValueError(f"memory_over_time: up to {there:,} bytes and {last - first:g} s are there")
    factor = 1e3 if unit == "ms" else 1
    height = TOP + len(memory) * (TALL + GAP) + 0.3
    scale = (WIDTH - LEFT - RIGHT) / (until or 1)

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title)
        x = LEFT
        for i, kind in enumerate(kinds):
            if any(r[f"{kind} at the peak"] or m.bytes[:, i].any() for r, m in zip(rows, memory.values(), strict=True)):
                block(axes, x, 0.5, 0.3, 0.17, fills[i], hatch="")
                x = write_left(axes, x + 0.37, 0.585, kind) + 0.25
        for lane, (rank, m) in enumerate(memory.items()):
            bottom = TOP + lane * (TALL + GAP) + TALL
            chip(axes, 0.47, bottom - TALL / 2, rank)
            axes.text(LEFT - 0.06, bottom - TALL * m.bytes.sum(1).max() / most, size(int(m.bytes.sum(1).max())), size=8,
                      ha="right", va="center")  # fmt: skip
            times, held = _thin(m.times, m.bytes)
            x = LEFT + (np.append(times, last) - first) * scale
            under = np.zeros(len(times))
            for i in range(len(kinds)):
                over = under + held[:, i]
                axes.fill_between(
                    x,
                    bottom - np.append(over, over[-1]) / most * TALL,
                    bottom - np.append(under, under[-1]) / most * TALL,
                    step="post",
                    facecolor=fills[i],
                    edgecolor=palette.INK,
                    linewidth=0.3,
                )
                under = over
            axes.plot([LEFT, WIDTH - RIGHT], [bottom, bottom], color=palette.INK, lw=0.6)
            if rank in marks:
                y = bottom - TALL * marks[rank] / most
                axes.plot([LEFT, WIDTH - RIGHT], [y, y], color=palette.INK, lw=1.2, ls=(0, (4, 2)))
        y = TOP + len(memory) * (TALL + GAP) - GAP + 0.16
        for tick in _ticks(until * factor):
            axes.text(LEFT + tick / factor * scale, y, f"{tick:g}", size=8, ha="center", va="center",
                      color=palette.MUTED)  # fmt: skip
        axes.text(0.47, y, unit, size=8, ha="center", va="center", color=palette.MUTED)
        axes.set(xlim=(0, WIDTH), ylim=(height, 0))

    peaks = ", ".join(f"rank {r['rank']} {r['peak']:,}" for r in rows)
    return Picture(paint((WIDTH, height), draw), f"{title}: at most {peaks} bytes.", rows, title)


KINDS = ("parameters", "gradients", "optimizer state", "activations", "other")


def _peak(m, kinds):
    return dict(zip(kinds, (int(v) for v in m.bytes[m.bytes.sum(1).argmax()]), strict=True))


def _thin(times, held):
    """At most MOST points: of neighbours the one where most is held, so that no peak is lost."""
    if len(times) <= MOST:
        return times, held
    starts = np.linspace(0, len(times), MOST, endpoint=False).astype(int)
    best = [a + held[a:b].sum(1).argmax() for a, b in zip(starts, [*starts[1:], len(times)], strict=True)]
    return times[best], held[best]


def _ticks(long):
    raw = long / 8 or 1
    power = 10.0 ** np.floor(np.log10(raw))
    step = power * min((m for m in (1, 2, 5, 10) if m * power >= raw), default=10)
    return np.arange(0, long * 1.0001, step)
