"""Stale gradients: from which version of the parameters each one was computed, and to which it was applied."""

from . import palette
from .figure import WIDTH, Picture, block, chip, heading, paint, sheet
from .values import count, number

LEFT, TOP, LANE = 0.95, 0.95, 0.42  # inches


def stale_gradients(log, *, title="gradients", most=24):
    """A lane for each worker, an axis of versions: a box from the version a gradient was computed from to the one it
    made, with its staleness in it.

    log: (worker, computed at, applied to) for each gradient, in the order in which they were applied; applied to
    version v it makes version v + 1, alone or with others.  most: versions that are drawn; the rest is in the table.
    Raises ValueError for no gradients, or one that is applied before it is computed.
    """
    log = [tuple(map(int, entry)) for entry in log]
    if not log:
        raise ValueError("stale_gradients: there are no gradients")
    if wrong := [entry for entry in log if not 0 <= entry[1] <= entry[2]]:
        raise ValueError(f"stale_gradients: (worker, computed at, applied to) is {wrong[0]}: computed after applied")
    workers, worst = sorted({worker for worker, *_ in log}), max(a - c for _, c, a in log)
    end = max(a for *_, a in log) + 1
    drawn = min(end, most)
    scale = (WIDTH - LEFT - 0.2) / drawn
    height = TOP + len(workers) * LANE + 0.3

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, f"the first {drawn} of {end} versions" if drawn < end else "")
        said = "a box: from the version it was computed from, to the version it made; the number: its staleness"
        axes.text(LEFT, 0.6, said, size=8.5, va="center", color=palette.MUTED)
        bottom = TOP + len(workers) * LANE
        for version in range(0, drawn + 1, -(-drawn // 24)):
            x = LEFT + version * scale
            axes.plot([x, x], [TOP - 0.06, bottom], color=palette.LINE, lw=0.4, zorder=0)
            axes.text(x, bottom + 0.12, str(version), size=8, ha="center", va="center", color=palette.MUTED)
        axes.text(0.47, bottom + 0.12, "version", size=8, ha="center", va="center", color=palette.MUTED)
        for lane, worker in enumerate(workers):
            chip(axes, 0.47, TOP + lane * LANE + 0.16, worker)
        for worker, computed_at, applied_to in log:
            if computed_at < drawn:
                wide = min(applied_to + 1, drawn) - computed_at
                y = TOP + workers.index(worker) * LANE
                stale = applied_to - computed_at
                block(axes, LEFT + computed_at * scale, y, wide * scale, 0.32, _colour(stale, worst), str(stale), 9)

    return Picture(paint((WIDTH, height), draw), _words(title, log, workers), _rows(log), title)


def _colour(stale, worst):
    """Fresh is green, stale the more purple the staler: none of them one of the first four ranks' colours."""
    return palette.mix(palette.PAPER, palette.PURPLE, 0.25 + 0.75 * stale / worst) if stale else palette.GREEN


def _rows(log):
    return [
        {"gradient": i, "worker": w, "computed at": c, "applied to": a, "staleness": a - c}
        for i, (w, c, a) in enumerate(log)
    ]


def _words(title, log, workers):
    parts = []
    for worker in workers:
        stale = [a - c for w, c, a in log if w == worker]
        parts.append(
            f"rank {worker}: {count(len(stale), 'gradient')}, staleness {number(sum(stale) / len(stale))} on "
            f"average, at most {max(stale)}"
        )
    return f"{title}. {'; '.join(parts)}."
