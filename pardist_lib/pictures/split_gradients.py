"""Gradients of split parameters, each rank's part beside the same part of the unsplit one."""

import numpy as np
from matplotlib.colors import to_hex

from . import palette
from .figure import WIDTH, Picture, block, chip, heading, paint, shades, sheet, write_left
from .plots import DIVERGING
from .values import array, number, per_rank, shape

LEFT, TOP, GAP = 1.5, 0.95, 0.07  # inches: room for names, for headings, between two parts
TALL = 0.13, 0.26, 1.15  # inches: a row's height, a single row's, a matrix' at most


def split_gradients(parameters, *, title="gradients"):
    """One line per parameter: on the left its gradient in one process, on the right the ranks' parts, in their places.

    parameters: {name: (whole, parts, dim)}: an array, one array per rank, and the dimension along which they are cut;
    dim None: every rank has the whole one, and the first rank's is drawn.  Vectors are drawn as one row.  Both sides
    of a line have one scale: blue is negative, orange positive. Under each name: the largest difference.
    Raises ValueError where the parts do not make up the whole.
    """
    if not isinstance(parameters, dict) or not parameters:
        raise ValueError("split_gradients: expected {name: (whole, parts, dim)}")
    lines = [_line(str(name), *given) for name, given in parameters.items()]
    shapes = [shape(array(whole, str(name))) for name, (whole, *_) in parameters.items()]
    heights = [min(TALL[2], max(TALL[1], TALL[0] * whole.shape[0])) for _, whole, *_ in lines]
    rows = [
        {"parameter": name, "rank": r, "shape": shape(part), "largest difference": gap}
        for name, _, parts, _, gap, _ in lines
        for r, part in enumerate(parts)
    ]
    alt = f"{title}: one process on the left, the parts of {len(lines[0][2])} ranks on the right. " + " ".join(
        f"{name} {given}, {_cut(axis)}, {_apart(gap, top)}."
        for (name, _, _, axis, gap, top), given in zip(lines, shapes, strict=True)
    )
    side = (WIDTH - LEFT - 0.6) / 2

    def draw(figure):
        axes, y = sheet(figure), TOP
        heading(axes, title, "blue is negative, orange positive")
        write_left(axes, LEFT, 0.62, "in one process", 9.5)
        write_left(axes, LEFT + side + 0.4, 0.62, "on the ranks", 9.5)
        for (name, whole, parts, axis, gap, top), tall in zip(lines, heights, strict=True):
            said = f"{name}\n{_apart(gap, top)}"
            axes.text(0.15, y + tall / 2, said, va="center", linespacing=1.35, size=8.5)
            _heat(axes, whole, LEFT, y, side, tall, top)
            _parts(axes, parts, axis, LEFT + side + 0.4, y, side, tall, top)
            y += tall + 0.42

    return Picture(paint((WIDTH, TOP + sum(heights) + 0.42 * len(heights) - 0.25), draw), alt, rows, title)


def _line(name, whole, parts, dim):
    """(name, whole and parts as matrices, axis of the cut or None, largest difference, largest number)"""
    whole, parts = array(whole, f"split_gradients, {name}"), per_rank(parts, f"split_gradients, {name}")
    if whole.ndim == 1:  # as one row
        whole, parts, dim = whole[None], [part[None] for part in parts], None if dim is None else 1
    if dim is not None:
        dim %= whole.ndim
    try:
        together = parts[0] if dim is None else np.concatenate(parts, dim)
        if whole.ndim != 2 or together.shape != whole.shape:
            raise ValueError(f"shape {together.shape}, where the whole has {whole.shape}")
    except ValueError as error:
        raise ValueError(f"split_gradients, {name}: the parts do not make up the whole ({error})") from None
    gap = max(np.abs(part - whole).max() for part in parts) if dim is None else np.abs(together - whole).max()
    return name, whole, parts, dim, float(gap), float(np.abs(whole).max()) or 1.0


def _apart(gap, top):
    """Rounding apart, equal: a bound that is the same from machine to machine."""
    return "equal" if gap < 1e-6 * top else f"up to {number(gap)} apart"


def _cut(axis):
    return "whole on every rank" if axis is None else f"cut along {'rows' if axis == 0 else 'columns'}"


def _heat(axes, values, x, y, width, height, top, edge=palette.INK, line=0.8):
    few = values.size <= 40 and width / values.shape[1] > 0.33 and height / values.shape[0] > 0.15
    if few:
        tall, wide = height / values.shape[0], width / values.shape[1]
        for (i, j), value in np.ndenumerate(values):
            fill = to_hex(DIVERGING((np.clip(value / top, -1, 1) + 1) / 2))
            block(axes, x + j * wide, y + i * tall, wide, tall, fill, number(value), 7.5, edge=palette.LINE, line=0.4)
    elif values.size:
        shades(axes, values, x, y, width, height, DIVERGING, -top, top)
    block(axes, x, y, width, height, "none", edge=edge, line=line)


def _parts(axes, parts, axis, x, y, width, height, top):
    """Each part framed in its rank's colour and named: above it, or beside it where rows are cut."""
    if axis is None:
        _heat(axes, parts[0], x, y, width, height, top)
        write_left(axes, x, y - 0.11, "every rank", 7.5)
        return
    sizes = [part.shape[axis] for part in parts]
    room = (height if axis == 0 else width) - GAP * (len(parts) - 1)
    at = 0.0
    for rank, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        length = room * size / sum(sizes)
        colour = palette.rank_colour(rank)
        if axis == 0:
            _heat(axes, part, x + 0.62, y + at, width - 0.62, length, top, colour, 2)
            chip(axes, x + 0.27, y + at + length / 2, rank, 0.54, min(0.2, length))
        else:
            _heat(axes, part, x + at, y, length, height, top, colour, 2)
            if length > 0.4:
                chip(axes, x + at + length / 2, y - 0.13, rank, 0.54, 0.18)
        at += length + GAP
