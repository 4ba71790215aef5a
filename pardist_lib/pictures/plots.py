"""Numbers over ranks and steps: gradients before and after synchronisation, curves, bars."""

import math
import re

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import LogLocator

from . import palette
from .figure import WIDTH, Picture, block, chip, heading, paint, shades, sheet, text_width, write_left
from .values import array, brief, count, number, per_rank, shape, size

DIVERGING = LinearSegmentedColormap.from_list("diverging", [palette.BLUE, "#ffffff", palette.VERMILLION])


def gradients(before, after=None, *, title="gradient", names=("before", "after")):
    """One parameter's gradient on every rank, before and after synchronisation, on one symmetric scale.

    before, after: one array per rank, all of one shape. Blue is negative, orange positive, white zero, black NaN; a
    few numbers are printed, big gradients averaged to 96 × 96. Beside each row: the largest difference between ranks.
    names: of the two rows. Raises ValueError where shapes differ.
    """
    moments = {names[0]: per_rank(before, "gradients, before")}
    if after is not None:
        moments[names[1]] = per_rank(after, "gradients, after")
    shapes = {None if g is None else g.shape for grads in moments.values() for g in grads}
    if len(shapes) > 1 or None in shapes or len({len(g) for g in moments.values()}) > 1:
        raise ValueError(
            "gradients: every rank needs one gradient, all of one shape, before and after; got "
            + "; ".join(f"{m} {[None if g is None else g.shape for g in gs]}" for m, gs in moments.items())
        )
    first = moments[names[0]][0]
    if not first.size:
        raise ValueError("gradients: empty gradients cannot be drawn")
    top = max(float(np.abs(g[np.isfinite(g)]).max(initial=0)) for gs in moments.values() for g in gs) or 1.0
    apart = {m: float(np.ptp(np.stack(grads).astype(float), axis=0).max()) for m, grads in moments.items()}
    rows = [
        {
            "moment": m,
            "rank": r,
            "norm": float(np.linalg.norm(g.astype(float))),
            "smallest": float(g.min()),
            "largest": float(g.max()),
            "values": brief(g),
        }
        for m, grads in moments.items()
        for r, g in enumerate(grads)
    ]
    alt = f"{title}, shape {shape(first)}, on {count(len(before), 'rank')}. " + " ".join(
        f"{m.capitalize()}{' synchronisation' * (m in ('before', 'after'))} ranks differ by up to {number(d)}."
        for m, d in apart.items()
    )
    wide = (WIDTH - 2.4) / len(before)
    tall = min(1.1, max(0.45, wide * 0.75))

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, f"shape {shape(first)}, blue is negative, orange positive")
        for i, (moment, grads) in enumerate(moments.items()):
            y = 0.9 + i * (tall + 0.2)
            axes.text(
                0.15,
                y + tall / 2,
                f"{moment}:\ntwo ranks differ\nby up to {number(apart[moment])}",
                va="center",
                linespacing=1.35,
            )
            for rank, grad in enumerate(grads):
                x = 1.55 + rank * wide
                if not i:
                    chip(axes, x + wide / 2 - 0.05, 0.66, rank, min(0.62, wide))
                _heat(axes, _matrix(grad), x, y, wide - 0.1, tall, top)
        _scale(axes, 7.25, 0.9, len(moments) * (tall + 0.2) - 0.2, top)

    return Picture(paint((WIDTH, 0.95 + len(moments) * (tall + 0.2)), draw), alt, rows, title)


def _matrix(values):
    """Any array as a matrix; a short vector as a column, so that its numbers have room."""
    if values.ndim < 2:
        return values.reshape((-1, 1) if values.size <= 6 else (1, -1))
    return values.reshape(len(values), -1)


