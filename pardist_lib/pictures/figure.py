"""What every picture is made of: `Picture`, the object that shows itself, and a few strokes to draw with.

Matplotlib is used without pyplot: no global figure list, no backend switch, the reader's own settings untouched.
"""

import base64
import io
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np
from IPython.display import display
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.textpath import TextToPath
from PIL import Image

from . import palette
from .table import Table

WIDTH = 8.0  # inches
DPI = 144  # pixels drawn per inch …
SHOWN = 100  # … and pixels shown per inch, so that figures are sharp on dense screens too
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": palette.INK,
    "axes.facecolor": palette.PAPER,
    "axes.edgecolor": palette.LINE,
    "axes.labelcolor": palette.INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": palette.MUTED,
    "ytick.color": palette.MUTED,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure. Shows itself in notebooks; prints as its description; `.table()` has the same data.

    png: the image; alt: what is seen, in words; rows: the data, one dict a row; caption: its title;
    text: what a terminal shows, where that can be better than `alt`.
    """

    png: bytes = field(repr=False)
    alt: str
    rows: list = field(repr=False, default_factory=list)
    caption: str = field(repr=False, default="")
    text: str = field(repr=False, default="")

    def table(self):
        """The same data as a `Table`."""
        return Table(self.rows, self.caption)

    def save(self, path):
        """Write the PNG to `path`, which must end in .png."""
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"save: {str(path)!r} must end in .png")
        Path(path).write_bytes(self.png)

    def _ipython_display_(self):
        data, metadata = self._repr_mimebundle_()
        display(data, raw=True, metadata=metadata)
        display({"text/html": self.in_words(), "text/plain": ""}, raw=True)

    def in_words(self):
        """The alt text as HTML, folded, to stand below the image: of an output's metadata no page shows it (JupyterLab,
        nbconvert), and an <img> of our own, with its data in it, may be taken out where a notebook is only read."""
        return (
            '<details style="font-size:85%;opacity:.75"><summary>in words</summary>'
            f"{escape(self.alt, quote=False)}</details>"
        )

    def _repr_mimebundle_(self, include=None, exclude=None):
        width = int.from_bytes(self.png[16:20])  # the PNG header's own width field
        data = {"image/png": base64.b64encode(self.png).decode(), "text/plain": repr(self)}
        return data, {"image/png": {"width": round(width * SHOWN / DPI), "alt": self.alt}}

    def __repr__(self):
        return self.text or self.alt


def paint(size, draw):
    """Call draw(figure) on a figure of `size` inches and return it as PNG bytes."""
    with style.context(["default", STYLE]):
        figure = Figure(figsize=size, dpi=DPI, facecolor=palette.PAPER)
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        return compress(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))


def compress(image, most=100_000):
    """PNG bytes of an RGB image: 128 colours (a third of the size, no visible loss), fewer where it stays heavy."""
    for colours in (128, 64, 32, 16):
        out = io.BytesIO()
        image.quantize(colours, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE).save(
            out, "png", optimize=True
        )
        if out.tell() <= most:
            break
    return out.getvalue()


def sheet(figure):
    """Axes over the whole figure in inches, y downwards from the top: for pictures made of boxes."""
    axes = figure.add_axes((0, 0, 1, 1))
    width, height = figure.get_size_inches()
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return axes


def heading(axes, title, note="", x=0.15, y=0.24):
    """A bold title and, beside it, a quieter note."""
    title, size = fit(title, axes.figure.get_figwidth() - 2 * x, 11, bold=True)
    axes.text(x, y, title, size=size, weight="bold", va="center")
    left = x + (text_width(title, size, True) + 0.15 if title else 0)
    note, size = fit(note, axes.figure.get_figwidth() - left - 0.1, 9)
    axes.text(left, y, note, size=size, color=palette.MUTED, va="center")


def heading_width(title, note=""):
    """Inches that `heading` needs, at most WIDTH: for figures as wide as what they show."""
    return min(WIDTH, 0.45 + text_width(title, 11, True) + text_width(note, 9))


def block(axes, x, y, width, height, fill, text="", size=9, edge=palette.INK, line=0.8, hatch="", dashed=False):
    """A filled rectangle with text that is made to fit."""
    axes.add_artist(
        Rectangle(
            (x, y),
            width,
            height,
            facecolor=fill,
            edgecolor=edge,
            linewidth=line,
            linestyle=(0, (3, 2)) if dashed else "solid",
        )
    )
    if hatch:
        axes.add_artist(
            Rectangle(
                (x, y), width, height, fill=False, edgecolor=palette.text_on(fill), linewidth=0, hatch=hatch, alpha=0.45
            )
        )
    if text:
        write(
            axes,
            x + width / 2,
            y + height / 2,
            text,
            width - 0.06,
            size,
            palette.text_on(fill),
            back=fill if hatch else None,
        )


def shades(axes, values, x, y, width, height, colours, low, high, most=96):
    """A matrix as an image, NaN in black; more than `most` rows or columns are averaged in equal groups."""
    values = np.asarray(values, float)
    for axis in (0, 1):
        many = values.shape[axis]
        if many > most:
            starts = np.linspace(0, many, most, endpoint=False).astype(int)
            sizes = np.diff(np.append(starts, many))
            values = np.add.reduceat(values, starts, axis) / np.expand_dims(sizes, 1 - axis)
    axes.imshow(
        values,
        cmap=colours.with_extremes(bad=palette.BLACK),
        vmin=low,
        vmax=high,
        interpolation="nearest",
        extent=(x, x + width, y + height, y),
        aspect="auto",
        zorder=0.5,
    )
    axes.set(xlim=(0, axes.figure.get_figwidth()), ylim=(axes.figure.get_figheight(), 0))  # imshow narrows them


def write(axes, x, y, text, width, size=9, colour=palette.INK, back=None):
    """Centred text of one or more lines, shrunk and at last shortened until it is `width` inches wide."""
    lines = [fit(line, width, size) for line in str(text).split("\n")]
    axes.text(
        x,
        y,
        "\n".join(line for line, _ in lines),
        size=min(s for _, s in lines),
        color=colour,
        ha="center",
        va="center",
        linespacing=1.25,
        bbox=back and {"facecolor": back, "edgecolor": "none", "pad": 1.5},
    )


def write_left(axes, x, y, text, size=8.5):
    """One line that begins at x, shrunk to the room there is; returns where it ends."""
    text, size = fit(text, axes.figure.get_figwidth() - x - 0.05, size)
    axes.text(x, y, text, size=size, va="center")
    return x + text_width(text, size)


def chip(axes, x, y, rank, width=0.62, height=0.23):
    """The label 'rank r' in its rank's colour, centred at (x, y)."""
    fill = palette.rank_colour(rank)
    axes.add_artist(
        FancyBboxPatch(
            (x - width / 2 + 0.05, y - height / 2 + 0.05),
            width - 0.1,
            height - 0.1,
            boxstyle="round,pad=0.05",
            facecolor=fill,
            edgecolor=palette.INK,
            linewidth=0.6,
        )
    )
    write(axes, x, y, f"rank {rank}", width - 0.06, 8.5, palette.text_on(fill))


@lru_cache(4096)
def text_width(text, size, bold=False):
    """Width in inches of one line of text at `size` points."""
    font = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
    return TextToPath().get_text_width_height_descent(text, font, ismath=False)[0] / 72


def fit(text, width, size, smallest=7.2, bold=False):
    """(text, size) that fits in `width` inches: smaller type first (down to 10 px as shown), then an ellipsis."""
    wide = text_width(text, size, bold)
    if wide <= width:
        return text, size
    if wide * smallest / size <= width:
        return text, size * width / wide
    while text and text_width(text + "…", smallest, bold) > width:
        text = text[:-1]
    return text + "…", smallest
