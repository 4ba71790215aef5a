"""A = B × C, drawn: who holds which block, what travels, and the summands of a cut inner dimension."""

import numpy as np

from . import palette
from .figure import WIDTH, Picture, block, chip, heading, heading_width, paint, sheet, text_width, write, write_left
from .values import array, brief, listed, number, shape

EVERY = -1  # the owner of what every rank holds
CELL = 0.46, 0.3  # inches: a number's cell, at most
LEFT, TOP, GAP, LABEL = 0.4, 0.5, 0.3, 0.2


def matmul(b, c, a, owners, *, summands=(), panel=None, title="", note="", lines=()):
    """B on the left, C above, A where they cross: a row of B and a column of C meet in their number of A.

    b, c, a: matrices of numbers.  owners: (of b, of c, of a), each rank numbers that broadcast to the matrix; -1 for
    what every rank holds, drawn in grey.  summands: one matrix per rank as large as A, drawn below with plus signs
    between, for a cut inner dimension.  panel: (first, last) of the inner indices that travel in this step, framed in
    B and C.  lines: what to say below, such as the messages.
    Raises ValueError where shapes do not fit.
    """
    b, c, a = (array(matrix, f"matmul, {name}") for matrix, name in ((b, "b"), (c, "c"), (a, "a")))
    if any(x.ndim != 2 for x in (b, c, a)) or b.shape[1] != c.shape[0] or a.shape != (b.shape[0], c.shape[1]):
        raise ValueError(f"matmul: shapes {b.shape} × {c.shape} do not give {a.shape}")
    try:
        owners = [np.broadcast_to(array(o, "matmul, owners"), x.shape) for o, x in zip(owners, (b, c, a), strict=True)]
    except ValueError as error:
        raise ValueError(f"matmul: owners are three arrays that broadcast to B, C and A ({error})") from None
    summands = [array(s, f"matmul, summand of rank {rank}") for rank, s in enumerate(summands)]
    if any(s.shape != a.shape for s in summands):
        raise ValueError(f"matmul: every summand is as large as A, {a.shape}")
    (m, k), w, lines = b.shape, c.shape[1], list(lines)
    wide = min(CELL[0], (WIDTH - 2 * LEFT - GAP - 1.2) / (k + w))
    tall = min(CELL[1], 4.6 / (k + m))
    across = LEFT + k * wide + GAP + w * wide
    ranks = sorted({int(o) for each in owners for o in each.flat})
    ranks = [] if ranks == [EVERY] else ranks  # in one process there is nothing to tell apart
    key = LEFT + 0.62 + text_width("every rank", 9) + 0.2
    left = max(LEFT, key - k * wide - GAP + 0.1)  # the corner above B has room for who is who
    down = TOP + LABEL + max(k * tall, 0.26 * len(ranks)) + GAP + m * tall
    small = min(wide, (WIDTH - 2 * LEFT - 0.25 * len(summands)) / max(len(summands) * w, 1))
    end = down + 0.15 + (0.4 + m * tall if summands else 0)
    height = end + 0.24 * len(lines) + 0.1
    width = max(left + across + 0.15, heading_width(title, note), *(0.4 + text_width(line, 8.5) for line in lines),
                2 * LEFT + len(summands) * (w * small + 0.25))  # fmt: skip
    rows = [{"matrix": name, "rank": _said(rank), "block": _block(x, o == rank)}
            for name, x, o in zip("BCA", (b, c, a), owners, strict=True) for rank in sorted({*o.flat})]  # fmt: skip
    rows += [{"matrix": "summand of A", "rank": f"rank {r}", "block": brief(s)} for r, s in enumerate(summands)]

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, note)
        x, y = left + k * wide + GAP, TOP + LABEL + max(k * tall, 0.26 * len(ranks))
        for i, rank in enumerate(ranks):
            _who(axes, LEFT, TOP + 0.1 + 0.26 * i, rank)
        for name, values, of, at_x, at_y in (("B", b, owners[0], left, y + GAP), ("C", c, owners[1], x, y - k * tall),
                                             ("A", a, owners[2], x, y + GAP)):  # fmt: skip
            _matrix(axes, values, of, at_x, at_y, wide, tall)
            beside = at_x - 0.12 if name != "C" else at_x + w * wide + 0.14
            write(axes, beside, at_y + (values.shape[0] * tall) / 2, name, 0.3, 10)
        if panel:
            first, last = panel
            block(axes, left + first * wide, y + GAP, (last - first) * wide, m * tall, "none", line=3)
            block(axes, x, y - k * tall + first * tall, w * wide, (last - first) * tall, "none", line=3)
        for rank, values in enumerate(summands):
            at = LEFT + rank * (w * small + 0.25)
            chip(axes, at + w * small / 2, down + 0.3, rank)
            _matrix(axes, values, np.full(a.shape, rank), at, down + 0.48, small, tall)
            if rank + 1 < len(summands):
                write(axes, at + w * small + 0.125, down + 0.48 + m * tall / 2, "+", 0.2, 11)
        for i, line in enumerate(lines):
            write_left(axes, LEFT, end + 0.12 + 0.24 * i, line)

    said = " ".join(f"{name}: {_owned(of)}." for name, of in zip(("B", "C", "A"), owners, strict=True))
    more = "" if not summands else f" {len(summands)} summands as large as A, one on each rank, add up to A."
    more += "" if not panel else f" Inner indices {panel[0]} to {panel[1] - 1} travel in this step."
    alt = f"{title or 'A = B × C'}{', ' + note if note else ''}. B {shape(b)}, C {shape(c)}, A {shape(a)}. {said}{more}"
    alt += "".join(f" {line.rstrip('.')}." for line in lines)
    return Picture(paint((min(width, WIDTH), height), draw), alt, rows, title)


