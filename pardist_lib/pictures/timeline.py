"""What every rank did, and when: a lane per rank, computation above, communication below."""

from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.patches import FancyArrowPatch

from . import palette
from .figure import WIDTH, Picture, block, chip, heading, paint, sheet, text_width, write_left
from .values import count, size

LEFT, TOP, RIGHT = 0.95, 0.95, 0.15  # inches
COMPUTE, COMMUNICATE, GAP = 0.24, 0.42, 0.16  # heights of the two sub-lanes, and between two ranks
PIXEL = 1 / 144  # inches
COMPUTATION = palette.NEUTRAL, ""  # grey: no rank's colour
LEVELS = 3  # communication that overlaps on one rank is stacked this deep


def timeline(trace, *, title="timeline", times=False, until=None):
    """One lane per rank on an axis in milliseconds: computation plain, communication hatched, by operation and bytes.

    trace: a Trace, or its list of events (objects or dicts with rank, kind "compute" | "communication", name, start
    and end in seconds, and optionally bytes and peer).  Sends and receives are joined by arrows where they are few.
    times: put times into the alt text as well; they differ from run to run, so normally only the table has them.
    until: where the axis ends, in seconds after the first event; None: with the last event. Give the same to pictures
    that are compared, or each is stretched to the same width.
    A rank's compute and communication time is the time during which at least one such event was under way.
    Raises ValueError for no events, an unknown kind, an end before its start, or `until` before the last end.
    """
    events = _events(trace)
    world = max(getattr(trace, "world_size", 0), 1 + max(e.rank for e in events))
    zero, end = min(e.start for e in events), max(e.end for e in events)
    long = end - zero if until is None else until
    if long < end - zero:
        raise ValueError(f"timeline: until is {until:g} s, but there are events up to {end - zero:g} s")
    scale = (WIDTH - LEFT - RIGHT) / (long or 1e-6)
    lanes = defaultdict(list)
    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        lanes[event.rank, event.kind].append(event)
    rows = [_totals(rank, lanes[rank, "compute"], lanes[rank, "communication"]) for rank in range(world)]
    height = TOP + world * (COMPUTE + COMMUNICATE + GAP) + 0.4

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title)
        styles = palette.kind_styles(_names(events))
        _legend(axes, styles, any(e.kind == "compute" for e in events))
        _milliseconds(axes, long * 1e3, TOP + world * (COMPUTE + COMMUNICATE + GAP))
        for rank in range(world):
            y = TOP + rank * (COMPUTE + COMMUNICATE + GAP)
            chip(axes, 0.47, y + (COMPUTE + COMMUNICATE) / 2, rank)
            axes.plot([LEFT, WIDTH - RIGHT], [y + COMPUTE + COMMUNICATE + GAP / 2] * 2, color=palette.LINE, lw=0.5)
        boxes = [box for lane in lanes.values() for box in _boxes(lane, zero, scale)]
        _fill(axes, boxes, styles)
        _label(axes, boxes, styles)
        _arrows(axes, events, zero, scale)

    return Picture(paint((WIDTH, height), draw), _words(title, rows, events, times and (end - zero) * 1e3), rows, title)


def _events(trace):
    """The events as objects, checked."""
    events = [SimpleNamespace(**e) if isinstance(e, dict) else e for e in getattr(trace, "events", trace)]
    if not events:
        raise ValueError("timeline: there are no events")
    for event in events:
        try:
            right = event.rank >= 0 and event.kind in ("compute", "communication") and event.end >= event.start
            right = right and isinstance(event.name, str)
        except (AttributeError, TypeError):
            right = False
        if not right:
            raise ValueError(
                "timeline: an event needs rank ≥ 0, kind 'compute' or 'communication', name, and "
                f"start ≤ end in seconds; got {event!r}"
            )
    return events


def _names(events):
    """Names of the communication operations, the most frequent first."""
    calls = Counter(e.name for e in events if e.kind == "communication")
    return sorted(calls, key=lambda name: (-calls[name], name))


