"""Who holds what: tensors cut into blocks, coloured by the rank that owns them."""

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from . import palette
from .figure import (
    WIDTH,
    Picture,
    block,
    chip,
    fit,
    heading,
    heading_width,
    paint,
    shades,
    sheet,
    text_width,
    write,
    write_left,
)
from .values import array, brief, number, per_rank, shape

FEW = 64  # cells that still have room for their values
LEFT, TOP, GAP = 0.95, 0.55, 0.1  # inches: room for labels, for the heading, between two shards


def shards(parts, owners=None, *, dim=0, title=""):
    """The whole tensor, cut, every block coloured and labelled with the rank that holds it.

    shards([t0, t1, t2, t3], dim=0): one array per rank, joined in place along `dim`; they may be uneven or empty.
    shards((6, 4), owners): a shape (or the whole array) and who owns it: rank numbers, broadcastable to the shape.
    Values are printed where there are at most 64, else drawn as shades.
    Raises ValueError where shards do not fit together or owners do not fit the shape.
    """
    if owners is not None:
        return _owned(parts, owners, title)
    parts = per_rank(parts, "shards")
    if any(part is None or part.ndim == 0 for part in parts):
        raise ValueError("shards: every rank needs an array with at least one dimension")
    rows = [{"rank": rank, "shape": shape(part), "values": brief(part)} for rank, part in enumerate(parts)]
    flat, axis = _as_matrices(parts, dim)
    try:
        whole = np.concatenate(parts, axis=dim)
    except ValueError:
        shapes = ", ".join(f"rank {r} {shape(p)}" for r, p in enumerate(parts))
        raise ValueError(f"shards: these cannot be joined along dim {dim}: {shapes}") from None
    note = f"shape {shape(whole)}, cut along dimension {dim}"
    alt = f"{title or 'A tensor'}: {note}. " + " ".join(f"Rank {row['rank']}: {row['values']}." for row in rows)
    few = whole.size <= FEW and max(m.shape[0] for m in flat) <= 12 and max(_spread(flat, axis)) <= 16
    lengths = _lengths(flat, axis, few)
    across = sum(lengths) + GAP * (len(flat) - 1)
    depth = (0.4 * flat[0].shape[0] if few else 2.2) if axis else (0.62 * flat[0].shape[1] if few else 4.5)
    height = TOP + (0.35 + depth if axis else across) + 0.2
    width = max(LEFT + (across if axis else depth) + 0.2, heading_width(title, note))

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, note)
        at = LEFT if axis else TOP
        for rank, (part, length) in enumerate(zip(flat, lengths, strict=True)):
            x, y, w, h = (at, TOP + 0.35, length, depth) if axis else (LEFT, at, depth, length)
            chip(axes, *((x + w / 2, TOP + 0.12) if axis else (LEFT / 2, y + h / 2)), rank)
            _matrix(axes, part, x, y, w, h, rank, few, shape(parts[rank]))
            at += length + GAP

    return Picture(paint((width, height), draw), alt, rows, title)


def _as_matrices(parts, dim):
    """Every array as a matrix, and which of its two directions is cut."""
    ndim = parts[0].ndim
    if not -ndim <= dim < ndim:
        raise ValueError(f"shards: dim={dim}, but the arrays have {ndim} dimension(s)")
    split = max(dim % ndim, 1) if ndim > 1 else 0  # dimensions before `split` become rows, the others columns
    matrices = [p.reshape(int(np.prod(p.shape[:split])), int(np.prod(p.shape[split:]))) for p in parts]
    return matrices, 0 if ndim > 1 and dim % ndim == 0 else 1


def _spread(matrices, axis):
    return [sum(m.shape[1] for m in matrices)] if axis else [m.shape[1] for m in matrices]


def _lengths(matrices, axis, few):
    """Inches that each shard gets along the cut: by its share, but never too thin to be seen."""
    counts = [m.shape[axis] for m in matrices]
    room = (WIDTH - LEFT - 0.2 if axis else 3.0) - GAP * (len(counts) - 1)
    least = 0.62 if axis else 0.3
    if few:
        return [max(least, min(0.62 if axis else 0.34, room / sum(counts)) * n) for n in counts]
    return [max(least, room * n / sum(counts)) for n in counts]


