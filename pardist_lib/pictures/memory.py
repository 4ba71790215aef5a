"""Who holds how many bytes of what: plans side by side on one scale."""

from . import palette
from .figure import WIDTH, Picture, block, fit, heading, paint, sheet, write_left
from .values import array, size

LEFT, TOP, RIGHT = 1.75, 0.85, 1.75  # inches: plan and ranks, heading and legend, the total


def memory(plans, computed=None, *, title="", note=""):
    """For each plan a bar for every rank, stacked by kind, all on one scale.

    plans: {"plain": {"parameters": [bytes per rank], "gradients": […], …}, "stage 1": …}; a plan may leave kinds out,
    and plans may have different numbers of ranks. computed: {plan: bytes a rank should hold}, a mark across its bars.
    Raises ValueError for no plans, for kinds with different numbers of ranks, for negative bytes.
    """
    if not isinstance(plans, dict) or not plans or not all(isinstance(p, dict) and p for p in plans.values()):
        raise ValueError("memory: expected {plan: {kind: [bytes per rank]}}")
    plans = {str(plan): {str(k): array(v, f"memory, {plan}, {k}").astype(float) for k, v in kinds.items()}
             for plan, kinds in plans.items()}  # fmt: skip
    for plan, kinds in plans.items():
        shapes = {v.shape for v in kinds.values()}
        if len(shapes) > 1 or len(next(iter(shapes))) != 1 or not next(iter(shapes))[0]:
            raise ValueError(f"memory: in {plan!r} every kind needs one value per rank, got {sorted(shapes)}")
        if not all((v >= 0).all() for v in kinds.values()):
            raise ValueError(f"memory: in {plan!r} there are negative bytes")
    computed, names = dict(computed or {}), list(dict.fromkeys(k for kinds in plans.values() for k in kinds))
    totals = {plan: sum(kinds.values()) for plan, kinds in plans.items()}
    rows = [
        {"plan": plan, "rank": r, **{k: int(v[r]) for k, v in kinds.items()}, "total": int(totals[plan][r])}
        | ({"computed": float(computed[plan])} if plan in computed else {})
        for plan, kinds in plans.items()
        for r in range(len(totals[plan]))
    ]
    alt = f"{title or 'Bytes a rank holds'}: " + "; ".join(_said(p, totals[p], computed.get(p)) for p in plans) + "."
    longest = max([t.max() for t in totals.values()] + [float(v) for v in computed.values()]) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / longest
    tall = {plan: 0.2 if len(t) > 1 else 0.34 for plan, t in totals.items()}
    height = TOP + sum(len(t) * tall[p] + 0.2 for p, t in totals.items()) + 0.05

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, note)
        _legend(axes, names, bool(computed))
        styles, y = palette.kind_styles(names), TOP
        for plan, kinds in plans.items():
            world, step = len(totals[plan]), tall[plan]
            text, points = fit(plan, LEFT - (0.75 if world > 1 else 0.3), 9.5, bold=True)
            axes.text(0.15, y + world * step / 2, text, size=points, weight="bold", va="center")
            for r in range(world):
                if world > 1:
                    axes.text(LEFT - 0.08, y + step / 2, f"rank {r}", size=7.5, ha="right", va="center",
                              color=palette.MUTED)  # fmt: skip
                x = LEFT
                for kind, values in kinds.items():
                    fill, hatch = styles[kind]
                    if values[r]:
                        block(axes, x, y, values[r] * scale, step - 0.03, fill, hatch=hatch, line=0.5)
                    x += values[r] * scale
                y += step
            end = LEFT + totals[plan].max() * scale
            if plan in computed:
                at = LEFT + computed[plan] * scale
                axes.plot([at, at], [y - world * step - 0.05, y + 0.03], color=palette.INK, lw=2, solid_capstyle="butt")
                end = max(end, at)
            write_left(axes, end + 0.08, y - world * step / 2, _end(totals[plan]))
            y += 0.2

    return Picture(paint((WIDTH, height), draw), alt, rows, title)


def _end(totals):
    low, high = size(totals.min()), size(totals.max())
    return (high if low == high else f"{low} – {high}") + (" each" if len(totals) > 1 else "")


def _said(plan, totals, goal):
    low, high = int(totals.min()), int(totals.max())
    each = f"{high:,} bytes" if low == high else f"{low:,} to {high:,} bytes"
    return f"{plan} {each} a rank" + ("" if goal is None else f" (computed {goal:,.0f})")


def _legend(axes, kinds, marked):
    x = LEFT
    for kind, (fill, hatch) in palette.kind_styles(kinds).items():
        block(axes, x, 0.5, 0.3, 0.17, fill, hatch=hatch)
        x = write_left(axes, x + 0.37, 0.585, kind) + 0.25
    if marked:
        axes.plot([x + 0.08] * 2, [0.47, 0.7], color=palette.INK, lw=2)
        write_left(axes, x + 0.2, 0.585, "computed")
