"""Collectives, drawn: what every rank holds before and after, and what a ring sends step by step."""

import numpy as np
from matplotlib.patches import FancyArrowPatch

from . import palette
from .figure import WIDTH, Picture, block, chip, heading, paint, sheet, text_width, write
from .values import array, brief, count, listed

MEANING = {
    "broadcast": "one rank's data goes to every rank",
    "scatter": "one rank deals out its chunks, one to each rank",
    "gather": "one rank collects a chunk from every rank",
    "all_gather": "every rank ends with the chunks of all",
    "reduce": "one rank ends with the sum over all ranks",
    "all_reduce": "every rank ends with the sum over all ranks",
    "reduce_scatter": "every rank ends with the sum of its own chunk",
    "all_to_all": "every rank sends one chunk to each rank",
}
TALL, GAP = 0.46, 0.12  # inches: a chunk, and between two ranks


def collective(name, before, after, *, came_from=None, note=None):
    """A collective, before → after: ranks as rows, chunks as columns.

    before, after: per rank a list of chunks (or an array, cut along its first dimension), None where there is none.
    A chunk is text such as "a0+a1", a number or a small array.  A chunk has the colour of the rank that had it
    before; a sum, which nobody had, is neutral.  came_from: ranks for `after`, [rank][chunk], where equal values
    make that ambiguous (None: from several).  note: one line about it; known names bring their own.
    Raises ValueError where before and after have different numbers of ranks.
    """
    before, after = _chunks(before, f"collective, {name} before"), _chunks(after, f"collective, {name} after")
    if len(before) != len(after):
        raise ValueError(f"collective: {len(before)} ranks before, {len(after)} after")
    sources = came_from or [[_source(chunk, rank, before) for chunk in row] for rank, row in enumerate(after)]
    if [len(row) for row in sources] != [len(row) for row in after]:
        raise ValueError("collective: came_from needs one entry for every chunk in after")
    note = MEANING.get(name.replace("-", "_"), "") if note is None else note
    columns = [max(max(map(len, rows)), 1) for rows in (before, after)]
    room = WIDTH - 0.95 - 0.9 - 0.15
    wide = min(0.85, room / sum(columns))
    right = 0.95 + columns[0] * wide + 0.9
    rows = [
        {"rank": r, "before": _said(b), "after": _said(a)} for r, (b, a) in enumerate(zip(before, after, strict=True))
    ]
    alt = f"{name} on {count(len(before), 'rank')}{': ' + note if note else ''}. " + " ".join(
        f"{moment.capitalize()}: {_everyone([row[moment] for row in rows])}." for moment in ("before", "after")
    )
    height = 0.85 + len(before) * (TALL + GAP) + 0.05

    def draw(figure):
        axes = sheet(figure)
        heading(axes, name, note)
        write(axes, 0.95 + columns[0] * wide / 2, 0.64, "before", 1.5)
        write(axes, right + columns[1] * wide / 2, 0.64, "after", 1.5)
        middle = 0.85 + len(before) * (TALL + GAP) / 2 - GAP / 2
        axes.add_artist(
            FancyArrowPatch(
                (right - 0.75, middle),
                (right - 0.15, middle),
                color=palette.INK,
                arrowstyle="simple,head_width=14,head_length=12,tail_width=4",
            )
        )
        for rank in range(len(before)):
            y = 0.85 + rank * (TALL + GAP)
            chip(axes, 0.47, y + TALL / 2, rank)
            own = [None if chunk is None else rank for chunk in before[rank]]
            _row(axes, before[rank], own, 0.95, y, wide, columns[0])
            _row(axes, after[rank], sources[rank], right, y, wide, columns[1])

    width = max(right + columns[1] * wide + 0.2, 0.45 + text_width(name, 11, True) + text_width(note, 9))
    return Picture(paint((min(WIDTH, width), height), draw), alt, rows, name)