def _bytes(event):
    return getattr(event, "bytes", 0) or 0


def busy(events):
    """The union of the events' times as an array of disjoint (start, end), ascending; events sorted by start."""
    spans = []
    for event in events:
        if spans and event.start <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], event.end)
        else:
            spans.append([event.start, event.end])
    return np.array(spans).reshape(-1, 2)


def _totals(rank, compute, communication):
    work, talk = busy(compute), busy(communication)
    both = busy(sorted(compute + communication, key=lambda e: e.start))
    length = [float((spans[:, 1] - spans[:, 0]).sum()) * 1e3 for spans in (work, talk, both)]
    return {
        "rank": rank,
        "compute ms": length[0],
        "communication ms": length[1],
        "overlapped ms": max(length[0] + length[1] - length[2], 0.0),
        "calls": len(communication),
        "bytes": sum(map(_bytes, communication)),
    }


def _words(title, rows, events, milliseconds):
    """The alt text: calls and bytes, which every run repeats; times only where asked for."""

    def did(rank):
        calls, moved = Counter(), Counter()
        for e in events:
            if e.rank == rank and e.kind == "communication":
                calls[e.name] += 1
                moved[e.name] += _bytes(e)
        return ", ".join(f"{calls[n]} {n} ({moved[n]:,} bytes)" for n in sorted(calls)) or "no communication"

    each = [did(row["rank"]) for row in rows]
    text = f"{title} of {count(len(rows), 'rank')}, in each lane computation above communication"
    text += f", {milliseconds:.3g} ms long. " if milliseconds else ". "
    if len(set(each)) == 1:
        text += f"Every rank: {each[0]}."
    else:
        text += " ".join(f"Rank {rank}: {what}." for rank, what in enumerate(each))
    return text + "".join(
        f" Rank {r['rank']}: {r['compute ms']:.3g} ms of computation, {r['communication ms']:.3g} ms of communication."
        for r in rows
        if milliseconds
    )


def _boxes(lane, zero, scale):
    """Events of one lane as boxes [x, y, width, height, event, count, bytes], in inches.

    Events under two pixels that touch are merged, so ten thousand events cost no more than the pixels they cover.
    """
    merged, levels = [], [0.0] * (LEVELS if lane and lane[0].kind == "communication" else 1)
    for event in lane:
        x, width = LEFT + (event.start - zero) * scale, (event.end - event.start) * scale
        last = merged[-1] if merged else None
        if (
            last
            and max(width, last[6]) < 2 * PIXEL
            and x - last[0] - last[1] < PIXEL / 2
            and (event.kind == "compute" or event.name == last[2].name)
        ):
            last[1] = max(last[1], x + width - last[0])
            last[3], last[4], last[6] = last[3] + 1, last[4] + _bytes(event), max(last[6], width)
        else:
            merged.append([x, width, event, 1, _bytes(event), 0, width])
    for box in merged:  # the first level that is free again, else the last
        box[5] = next((i for i, free in enumerate(levels) if free <= box[0] + 1e-9), len(levels) - 1)
        levels[box[5]] = box[0] + box[1]
    used = 1 + max((box[5] for box in merged), default=0)
    for x, width, event, calls, moved, level, _ in merged:
        talk = event.kind == "communication"
        tall = (COMMUNICATE if talk else COMPUTE) / used
        y = TOP + event.rank * (COMPUTE + COMMUNICATE + GAP) + talk * COMPUTE + level * tall
        yield x, y, max(width, PIXEL), tall, event, calls, moved


def _fill(axes, boxes, styles):
    groups = defaultdict(list)
    for box in boxes:
        groups[box[4].name if box[4].kind == "communication" else None].append(box)
    for name, members in groups.items():
        fill, hatch = styles[name] if name is not None else COMPUTATION
        corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h, *_ in members]
        edges = [0.5 if w > 5 * PIXEL else 0 for _, _, w, *_ in members]
        axes.add_collection(
            PolyCollection(corners, facecolor=fill, edgecolor=palette.INK, linewidths=edges), autolim=False
        )
        wide = [c for c, (_, _, w, *_) in zip(corners, members, strict=True) if w > 5 * PIXEL]
        if wide and hatch:
            axes.add_collection(
                PolyCollection(
                    wide, facecolor="none", edgecolor=palette.text_on(fill), linewidths=0, hatch=hatch, alpha=0.5
                ),
                autolim=False,
            )


