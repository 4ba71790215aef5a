"""Activations on their way through a layer: at each place, what of them a rank has."""

from matplotlib.patches import FancyArrowPatch

from . import palette
from .figure import Picture, block, heading, heading_width, paint, sheet, text_width, write
from .values import count

HELD = {
    "whole": "whole on every rank",
    "features": "split along features",
    "positions": "split along the sequence",
    "summands": "a summand on every rank",
}
SIDE, TOP, ROW, BETWEEN, SENT = 0.66, 1.12, 1.42, 0.42, 1.12  # inches: a tile, the first row, a row, two arrows


def activations(ways, *, ranks=4, title="", note="positions down, features across"):
    """Rows of tiles, one row a way to compute a layer; a tile is the activations at one place.

    ways: {name: [(what, held), …]}, in order; held is "whole", "features", "positions" or "summands", or "sent" for a
    collective between two tiles. A split tile has the ranks' colours, in columns for features, in rows for positions.
    Raises ValueError for another `held`, or where there is nothing to draw.
    """
    if not ways or not all(ways.values()):
        raise ValueError("activations: expected {name of a way: [(what, held), …]}")
    if wrong := [held for places in ways.values() for _, held in places if held not in (*HELD, "sent")]:
        raise ValueError(f"activations: {wrong[0]!r} is not one of {', '.join((*HELD, 'sent'))}")
    rows = [{"way": way, "place": i + 1, "what": what, "held": HELD.get(held, "sent")}
            for way, places in ways.items() for i, (what, held) in enumerate(places)]  # fmt: skip
    alt = f"{title or 'Activations'} on {count(ranks, 'rank')}. " + " ".join(
        f"{way}: " + ", then ".join(f"{what} ({HELD.get(held, 'sent')})" for what, held in places) + "."
        for way, places in ways.items()
    )
    wide = max(map(_width, ways.values()))
    used = [held for held in HELD if any(held == h for places in ways.values() for _, h in places)]

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, note)
        _legend(axes, used, ranks)
        for row, (way, places) in enumerate(ways.items()):
            y = TOP + row * ROW
            axes.text(0.15, y - 0.14, way, size=9, weight="bold", va="center")
            _row(axes, places, y, ranks)

    size = max(wide + 0.5, heading_width(title, note), _legend_width(used)), TOP + len(ways) * ROW - 0.2
    return Picture(paint(size, draw), alt, rows, title)


def _width(places):
    sent = sum(held == "sent" for _, held in places)
    arrows = sum("sent" not in (a[1], b[1]) for a, b in zip(places, places[1:], strict=False))
    return SIDE * (len(places) - sent) + SENT * sent + BETWEEN * arrows


def _row(axes, places, y, ranks):
    x, before = 0.25, None
    for what, held in places:
        if held == "sent":
            _arrow(axes, x + 0.08, x + SENT - 0.08, y + SIDE / 2, 2.2)
            write(axes, x + SENT / 2, y + SIDE / 2 - 0.17, what, SENT - 0.1, 8.5)
            x += SENT
        else:
            if before not in (None, "sent"):
                _arrow(axes, x + 0.05, x + BETWEEN - 0.05, y + SIDE / 2, 1.0)
                x += BETWEEN
            _tile(axes, x, y, SIDE, held, ranks)
            write(axes, x + SIDE / 2, y + SIDE + 0.17, what, SIDE + 0.42, 8.5)
            x += SIDE
        before = held


def _tile(axes, x, y, side, held, ranks):
    if held in ("features", "positions"):
        part = side / ranks
        for rank in range(ranks):
            place = (x + rank * part, y, part, side) if held == "features" else (x, y + rank * part, side, part)
            block(axes, *place, palette.rank_colour(rank), line=0.5, hatch=palette.rank_hatch(rank))
        block(axes, x, y, side, side, "none", line=1.4)
    else:
        block(axes, x, y, side, side, palette.NEUTRAL, line=1.4, hatch="////" if held == "summands" else "")


def _arrow(axes, start, end, y, width):
    axes.add_artist(FancyArrowPatch((start, y), (end, y), color=palette.INK, lw=width, shrinkA=0, shrinkB=0,
                                   arrowstyle="-|>", mutation_scale=9 + 2 * width))  # fmt: skip


def _legend(axes, used, ranks):
    x = 0.25
    for held in used:
        _tile(axes, x, 0.46, 0.22, held, ranks)
        axes.text(x + 0.3, 0.57, HELD[held], size=8.5, va="center")
        x += 0.5 + text_width(HELD[held], 8.5)


def _legend_width(used):
    return 0.35 + sum(0.5 + text_width(HELD[held], 8.5) for held in used)