def _heat(axes, values, x, y, width, height, top):
    tall, wide = height / values.shape[0], width / values.shape[1]
    if tall > 0.15 and wide > 0.35:
        for (i, j), value in np.ndenumerate(values):
            fill = to_hex(DIVERGING((value / top + 1) / 2)) if np.isfinite(value) else palette.BLACK
            block(axes, x + j * wide, y + i * tall, wide, tall, fill, number(value), 8, edge=palette.LINE, line=0.5)
    else:
        shades(axes, values, x, y, width, height, DIVERGING, -top, top)
    block(axes, x, y, width, height, "none", line=1)


def _scale(axes, x, y, height, top):
    """The colour bar: three numbers beside a ramp."""
    shades(axes, np.linspace(1, -1, 64)[:, None], x, y, 0.15, height, DIVERGING, -1, 1)
    block(axes, x, y, 0.15, height, "none", line=0.6)
    for at, value in ((0, top), (0.5, 0), (1, -top)):
        axes.text(x + 0.2, y + at * height, number(value), size=8, va="center", color=palette.MUTED)


def curves(series, *, difference=False, title="", xlabel="step", ylabel="loss", log=False, ticks=None):
    """Curves such as losses, tellable where they coincide: each later one is thinner, dashed, with its own marker.

    series: {"one process": [...], "four ranks": [...]}, one number per step; lengths may differ.
    difference: a second panel with how far every curve is from the first, a dot a step on a logarithmic scale; a
    number instead of True is a bound that was promised, and is drawn as a line.  A curve called "rank 2" has the
    colour of rank 2.  log: logarithmic y axis.  ticks: what to write below each step instead of its number.
    Raises ValueError for empty series, a difference of one curve, or ticks that are not one for each step.
    """
    if not isinstance(series, dict) or not series:
        raise ValueError("curves: expected {label: list of numbers}")
    series = {str(label): array(ys, f"curves, {label}") for label, ys in series.items()}
    if any(ys.ndim != 1 or not ys.size for ys in series.values()):
        raise ValueError("curves: every curve needs a flat, non-empty list of numbers")
    if difference and len(series) < 2:
        raise ValueError("curves: a difference needs at least two curves")
    (first, base), *others = series.items()
    steps = max(len(ys) for ys in series.values())
    if ticks is not None and len(ticks) != steps:
        raise ValueError(f"curves: {len(ticks)} ticks for {steps} steps")
    rows = [{xlabel: i} | {k: float(ys[i]) if i < len(ys) else None for k, ys in series.items()} for i in range(steps)]
    alt = (
        f"{title or ylabel} over {count(steps, xlabel)}: "
        + "; ".join(f"{label} from {number(ys[0])} to {number(ys[-1])}" for label, ys in series.items())
        + "."
    )
    gaps = {label: np.abs(ys[: len(base)] - base[: len(ys)]) for label, ys in others} if difference else {}
    alt += "".join(f" {label} and {first} {_within(gap)}." for label, gap in gaps.items())

    panels = [(series, ylabel)]
    if difference:
        panels.append(({f"|{k} − {first}|": np.where(g > 0, g, np.nan) for k, g in gaps.items()}, "difference"))
    columns = [
        max(1, int(7.2 / len(panels) / (0.75 + max(text_width(label, 8.5) for label in drawn)))) for drawn, _ in panels
    ]
    legend = 0.2 * max(math.ceil(len(drawn) / n) for (drawn, _), n in zip(panels, columns, strict=True))
    height = 2.95 + legend  # the legends stand above the axes, where they hide nothing

    def draw(figure):
        grid = figure.add_gridspec(
            1, len(panels), left=0.085, right=0.975, bottom=0.5 / height, top=2.45 / height, wspace=0.28
        )
        figure.text(0.02, 1 - 0.24 / height, title, size=11, weight="bold", va="center")
        for i, (drawn, name) in enumerate(panels):
            axes = figure.add_subplot(grid[i])
            _dots(axes, drawn) if i else _lines(axes, drawn)
            axes.set(xlabel=xlabel, ylabel=name, yscale="log" if i or log else "linear")
            if ticks is not None:
                axes.set_xticks(range(steps), ticks)
            if i:
                _decades(axes, drawn, 0 if difference is True else difference)
                _zeros(axes, gaps)
            if i or log:
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.yaxis.set_minor_formatter("")
            axes.legend(handlelength=3.5, ncols=columns[i], loc="lower left", bbox_to_anchor=(-0.02, 1), fontsize=8.5)

    return Picture(paint((WIDTH, height), draw), alt, rows, title)