def _label(axes, boxes, styles, most=200):
    """Names and bytes on the boxes that have room for them, widest first; none over another's (deeper than LEVELS,
    boxes of one level overlap)."""
    written = defaultdict(list)
    for x, y, w, h, event, calls, moved in sorted(boxes, key=lambda box: -box[2])[:most]:
        talk = event.kind == "communication"
        fill = styles[event.name][0] if talk else COMPUTATION[0]
        times, much = f"{calls} × " if calls > 1 else "", f" {size(moved)}" if moved else ""
        points = 7.5 if h > 0.15 else 6.5
        if calls > 1 and not talk:
            continue
        for text in (times + event.name + much, much.strip(), times + event.name):
            half = text_width(text, points) / 2 + 0.04
            start, end = x + w / 2 - half, x + w / 2 + half
            if text and 2 * half < w and not any(start < b and a < end for a, b in written[y]):
                written[y].append((start, end))
                axes.text(
                    x + w / 2,
                    y + h / 2,
                    text,
                    size=points,
                    ha="center",
                    va="center",
                    color=palette.text_on(fill),
                    bbox={"facecolor": fill, "edgecolor": "none", "pad": 0.6},
                )
                break


def _arrows(axes, events, zero, scale, most=40):
    """An arrow from each send to its receive: the k-th send of a pair of ranks meets its k-th receive."""
    ends = defaultdict(list)
    for e in sorted(events, key=lambda e: e.start):
        if e.name in ("send", "recv") and getattr(e, "peer", None) is not None:
            ends[e.name, *((e.rank, e.peer) if e.name == "send" else (e.peer, e.rank))].append(e)
    pairs = [
        pair
        for (name, *ranks), sends in ends.items()
        if name == "send"
        for pair in zip(sends, ends.get(("recv", *ranks), []), strict=False)
    ]
    for send, recv in pairs if len(pairs) <= most else []:
        points = [
            (LEFT + (t - zero) * scale, TOP + e.rank * (COMPUTE + COMMUNICATE + GAP) + COMPUTE + COMMUNICATE / 2)
            for e, t in ((send, send.start), (recv, recv.end))
        ]
        axes.add_artist(
            FancyArrowPatch(
                *points, arrowstyle="-|>", mutation_scale=9, color=palette.INK, lw=0.9, shrinkA=0, shrinkB=0, zorder=6
            )
        )


def _legend(axes, styles, computes):
    x = LEFT
    for name, (fill, hatch) in ([("computation", COMPUTATION)] if computes else []) + list(styles.items()):
        if x > WIDTH - 1.2:
            break
        block(axes, x, 0.47, 0.3, 0.17, fill, hatch=hatch)
        x = write_left(axes, x + 0.37, 0.555, name) + 0.25


def _milliseconds(axes, long, y):
    """A rule with five to ten round numbers of milliseconds."""
    raw = long / 8 or 1
    power = 10.0 ** np.floor(np.log10(raw))
    step = power * min((m for m in (1, 2, 5, 10) if m * power >= raw), default=10)
    for tick in np.arange(0, long * 1.0001, step):
        x = LEFT + tick / (long or 1) * (WIDTH - LEFT - RIGHT)
        axes.plot([x, x], [TOP - 0.06, y], color=palette.LINE, lw=0.4, zorder=0)
        axes.text(x, y + 0.12, f"{tick:g}", size=8, ha="center", va="center", color=palette.MUTED)
    axes.text(0.47, y + 0.12, "ms", size=8, ha="center", va="center", color=palette.MUTED)
