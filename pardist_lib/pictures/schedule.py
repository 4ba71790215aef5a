"""A pipeline's schedule: who computes what, and when. Several below each other share one axis."""

from textwrap import wrap

from matplotlib.collections import PolyCollection

from . import palette
from .figure import WIDTH, Picture, chip, heading, heading_width, paint, sheet, text_width, write_left
from .values import count

LEFT, RIGHT, TOP, LANE, BOX, NOTE = 0.95, 0.15, 0.82, 0.3, 0.24, 0.3  # inches
SIZE = 7.2  # points: ten pixels as shown
# Forward is green, all that is backward of one family; none is a rank's colour.
COLOURS = {"F": palette.KINDS[3], "B": palette.KINDS[4], "I": palette.KINDS[5], "W": "#cbbbdc"}
WORDS = {"F": "forward", "B": "backward", "I": "backward to the input", "W": "backward to the weights"}


def schedule(panels, *, title="schedule", note="", until=None, unit="ms"):
    """A line for each rank, a box for each action, as wide as it lasts.

    panels: the rows of one schedule, or {caption: rows} for several on one axis. rows: for each rank a list of
    (text, start, end); a text such as "2F0" is stage, kind (F, B, I or W) and micro-batch.
    note: a few lines below all. until: where the axis ends; None: with the last end. unit: "ms" for times in seconds,
    "" for plain numbers. Boxes that are too narrow for "2F0" say "F0" or "0", or nothing.
    Raises ValueError for rows without a box, a text of no kind, or an end before its start.
    """
    panels = panels if isinstance(panels, dict) else {"": panels}
    for caption, rows in panels.items():
        _check(caption, rows)
    last = max(end for rows in panels.values() for row in rows for *_, end in row)
    until = max(until or 0, last) or 1e-9
    scale = (WIDTH - LEFT - RIGHT) / until
    there = {_kind(text) for rows in panels.values() for row in rows for text, *_ in row}
    said = {kind: _shortened(kind, panels, scale) for kind in WORDS if kind in there}
    tall = [(NOTE if caption else 0.06) + LANE * len(rows) for caption, rows in panels.items()]
    lines = wrap(note, 124)
    height = TOP + sum(tall) + 0.42 + 0.17 * len(lines) + (0.06 if note else 0)

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title)
        x = 0.15
        for kind in said:
            _fill(axes, kind, [_corners(x, 0.46, 0.18, 0.16)])
            x = write_left(axes, x + 0.26, 0.54, WORDS[kind]) + 0.25
        y = TOP
        for (caption, rows), high in zip(panels.items(), tall, strict=True):
            if caption:
                write_left(axes, LEFT, y + 0.12, caption)
            _panel(axes, rows, y + high - LANE * len(rows), scale, said)
            y += high
        _axis(axes, until, y, unit)
        for i, line in enumerate(lines):
            write_left(axes, 0.15, y + 0.42 + 0.17 * i, line)

    rows = [
        {"panel": caption, "rank": rank, "action": text, "start": start, "end": end}
        for caption, lanes in panels.items()
        for rank, row in enumerate(lanes)
        for text, start, end in row
    ]
    return Picture(paint((max(WIDTH, heading_width(title)), height), draw), _words(title, panels, note), rows, title)


def _check(caption, rows):
    if not rows or not any(rows):
        raise ValueError(f"schedule: {caption or 'the rows'} have no action")
    for rank, row in enumerate(rows):
        for text, start, end in row:
            if _kind(text) is None or not start <= end:
                raise ValueError(
                    f"schedule: rank {rank} has ({text!r}, {start}, {end}): an action is a text such as 2F0, its start "
                    "and its end"
                )


def _kind(text):
    return next((letter for letter in str(text) if letter in WORDS), None)


def _panel(axes, rows, top, scale, said):
    for rank in range(len(rows)):
        y = top + LANE * rank
        chip(axes, 0.47, y + BOX / 2, rank)
        axes.plot([LEFT, WIDTH - RIGHT], [y + BOX / 2] * 2, color=palette.LINE, lw=0.6, zorder=0)
    for kind, shorten in said.items():
        own = [(rank, *box) for rank, row in enumerate(rows) for box in row if _kind(box[0]) == kind]
        places = [(LEFT + s * scale, top + LANE * rank, (e - s) * scale, text) for rank, text, s, e in own]
        _fill(axes, kind, [_corners(x, y, wide, BOX) for x, y, wide, _ in places])
        for x, y, wide, text in places:
            if _room(shorten(text)) <= wide:
                middle, colour = (x + wide / 2, y + BOX / 2), palette.text_on(COLOURS[kind])
                axes.text(*middle, shorten(text), size=SIZE, color=colour, ha="center", va="center")


def _shortened(kind, panels, scale):
    """How the actions of a kind are written in all panels: the longest way that most of their boxes have room for."""
    lanes = [row for rows in panels.values() for row in rows]
    many = any(len({_stage(text) for text, *_ in row}) > 1 for row in lanes)  # several stages on a rank
    boxes = [(text, (end - start) * scale) for row in lanes for text, start, end in row if _kind(text) == kind]
    ways = [str] * many + [lambda text: text[len(_stage(text)) :], lambda text: text[len(_stage(text)) + 1 :]]
    for shorten in ways:
        if sum(_room(shorten(text)) <= wide for text, wide in boxes) > 0.8 * len(boxes):
            return shorten
    return lambda text: ""


def _room(text):
    return text_width(text, SIZE) + 0.03


def _stage(text):
    return text[: text.index(_kind(text))]


def _corners(x, y, wide, high):
    return [(x, y), (x + wide, y), (x + wide, y + high), (x, y + high)]


def _fill(axes, kind, boxes):
    line = 0.6 if all(b[1][0] - b[0][0] > 0.05 for b in boxes) else 0.2
    boxes = PolyCollection(boxes, facecolor=COLOURS[kind], edgecolor=palette.PAPER, linewidths=line)
    axes.add_collection(boxes, autolim=False)


def _axis(axes, until, y, unit):
    """Round times below the lanes."""
    much = until * 1e3 if unit == "ms" else until
    step = next(s * 10**k for k in range(-3, 9) for s in (1, 2, 5) if much / (s * 10**k) <= 8)
    for i in range(int(much / step + 1e-9) + 1):
        x = LEFT + i * step / much * (WIDTH - LEFT - RIGHT)
        axes.plot([x, x], [y - 0.02, y + 0.05], color=palette.MUTED, lw=0.8)
        said = f"{i * step:g}" + (f" {unit}" if i == 0 and unit else "")
        axes.text(min(x, WIDTH - 0.2), y + 0.15, said, size=7.5, color=palette.MUTED, ha="center", va="center")


def _words(title, panels, note):
    """The alt text: each rank's actions in their order, which every run repeats, and no times."""
    said = []
    for caption, rows in panels.items():
        begin = f"{caption}: " if caption else ""
        rows = "; ".join(f"rank {rank} {' '.join(text for text, *_ in row)}" for rank, row in enumerate(rows))
        said.append(f"{begin}{rows}.")
    if len({s.split(": ", 1)[-1] for s in said}) == 1 and len(said) > 1:
        said = [f"{' and '.join(panels)}, alike: {said[0].split(': ', 1)[-1]}"]
    text = f"{title}: {count(len(next(iter(panels.values()))), 'rank')}, a box for each action. {' '.join(said)}"
    return f"{text} {note.rstrip('.')}." if note else text
