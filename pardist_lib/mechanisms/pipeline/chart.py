"""A schedule's picture, as SVG text: a line for each rank, a box for each action, as wide as it lasts.

Opaque, with its own paper, so that it reads the same in light and dark notebooks. Nothing but text is made here.
"""

from html import escape

from .action import KINDS

PAPER, INK, LINE = "#fafaf8", "#1a1a1a", "#b8b8b2"
# None is a rank's colour. Forward is green; all that is backward is of one family. The second: the text upon it.
COLOURS = {"F": ("#b3de69", "#000"), "B": ("#5f0f40", "#fff"), "I": ("#7f6a93", "#fff"), "W": ("#cbbbdc", "#000")}
LEFT, TOP, ROW, BOX = 58, 56, 28, 22  # pixels: beside and above the boxes, from line to line, a box's height
LETTER = 7  # pixels: of text that is 11 pixels high, on average a little less
WIDEST = 8000  # pixels: where the boxes would be wider they become too narrow for their words, which are left out


class Chart:
    """timed: as Schedule.times returns; words: what is seen, told in a line; scale: pixels a second, or None for as
    many as the words in the boxes need. `svg`: the picture as text."""

    def __init__(self, timed, words, scale=None):
        self.words = words
        self.svg = _draw(timed, words, scale)

    def _repr_html_(self):
        """Wide pictures scroll; an image that were shrunk to the page could not be read."""
        return f'<div style="overflow-x:auto">{self.svg}</div>'

    def __repr__(self):
        return self.words


def _draw(timed, words, scale):
    many = any(row[0][0].stage != action.stage for row in timed for action, _, _ in row)  # several stages on a rank
    boxes = [
        (action.kind, str(action) if many else f"{action.kind}{action.micro_batch}", rank, start, end - start)
        for rank, row in enumerate(timed)
        for action, start, end in row
    ]
    length = max(start + seconds for *_, start, seconds in boxes) or 1
    room = [(len(label) * LETTER + 6) / seconds for _, label, _, _, seconds in boxes if seconds]
    scale = scale or min(max(room, default=1), WIDEST / length)
    kinds = [kind for kind in KINDS if any(kind == box[0] for box in boxes)]
    legend = [f"{kind} {KINDS[kind]}" for kind in kinds]
    width = max(LEFT + length * scale, len(words) * LETTER, sum(len(text) * LETTER + 34 for text in legend)) + 12
    height = TOP + ROW * len(timed) + 4

    drawn = [f'<rect width="100%" height="100%" fill="{PAPER}"/>', _text(8, 18, words, 'font-weight="bold"')]
    x = 8
    for kind, text in zip(kinds, legend, strict=True):
        drawn += [f'<path d="M{x} 30h14v14h-14z" fill="{COLOURS[kind][0]}" stroke="{INK}"/>', _text(x + 20, 41, text)]
        x += round(len(text) * LETTER) + 34
    for rank in range(len(timed)):
        y = TOP + ROW * rank
        drawn += [
            _text(8, y + 15, f"rank {rank}"),
            f'<path d="M{LEFT} {y + BOX}h{length * scale:.1f}" stroke="{LINE}"/>',
        ]
    for kind in kinds:  # one path, and one group of words, for all boxes of a kind: a quarter of the bytes
        fill, ink = COLOURS[kind]
        path, labels = "", ""
        for _, label, rank, start, seconds in (box for box in boxes if box[0] == kind):
            x, y, wide = LEFT + start * scale, TOP + ROW * rank, seconds * scale
            path += f"M{x:.1f} {y}h{wide:.1f}v{BOX}h{-wide:.1f}z"
            if wide >= len(label) * LETTER:
                labels += _text(f"{x + wide / 2:.1f}", y + 15, label)
        drawn += [f'<path d="{path}" fill="{fill}" stroke="{PAPER}"/>']
        drawn += [f'<g fill="{ink}" text-anchor="middle">{labels}</g>']
    said = escape(words)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" role="img" aria-label="{said}"'
        f' style="max-width:none" font-family="sans-serif" font-size="11" fill="{INK}"><title>{said}</title>'
        f"{''.join(drawn)}</svg>"
    )


def _text(x, y, text, more=""):
    return f'<text x="{x}" y="{y}" {more}>{escape(text)}</text>'.replace(" >", ">")