def _matrix(axes, values, x, y, width, height, rank, few, label):
    """One shard: its values in cells, or shades of the rank's colour under its shape."""
    fill, rows, columns = palette.rank_colour(rank), *values.shape
    if not values.size:
        block(axes, x, y, width, height, palette.PAPER, f"empty {label}", 8, dashed=True)
    elif few:
        for (i, j), value in np.ndenumerate(values):
            block(
                axes,
                x + j * width / columns,
                y + i * height / rows,
                width / columns,
                height / rows,
                fill,
                number(value),
                line=0.5,
                hatch=palette.rank_hatch(rank),
            )
        block(axes, x, y, width, height, "none", line=1.6)
    else:
        _shades(axes, values, x, y, width, height, fill)
        block(axes, x, y, width, height, "none", line=1.6)
        write(axes, x + width / 2, y + height / 2, label, width - 0.1, back=palette.PAPER)


def _shades(axes, values, x, y, width, height, colour):
    """A matrix as an image from pale (its smallest value) to `colour`."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    ramp = LinearSegmentedColormap.from_list("ramp", [palette.mix(palette.PAPER, colour, 0.15), colour])
    shades(axes, values, x, y, width, height, ramp, low, max(high, low + 1e-30))


def _owned(whole, owners, title):
    """shards() for a shape and a map of owners: rectangular tiles between the lines where the owner changes."""
    try:
        values = None if np.ndim(whole) == 1 and not hasattr(whole, "shape") else array(whole, "shards")
        dims = tuple(int(n) for n in whole) if values is None else values.shape
        owners = np.broadcast_to(array(owners, "shards, owners"), dims)
    except (TypeError, ValueError) as error:
        raise ValueError(f"shards: owners must be rank numbers that broadcast to the shape ({error})") from None
    if owners.dtype.kind not in "iu" or not owners.size or owners.min() < 0:
        raise ValueError("shards: owners must be whole rank numbers from 0 on, and there must be some")
    as_matrix = (1, -1) if owners.ndim < 2 else (-1, owners.shape[-1])
    map_, values = owners.reshape(as_matrix), None if values is None else values.reshape(as_matrix)
    few = owners.size <= FEW and max(map_.shape) <= 16
    row_cuts, column_cuts = _cuts(map_, few), _cuts(map_.T, few)
    ranks, counts = np.unique(owners, return_counts=True)
    rows = [{"rank": int(r), "elements": int(n)} for r, n in zip(ranks, counts, strict=True)]
    sizes = ", ".join(f"rank {row['rank']} owns {row['elements']}" for row in rows)
    note = f"shape {shape(owners)}, each block with the rank that owns it"
    alt = f"{title or 'A tensor'}: shape {shape(owners)}; of its {owners.size} elements {sizes}."
    if len(row_cuts) * len(column_cuts) > 1024:
        raise ValueError("shards: owners change too often to draw (more than 1024 tiles); draw a part of it")
    width = min(WIDTH - 0.6, 0.72 * map_.shape[1]) if few else 5.5
    depth = min(4.0, 0.44 * map_.shape[0]) if few else 2.6

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, note)
        for top, bottom in zip(row_cuts, row_cuts[1:] + [map_.shape[0]], strict=True):
            for left, right in zip(column_cuts, column_cuts[1:] + [map_.shape[1]], strict=True):
                _tile(axes, map_, values if few else None, (top, bottom, left, right), width, depth)

    size = max(0.6 + width, heading_width(title, note)), TOP + depth + 0.25
    return Picture(paint(size, draw), alt, rows, title)


def _cuts(owners, every):
    """First index of every run of equal rows."""
    return [i for i in range(len(owners)) if every or i == 0 or (owners[i] != owners[i - 1]).any()]


def _tile(axes, owners, values, where, width, depth):
    top, bottom, left, right = where
    rank = int(owners[top, left])
    label = f"rank {rank}" if values is None else f"{number(values[top, left])}\nr{rank}"
    tall, wide = depth / owners.shape[0], width / owners.shape[1]
    w = (right - left) * wide
    if values is None and text_width(label, 7) > w - 0.06:
        label = f"r{rank}"
    block(
        axes,
        0.3 + left * wide,
        TOP + top * tall,
        w,
        (bottom - top) * tall,
        palette.rank_colour(rank),
        label,
        8 if values is None else 7.5,
        line=0.6,
        hatch=palette.rank_hatch(rank),
    )


def held(stages, *, came_from=None, title=""):
    """What each rank holds, side by side: ranks as rows, named tensors (or moments: before, after) as columns.

    stages: {"before": [t0, t1, …], "after": […]}, one array per rank, None where a rank holds nothing.
    came_from: {"after": [rank or None, …]} the rank that each value came from (an array of ranks for value by value;
    None or -1: from several, drawn neutral). Without it, a rank's values have its own colour.
    Raises ValueError where the lists differ in length.
    """
    came_from = came_from or {}
    if not isinstance(stages, dict) or not stages:
        raise ValueError("held: expected {name: [one array per rank]}")
    columns = {name: per_rank(values, f"held, {name}") for name, values in stages.items()}
    world = len(next(iter(columns.values())))
    if any(len(values) != world for values in columns.values()):
        raise ValueError("held: " + ", ".join(f"{n} has {len(v)} ranks" for n, v in columns.items()))
    sources = {name: _sources(values, came_from.get(name), name) for name, values in columns.items()}
    rows = [
        {"rank": r} | {name: "nothing" if v[r] is None else brief(v[r]) for name, v in columns.items()}
        for r in range(world)
    ]
    alt = f"{title or 'What each rank holds'}. " + " ".join(
        f"Rank {row['rank']}: " + "; ".join(f"{name} {row[name]}" for name in columns) + "." for row in rows
    )
    lines = max(
        [v.shape[0] for values in columns.values() for v in values if v is not None and _small(v) and v.ndim == 2] + [1]
    )
    most = (WIDTH - LEFT - 0.15) / len(columns)
    rooms = [min(most, 0.25 + max(_room(name, v) for v in values)) for name, values in columns.items()]
    width = max(LEFT + sum(rooms) + 0.1, heading_width(title))
    tall = max(0.46, (0.4 if came_from else 0.3) * lines)
    height = 0.8 + world * (tall + 0.12) + 0.1

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title)
        x = LEFT
        for room, (name, values) in zip(rooms, columns.items(), strict=True):
            write_left(axes, x, 0.6, *fit(name, room - 0.1, 10))
            for rank, value in enumerate(values):
                y = 0.8 + rank * (tall + 0.12)
                if x == LEFT:
                    chip(axes, LEFT / 2, y + tall / 2, rank)
                _values(axes, value, sources[name][rank], x, y, room - 0.2, tall, name in came_from)
            x += room

    return Picture(paint((width, height), draw), alt, rows, title)


def _room(name, values):
    """Inches that one column of `held` wants."""
    cells = 2 if values is None or not _small(values) else np.atleast_2d(values).shape[1]
    return max(0.8 * cells, text_width(name, 10))


def _small(values):
    return values.ndim <= 2 and 0 < values.size <= FEW and values.shape[-1:] <= (16,) and values.shape[:-1] <= (12,)


def _sources(values, given, name):
    """For every rank an array of source ranks, shaped like its values; -1: from several."""
    if given is None:
        given = range(len(values))
    if len(given) != len(values):
        raise ValueError(f"held: came_from[{name!r}] has {len(given)} entries for {len(values)} ranks")
    return [
        None if v is None else np.broadcast_to(array(-1 if g is None else g, "held, came_from"), v.shape)
        for v, g in zip(values, given, strict=True)
    ]


def _values(axes, values, sources, x, y, width, height, named):
    """One tensor of one rank; `named`: say in words, too, which rank each value came from."""
    if values is None or not values.size:
        return block(axes, x, y, width, height, palette.PAPER, "nothing", edge=palette.LINE, dashed=True)
    if not _small(values):
        owner = int(sources.flat[0])
        fill = palette.rank_colour(owner) if (sources == owner).all() and owner >= 0 else palette.NEUTRAL
        text = shape(values) + (f"\nfrom rank {owner}" if named and fill != palette.NEUTRAL else "")
        return block(axes, x, y, width, height, fill, text, hatch=palette.rank_hatch(max(owner, 0)))
    matrix, sources = (np.atleast_2d(a) for a in (values, sources))
    wide, tall = min(0.8, width / matrix.shape[1]), height / matrix.shape[0]
    for (i, j), value in np.ndenumerate(matrix):
        owner = int(sources[i, j])
        fill = palette.rank_colour(owner) if owner >= 0 else palette.NEUTRAL
        text = number(value) + (f"\nr{owner}" if named and owner >= 0 else "")
        block(axes, x + j * wide, y + i * tall, wide, tall, fill, text, hatch=palette.rank_hatch(max(owner, 0)))
