"""A table that shows itself: HTML in a notebook, aligned columns in a terminal."""

import re
from html import escape
from math import floor, isfinite, log10
from numbers import Integral, Real


class Table:
    """Rows of data with named columns.

    rows: list of dicts; columns in order of first appearance, a missing key is an empty cell.
    The fractions of a column have the same number of decimals.
    caption: one line above the table.  Raises ValueError where a row is no dict.
    """

    def __init__(self, rows, caption=""):
        self.rows = list(rows)
        if not all(isinstance(row, dict) for row in self.rows):
            raise ValueError("Table: every row must be a dict {column: value}")
        self.caption = caption
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))

    def column(self, name):
        """The values of one column, top to bottom; KeyError for a name that no row has."""
        if name not in self.columns:
            raise KeyError(f"no column {name!r}; there are {', '.join(map(str, self.columns))}")
        return [row.get(name) for row in self.rows]

    def __len__(self):
        return len(self.rows)

    def _repr_html_(self):
        head = "".join(
            f'<th scope="col" style="text-align:{self._side(c)}">{escape(str(c))}</th>' for c in self.columns
        )
        sides = {c: f'style="text-align:{self._side(c)}"' for c in self.columns}
        body = "".join(
            "<tr>"
            + "".join(f"<td {sides[c]}>{escape(text)}</td>" for c, text in zip(self.columns, row, strict=True))
            + "</tr>"
            for row in self._texts()
        )
        caption = f'<caption style="text-align:left">{escape(self.caption)}</caption>' if self.caption else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __repr__(self):
        grid = [[str(c) for c in self.columns], *self._texts()]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        sides = [str.rjust if self._side(c) == "right" else str.ljust for c in self.columns]
        lines = [
            "  ".join(side(text, width) for side, text, width in zip(sides, line, widths, strict=True)).rstrip()
            for line in grid
        ]
        lines.insert(1, "  ".join("─" * width for width in widths))
        return "\n".join(([self.caption] if self.caption else []) + lines)

    def _texts(self):
        places = {c: self._places(c) for c in self.columns}
        return [[cell(row.get(c), places[c]) for c in self.columns] for row in self.rows]

    def _places(self, name):
        """Decimals of a column of fractions, alike in all its rows: three digits of the smallest; None for others."""
        values = [row[name] for row in self.rows if row.get(name) is not None]
        if not all(isinstance(v, Real) and not isinstance(v, bool) and isfinite(v) for v in values):
            return None
        sizes = [abs(float(v)) for v in values if v]
        if not sizes or all(isinstance(v, Integral) for v in values) or max(sizes) > 1e4 * min(sizes):
            return None
        return min(max(2 - floor(log10(min(sizes))), 0), 6)

    def _side(self, name):
        values = [row[name] for row in self.rows if row.get(name) is not None]
        return "right" if values and all(map(_is_number, values)) else "left"


_NUMBER = re.compile(r"[-+−±]?\d[\d,.]*( ?(%|×|[A-Za-z/]+))?")  # as a text, with a unit: "1,813", "67%", "8.1 ms"


def _is_number(value):
    if isinstance(value, str):
        return _NUMBER.fullmatch(value) is not None
    return isinstance(value, Real) and not isinstance(value, bool)


def cell(value, places=None):
    """One value as text: whole numbers with thousands, other numbers with `places` decimals, or to four digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if places is not None and isinstance(value, Real):
        return f"{float(value):,.{places}f}"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    return f"{float(value):.4g}" if isinstance(value, Real) else str(value)