def _chunks(ranks, what):
    """Per rank a list of chunks: text, None, or a numpy array."""
    if isinstance(ranks, (str, dict)) or not hasattr(ranks, "__len__") or not len(ranks):
        raise ValueError(f"{what}: expected a list with the chunks of each rank")
    rows = []
    for row in ranks:
        row = [] if row is None else row
        if isinstance(row, str) or not hasattr(row, "__len__"):
            raise ValueError(f"{what}: every rank needs a list of chunks, got {row!r}")
        rows.append([c if c is None or isinstance(c, str) else array(c, what) for c in row])
    return rows


def _same(a, b):
    if isinstance(a, str) or isinstance(b, str):
        return isinstance(a, str) and isinstance(b, str) and a == b
    return a is not None and b is not None and np.array_equal(a, b)


def _source(chunk, rank, before):
    """The one rank that had this chunk before (itself, if it did); None where nobody or several had it."""
    had = [r for r, row in enumerate(before) if any(_same(chunk, old) for old in row)]
    return rank if rank in had else had[0] if len(had) == 1 else None


def _text(chunk):
    return "" if chunk is None else chunk if isinstance(chunk, str) else brief(chunk, 6)


def _said(row):
    return ", ".join(_text(chunk) or "–" for chunk in row) if any(c is not None for c in row) else "nothing"


def _everyone(said):
    """What the ranks hold, in words; once where all hold the same."""
    if len(set(said)) == 1:
        return f"every rank {said[0]}"
    return "; ".join(f"rank {rank} {text}" for rank, text in enumerate(said))


def _two_lines(text, wide):
    """A long sum is broken at the plus nearest to its middle."""
    breaks = [i for i, c in enumerate(text) if c == "+" and i]
    if not breaks or text_width(text, 9) <= wide - 0.06:
        return text
    at = min(breaks, key=lambda i: abs(i - len(text) / 2))
    return text[:at] + "\n" + text[at:]


def _row(axes, chunks, sources, x, y, wide, columns):
    for column in range(columns):
        chunk = chunks[column] if column < len(chunks) else None
        if chunk is None:
            block(axes, x + column * wide, y, wide, TALL, palette.PAPER, edge=palette.LINE, dashed=True)
            continue
        source = sources[column]
        fill = palette.NEUTRAL if source is None else palette.rank_colour(source)
        block(
            axes,
            x + column * wide,
            y,
            wide,
            TALL,
            fill,
            _two_lines(_text(chunk), wide),
            hatch=palette.rank_hatch(source or 0),
        )


def ring_steps(states, *, title="ring all-reduce"):
    """One picture per step of a ring algorithm, for `stepper`: ranks as rows, chunks as columns.

    states[step][rank][chunk]: the set of ranks whose data is in that chunk (drawn as stripes of their colours), or
    its value: in its rank's colour while it is as it was at the start, grey as a sum, with a ✓ as it is in the end.
    states[0] is the start.  A chunk that changed in a step got an arrow from the rank before it in the ring, and a
    thick frame.  Captions are in each picture's `caption`: with n ranks, n - 1 steps add and n - 1 more copy.
    Raises ValueError where the steps differ in their number of ranks or chunks.
    """
    states = [[list(row) for row in state] for state in states]
    if (
        not states
        or not states[0]
        or any([len(row) for row in s] != [len(states[0][0])] * len(states[0]) for s in states)
    ):
        raise ValueError("ring_steps: every step needs the same number of ranks, every rank of chunks")
    return [_ring_step(states, step, title) for step in range(len(states))]


