"""Small grey images in rows: what was there, what somebody made of it."""

from matplotlib import colormaps

from . import palette
from .figure import WIDTH, Picture, block, heading, paint, shades, sheet, write
from .values import array, count, listed

GREY = colormaps["Greys"]
LEFT, TOP = 2.15, 0.55  # inches


def images(rows, *, title="", note="", low=None, high=None, most=10):
    """Rows of small images with a label before each, all on one scale: white is `low`, black is `high`.

    rows: {"the client's digits": array (k, height, width), …}; the first `most` of each are drawn. A label may have
    two lines.  low, high: by default the first row's smallest and largest value; what lies beyond is cut off.
    Raises ValueError for no images, or an array that is no list of images.
    """
    if not isinstance(rows, dict) or not rows:
        raise ValueError("images: expected {label: array (images, height, width)}")
    rows = {str(label): array(values, f"images, {label}").astype(float) for label, values in rows.items()}
    for label, values in rows.items():
        if values.ndim != 3 or not values.size:
            raise ValueError(f"images, {label}: expected (images, height, width), got {values.shape}")
    first = next(iter(rows.values()))
    low = float(first.min()) if low is None else low
    high = float(first.max()) if high is None else high
    drawn = min(most, max(len(values) for values in rows.values()))
    side = min(0.8, (WIDTH - LEFT - 0.15) / drawn - 0.06)
    lines = [label.replace("\n", " ") for label in rows]
    alt = f"{title or 'Images'}: {count(len(rows), 'row')} of up to {drawn} images: {listed(lines)}."
    table = [{"row": line, "images": len(v), "smallest": float(v.min()), "largest": float(v.max())}
             for line, v in zip(lines, rows.values(), strict=True)]  # fmt: skip

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, note)
        for i, (label, values) in enumerate(rows.items()):
            y = TOP + i * (side + 0.12)
            write(axes, LEFT / 2, y + side / 2, label, LEFT - 0.2, 8.5)
            for j, image in enumerate(values[:drawn]):
                x = LEFT + j * (side + 0.06)
                shades(axes, image, x, y, side, side, GREY, low, high if high > low else low + 1)
                block(axes, x, y, side, side, "none", edge=palette.LINE, line=0.6)

    return Picture(paint((WIDTH, TOP + len(rows) * (side + 0.12) + 0.05), draw), alt, table, title)
