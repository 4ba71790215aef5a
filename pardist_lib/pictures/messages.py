"""Who sees which number: a row for each party, a column for each part of its message."""

from . import palette
from .figure import WIDTH, Picture, block, fit, heading, paint, sheet, write, write_left

KINDS = {  # of a cell: (colour, hatch, what it means)
    "secret": (palette.NEUTRAL, "", "known to the client alone"),
    "sent": (palette.SKY, "", "the server sees it"),
    "restored": (palette.YELLOW, "", "restored from shares"),
    "result": (palette.GREEN, "", "the result"),
    "gone": (palette.PAPER, "////", "never arrives"),
}
LEFT, TOP, TALL = 1.15, 0.62, 0.36  # inches


def messages(columns, rows, *, title="", note="", line=""):
    """A table whose cells say who knows them, by colour, hatch and legend.

    columns: their names.  rows: {label: cells}, a cell (text, kind), or None where there is nothing; kinds: "secret",
    "sent", "restored", "result", "gone".  line: a sentence below.
    Raises ValueError for an unknown kind or a row that has not as many cells as there are columns.
    """
    for label, cells in rows.items():
        if len(cells) != len(columns):
            raise ValueError(f"messages, {label}: {len(cells)} cells for {len(columns)} columns")
        for cell in cells:
            if cell is not None and cell[1] not in KINDS:
                raise ValueError(f"messages, {label}: {cell[1]!r} is none of {', '.join(KINDS)}")
    wide = (WIDTH - LEFT - 0.15) / len(columns)
    used = [kind for kind in KINDS if any(cell and cell[1] == kind for cells in rows.values() for cell in cells)]
    height = TOP + 0.3 + len(rows) * (TALL + 0.06) + (0.32 if line else 0.05)

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, note)
        x = 0.15
        for kind in used:
            fill, hatch, meaning = KINDS[kind]
            block(axes, x, 0.46, 0.26, 0.16, fill, hatch=hatch)
            x = write_left(axes, x + 0.32, 0.545, meaning, 8) + 0.2
        for j, name in enumerate(columns):
            name, size = fit(name, wide - 0.05, 8.5)
            axes.text(LEFT + (j + 0.5) * wide - 0.03, TOP + 0.24, name, size=size, color=palette.MUTED, ha="center")
        for i, (label, cells) in enumerate(rows.items()):
            y = TOP + 0.32 + i * (TALL + 0.06)
            write(axes, LEFT / 2, y + TALL / 2, label, LEFT - 0.1, 9)
            for j, cell in enumerate(cells):
                if cell is not None:
                    text, kind = cell
                    fill, hatch, _ = KINDS[kind]
                    block(axes, LEFT + j * wide, y, wide - 0.06, TALL, fill, str(text), 9.5, hatch=hatch)
        if line:
            write_left(axes, 0.15, height - 0.17, line, 9)

    said = "; ".join(
        f"{label}: " + (", ".join(f"{c} {cell[0]} ({KINDS[cell[1]][2]})" for c, cell in zip(columns, cells, strict=True)
                                  if cell) or "nothing yet")
        for label, cells in rows.items()
    )  # fmt: skip
    table = [{"who": label} | {c: cell[0] if cell else "" for c, cell in zip(columns, cells, strict=True)}
             for label, cells in rows.items()]  # fmt: skip
    alt = f"{title or 'Messages'}. {line}{' ' if line else ''}{said}."
    return Picture(paint((WIDTH, height), draw), alt, table, title)