def _said(rank):
    return "every rank" if rank == EVERY else f"rank {rank}"


def _owned(owners):
    """Who holds a matrix, in words."""
    ranks = sorted({int(o) for o in owners.flat})
    if not ranks:
        return "empty"
    if ranks == [EVERY]:
        return "whole on every rank"
    parts = [f"{_said(r)} {_place(owners == r)}" for r in ranks]
    return listed(parts)


def _place(mask):
    """'rows 0–1' or 'rows 0–1, columns 2–3' of a block."""
    spans = []
    for name, hit, length in (("row", mask.any(1), mask.shape[0]), ("column", mask.any(0), mask.shape[1])):
        at = np.flatnonzero(hit)
        if len(at) < length:
            spans.append(f"{name} {at[0]}" if len(at) == 1 else f"{name}s {at[0]}–{at[-1]}")
    return ", ".join(spans) or "all of it"


def _block(values, mask):
    """The numbers of a block as text."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return brief(values[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _who(axes, x, y, rank):
    if rank == EVERY:
        block(axes, x, y - 0.09, 0.5, 0.18, palette.NEUTRAL)
        write_left(axes, x + 0.58, y, "every rank")
    else:
        chip(axes, x + 0.31, y, rank)


def _matrix(axes, values, owners, x, y, wide, tall):
    """Numbers in cells of their owners' colours; colours alone where there is no room for numbers."""
    room = wide > 0.2 and tall > 0.13
    for (i, j), value in np.ndenumerate(values):
        owner = int(owners[i, j])
        fill = palette.NEUTRAL if owner == EVERY else palette.rank_colour(owner)
        text = number(value) if room else ""
        block(axes, x + j * wide, y + i * tall, wide, tall, fill, text, 8.5, line=0.4 if room else 0.15,
              hatch=palette.rank_hatch(max(owner, 0)))  # fmt: skip
    if not values.size:
        block(axes, x, y, max(wide, 0.2), max(tall, 0.2), palette.PAPER, "", dashed=True)