def _ring_step(states, step, title):
    state, old = states[step], states[max(step - 1, 0)]
    world, chunks = len(state), len(state[0])
    moved = [(r, c) for r in range(world) for c in range(chunks) if not _equal(state[r][c], old[r][c])]
    sent = [f"rank {(r - 1) % world} sends chunk {c} to rank {r}" for r, c in moved]
    kind = (": add" if step < world else ": copy") if len(states) == 2 * world - 1 else ""
    caption = f"step {step} of {len(states) - 1}{kind}" if step else "start"
    rows = [{"rank": r} | {f"chunk {c}": _content(state[r][c]) for c in range(chunks)} for r in range(world)]
    full = sum(_content(v) == "+".join(map(str, range(world))) for row in state for v in row)
    done = f" {full} of {world * chunks} chunks are complete." if isinstance(state[0][0], (set, frozenset)) else ""
    alt = f"{title}, {caption}. {listed(sent).capitalize() + '.' if sent else 'Nothing is sent.'}{done}"
    left, top, gap, tall = 1.3, 1.02, 0.3, 0.5
    wide = min(1.1, (WIDTH - left - 0.3) / chunks)

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, caption + (f" — {len(moved)} chunks arrive (thick frames)" if moved else ""))
        for chunk in range(chunks):
            write(axes, left + (chunk + 0.5) * wide, 0.56, f"chunk {chunk}", wide)
        for rank in range(world):
            y = top + rank * (tall + gap)
            chip(axes, 0.75, y + tall / 2, rank)
            for chunk in range(chunks):
                value = state[rank][chunk]
                own = rank if _equal(value, states[0][rank][chunk]) else None
                final = step > 0 and own is None and _equal(value, states[-1][rank][chunk])
                _stripes(axes, value, left + chunk * wide, y, wide, tall, (rank, chunk) in moved, own, final)
        for rank, chunk in moved:
            _arrow(axes, left + (chunk + 0.5) * wide, left - 0.2, rank, world, top, gap, tall)

    size = max(left + chunks * wide + 0.3, 5.0), top + world * (tall + gap) + 0.05
    return Picture(paint(size, draw), alt, rows, caption)


def _equal(a, b):
    return a == b if isinstance(a, (set, frozenset, str)) else np.array_equal(a, b)


def _content(value):
    if isinstance(value, (set, frozenset)):
        return "+".join(map(str, sorted(value))) or "–"
    return value if isinstance(value, str) else brief(array(value, "ring_steps"), 6)


def _stripes(axes, value, x, y, wide, tall, changed, own, final):
    """A chunk: one stripe per contributing rank, its text on a paper label. own: the rank whose untouched value it
    is, or None; final: whether it is finished."""
    inside = sorted(value) if isinstance(value, (set, frozenset)) else []
    fill = palette.PAPER if inside else palette.NEUTRAL if own is None else palette.rank_colour(own)
    block(axes, x, y, wide, tall, fill, line=0, hatch="" if own is None or inside else palette.rank_hatch(own))
    for i, rank in enumerate(inside):
        part = wide / len(inside)
        block(axes, x + i * part, y, part, tall, palette.rank_colour(rank), line=0, hatch=palette.rank_hatch(rank))
    text = _content(value) + " ✓" * final
    write(axes, x + wide / 2, y + tall / 2, text, wide - 0.14, back=palette.PAPER)
    block(axes, x, y, wide, tall, "none", line=2.6 if changed else 0.8)


def _arrow(axes, x, side, rank, world, top, gap, tall):
    """From the rank above; into rank 0, which the last rank sends to, from above the table."""
    y = top + rank * (tall + gap)
    axes.add_artist(
        FancyArrowPatch(
            (x, y - gap - 0.02),
            (x, y + 0.02),
            color=palette.INK,
            zorder=5,
            shrinkA=0,
            shrinkB=0,
            arrowstyle="simple,head_width=9,head_length=8,tail_width=3",
        )
    )
    if rank == 0:  # the ring closes along the left side
        bottom = top + world * (tall + gap) - gap / 2 - 0.05
        axes.plot([x, x], [bottom - gap / 2, bottom], color=palette.INK, lw=1.4)
        axes.plot([x, side, side, x], [bottom, bottom, y - gap + 0.02, y - gap + 0.02], color=palette.INK, lw=1.4)
