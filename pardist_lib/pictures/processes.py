"""The true process tree: what the notebook started, what torchrun started, what was forked."""

from collections import defaultdict

from matplotlib.patches import FancyBboxPatch

from . import palette
from .figure import WIDTH, Picture, fit, heading, paint, sheet
from .values import count, listed

LINE = 0.46  # inches from one process to the one below


def process_tree(rows, *, title="processes"):
    """Processes as boxes from left to right, each behind the one that started it, ranks in their colours.

    rows: dicts with pid, parent (a pid; of a process not listed for the roots), what (a few words) and optionally
    rank and threads.  Prints as a tree of lines, without pids and thread counts, which differ from run to run; the
    picture and the table have them.  Raises ValueError for missing keys, a pid listed twice, or a circle.
    """
    rows = [dict(row) for row in rows]
    if not rows or not all({"pid", "parent", "what"} <= set(row) for row in rows):
        raise ValueError("process_tree: expected rows with pid, parent and what (and rank, threads where known)")
    if len({row["pid"] for row in rows}) < len(rows):
        raise ValueError("process_tree: a pid is listed twice")
    children, pids = defaultdict(list), {row["pid"] for row in rows}
    for row in sorted(rows, key=lambda row: -1 if row.get("rank") is None else row["rank"]):
        children[row["parent"] if row["parent"] in pids else None].append(row)
    places, lines = {}, []
    _place(None, children, 0, 0.0, "", places, lines)
    if len(places) < len(rows):
        raise ValueError("process_tree: some processes are each other's ancestors")
    deep, tall = 1 + max(depth for depth, _ in places.values()), 1 + max(y for _, y in places.values())
    column = (WIDTH - 0.3) / deep
    box = min(2.3, column - 0.35)
    alt = f"{title}: {count(len(rows), 'process')}. " + " ".join(
        f"{_name(row)} started {listed(_name(child) for child in children[row['pid']])}."
        for row in rows
        if children[row["pid"]]
    )

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, "each was started by the one to its left")
        for row in rows:
            depth, line = places[row["pid"]]
            x, y = 0.2 + depth * column, 0.7 + line * LINE
            for child in children[row["pid"]]:
                bend, end = x + box + (column - box) / 2, 0.7 + places[child["pid"]][1] * LINE
                axes.plot([x + box, bend, bend, x + column], [y, y, end, end], color=palette.MUTED, lw=1.1, zorder=0)
            _box(axes, row, x, y, box)

    rows_for_table = [
        {
            "pid": str(row["pid"]),
            "parent": str(row["parent"]),
            "what": row["what"],
            "rank": row.get("rank"),
            "threads": row.get("threads"),
        }
        for row in rows
    ]
    return Picture(
        paint((0.2 + deep * column, 0.5 + tall * LINE), draw),
        alt,
        rows_for_table,
        title,
        "\n".join([f"{title} ({len(rows)})", *lines]),
    )


def _name(row):
    rank = row.get("rank")
    if rank is None or f"rank {rank}" in row["what"]:
        return row["what"]
    return f"rank {rank}" if row["what"] == "rank" else f"{row['what']} of rank {rank}"


def _place(parent, children, depth, top, indent, places, lines):
    """Give every process below `parent` (depth, line): leaves one line each, others amid theirs; returns the next."""
    for row in children[parent]:
        last = row is children[parent][-1]
        lines.append(indent + ("" if parent is None else "└─ " if last else "├─ ") + _name(row))
        inside = indent + ("" if parent is None else "   " if last else "│  ")
        below = _place(row["pid"], children, depth + 1, top, inside, places, lines)
        kin = [places[child["pid"]][1] for child in children[row["pid"]]]
        places[row["pid"]] = depth, (kin[0] + kin[-1]) / 2 if kin else top
        top = below if kin else top + 1
    return top


def _box(axes, row, x, y, width):
    """What it is in bold, rank included; below it the pid and the number of threads."""
    helper = row.get("rank") is None or row["what"] == "worker"  # a worker stands behind a rank, and is none
    fill = palette.NEUTRAL if helper else palette.rank_colour(row["rank"])
    axes.add_artist(
        FancyBboxPatch(
            (x + 0.04, y - 0.15),
            width - 0.08,
            0.3,
            boxstyle="round,pad=0.04",
            facecolor=fill,
            edgecolor=palette.INK,
            linewidth=0.7,
        )
    )
    threads = row.get("threads")
    more = f"pid {row['pid']}" + (f", {threads} thread{'s' * (threads != 1)}" if threads is not None else "")
    more, small = fit(more, width - 0.16, 7.5)
    name, big = fit(_name(row), width - 0.16, 8.5, bold=True)
    colour = palette.text_on(fill)
    axes.text(x + 0.08, y - 0.075, name, size=big, weight="bold", color=colour, va="center")
    axes.text(x + 0.08, y + 0.085, more, size=small, color=colour, va="center")