def _within(gap):
    """A bound that is the same from machine to machine: the next power of ten."""
    worst = float(gap.max())
    if not math.isfinite(worst):
        return "differ by more than any number"
    return f"never differ by more than {10.0 ** math.ceil(math.log10(worst)):g}" if worst else "are equal at every step"


def _lines(axes, series):
    dashes = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (9, 4)), (0, (2, 4)))
    for i, (label, ys) in enumerate(series.items()):
        every, rank = max(len(ys) // 10, 1), re.fullmatch(r"rank (\d+)", label)
        lines = axes.plot(
            ys,
            color=palette.rank_colour(int(rank[1])) if rank else palette.LINES[i % 6],
            lw=max(4.5 - 1.5 * i, 1.3),
            alpha=1 if i else 0.45,
            label=label,
            ls=dashes[i % 6],
            marker="osD^vP"[i % 6],
            ms=5,
            markevery=(i * every // 3 % len(ys), every),
            markeredgecolor=palette.INK if rank else palette.PAPER,
            markeredgewidth=0.6,
        )
        if rank:  # some ranks' colours are too light for a line on paper: a dark edge
            width = lines[0].get_linewidth()
            lines[0].set(alpha=1, path_effects=[Stroke(linewidth=width + 1, foreground=palette.INK), Normal()])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)


def _dots(axes, series):
    for i, (label, ys) in enumerate(series.items(), 1):
        axes.plot(ys, ".", color=palette.LINES[i % 6], ms=5, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)


def _decades(axes, series, promised):
    """Whole powers of ten around all dots, and a line at what was promised."""
    values = np.concatenate([ys[np.isfinite(ys)] for ys in series.values()])
    if promised:
        axes.axhline(promised, color=palette.INK, lw=1.2, ls=(0, (5, 3)), label="promised")
        values = np.append(values, promised)
    if values.size:
        low, high = math.floor(math.log10(values.min())), math.ceil(math.log10(values.max()) + 0.1)
        axes.set_ylim(10.0 ** min(low, high - 2), 10.0**high)
        axes.yaxis.set_major_locator(LogLocator(numticks=8))


def _zeros(axes, gaps):
    """Steps without any difference have no place on a logarithmic axis: rings on its floor."""
    if not any((gap > 0).any() for gap in gaps.values()):
        axes.set(ylim=(1e-17, 1), xlim=(-1, max(map(len, gaps.values()))))
    floor = axes.get_ylim()[0]
    if any((gap == 0).any() for gap in gaps.values()):
        axes.set_xlabel(f"{axes.get_xlabel()}   (○ exactly equal)")
    for i, gap in enumerate(gaps.values(), 1):
        at = np.flatnonzero(gap == 0)
        axes.plot(at, np.full(at.size, floor), "o", mfc="none", color=palette.LINES[i % 6], ms=5, clip_on=False)


def bars(measured, computed=None, *, title="", unit="bytes"):
    """One stacked bar per rank, by kind, with a mark where the formula says it should end.

    measured: {"all_reduce": [per rank], …}.  computed: the same for the formula, or one total per rank, or one total
    for all.  unit: "bytes" (shown as kB, MB, GB, decimal) or any other word.
    Raises ValueError where lengths differ or a value is negative.
    """
    if not isinstance(measured, dict) or not measured:
        raise ValueError("bars: expected {kind: [one value per rank]}")
    stack = {str(kind): array(values, f"bars, {kind}").astype(float) for kind, values in measured.items()}
    world = len(next(iter(stack.values()))) if next(iter(stack.values())).ndim else 0
    if not world or any(v.shape != (world,) or not (v >= 0).all() for v in stack.values()):
        raise ValueError("bars: every kind needs one value ≥ 0 per rank")
    said = size if unit == "bytes" else lambda value: f"{number(value)} {unit}"
    exact = (lambda v: f"{v:,.0f} bytes") if unit == "bytes" else said
    goal = _totals(computed, world)
    total = sum(stack.values())
    parts = (
        {k: np.broadcast_to(array(v, "bars, computed"), world) for k, v in computed.items()}
        if isinstance(computed, dict)
        else {}
    )
    rows = [
        {"rank": r}
        | {k: _plain(v[r]) for k, v in stack.items()}
        | {"total": _plain(total[r])}
        | {f"computed {k}": _plain(v[r]) for k, v in parts.items()}
        | ({} if goal is None else {"computed": _plain(goal[r])})
        for r in range(world)
    ]
    ends = [exact(total[r]) + ("" if goal is None else f" (computed {exact(goal[r])})") for r in range(world)]
    alt = (
        f"{title or 'Totals by rank'}: "
        + (
            f"every rank {ends[0]}"
            if len(set(ends)) == 1
            else "; ".join(f"rank {r} {end}" for r, end in enumerate(ends))
        )
        + f"; kinds: {', '.join(stack)}."
    )
    longest = max(total.max(), 0 if goal is None else goal.max()) or 1.0
    scale, top, styles = 4.6 / longest, 0.85, palette.kind_styles(list(stack)).values()

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title)
        _legend(axes, list(stack), goal is not None)
        for rank in range(world):
            x, y = 0.95, top + rank * 0.47
            chip(axes, 0.47, y + 0.15, rank)
            for values, (fill, hatch) in zip(stack.values(), styles, strict=True):
                width = values[rank] * scale
                block(
                    axes,
                    x,
                    y,
                    width,
                    0.3,
                    fill,
                    said(values[rank]) if width > 0.8 and len(stack) > 1 else "",
                    hatch=hatch,
                )
                x += width
            text = said(total[rank])
            if goal is not None:
                at = 0.95 + goal[rank] * scale
                axes.plot([at, at], [y - 0.06, y + 0.36], color=palette.INK, lw=2.6, solid_capstyle="butt")
                axes.plot([at], [y - 0.06], marker="v", color=palette.INK, ms=5)
                same = math.isclose(goal[rank], total[rank], rel_tol=1e-9, abs_tol=1e-9)
                text += " = computed" if same else f" ≠ {said(goal[rank])} computed"
                x = max(x, at)
            write_left(axes, x + 0.1, y + 0.15, text)

    return Picture(paint((WIDTH, top + world * 0.47 + 0.1), draw), alt, rows, title)


def _totals(computed, world):
    if computed is None:
        return None
    parts = computed.values() if isinstance(computed, dict) else [computed]
    try:
        return sum(np.broadcast_to(array(part, "bars, computed"), world).astype(float) for part in parts)
    except ValueError as error:
        raise ValueError(f"bars: computed needs one value per rank or one for all ({error})") from None


def _plain(value):
    return int(value) if float(value).is_integer() else float(value)


def _legend(axes, kinds, marker):
    x = 0.95
    for kind, (fill, hatch) in palette.kind_styles(kinds).items():
        block(axes, x, 0.48, 0.3, 0.17, fill, hatch=hatch)
        x = write_left(axes, x + 0.37, 0.565, kind) + 0.25
    if marker:
        axes.plot([x + 0.08] * 2, [0.47, 0.66], color=palette.INK, lw=2.6)
        axes.plot([x + 0.08], [0.47], marker="v", color=palette.INK, ms=5)
        write_left(axes, x + 0.2, 0.565, "computed")
