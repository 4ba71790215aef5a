"""Numbers of 16 and 32 bits: what a format makes of a value, and how much of a tensor lies outside of it."""

import math

import numpy as np

from . import palette
from .figure import WIDTH, Picture, block, heading, paint, sheet, write_left
from .values import array, count, number

FORMATS = {"float16": (5, 10), "bfloat16": (8, 7), "float32": (8, 23)}  # bits of the exponent, of the mantissa
LEFT, BIT = 0.95, 0.135  # inches
LOW, HIGH = -152, 130  # powers of two on the axis


def float_bits(value, scale=1.0, *, title="one number, three formats"):
    """The bits of value · scale in float16, bfloat16 and float32, what is left of it, and where it lies in their range.

    value: any number but 0 (a gradient, say).  scale: what it is multiplied by before it is stored, and divided by
    afterwards.  Raises ValueError for a value or scale that is 0, not finite or beyond float32.
    """
    value, scale = float(value), float(scale)
    if not (0 < abs(value) < 3e38 and 0 < scale < 3e38 and 0 < abs(value * scale) < 3.4e38):
        raise ValueError(f"float_bits: value and scale are numbers of float32 other than 0, not {value} and {scale}")
    rows = [_stored(name, value, scale) for name in FORMATS]
    span = (WIDTH - LEFT - 0.25) / (HIGH - LOW)
    height, lane, axis, pale = 3.6, 0.42, 2.15, palette.mix(palette.PAPER, palette.GREEN, 0.3)

    def at(number):
        return LEFT + (math.log2(abs(number)) - LOW) * span

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, f"{number(value)} × {number(scale)} = {number(value * scale)}")
        for x, name, fill in ((LEFT, "sign", palette.NEUTRAL), (LEFT + 0.75, "exponent", palette.SKY),
                              (LEFT + 1.75, "mantissa", palette.YELLOW)):  # fmt: skip
            block(axes, x, 0.45, 0.22, 0.16, fill)
            write_left(axes, x + 0.28, 0.53, name)
        for i, row in enumerate(rows):
            y, (exponent, _) = 0.75 + i * lane, FORMATS[row["format"]]
            write_left(axes, 0.15, y + 0.14, row["format"])
            for j, bit in enumerate(row["bits"]):
                fill = palette.NEUTRAL if not j else palette.SKY if j <= exponent else palette.YELLOW
                block(axes, LEFT + j * BIT, y, BIT, 0.28, fill, bit, 7.5, line=0.4)
            write_left(axes, LEFT + 32 * BIT + 0.15, y + 0.14, row["verdict"])
        for i, row in enumerate(rows):
            y = axis + i * 0.27
            write_left(axes, 0.15, y + 0.09, row["format"])
            smallest, normal, largest = (at(row[key]) for key in ("smallest", "smallest normal", "largest"))
            block(axes, smallest, y, normal - smallest, 0.18, pale, line=0.4)
            block(axes, normal, y, largest - normal, 0.18, palette.GREEN, line=0.4)
        bottom = axis + len(rows) * 0.27
        for power in range(-140, 121, 20):
            x = LEFT + (power - LOW) * span
            axes.plot([x, x], [bottom, bottom + 0.05], color=palette.LINE, lw=0.6)
            axes.text(x, bottom + 0.13, f"2^{power}", size=7.5, ha="center", va="center", color=palette.MUTED)
        line = bottom + 0.37
        for what, hollow, y in ((value, True, axis - 0.08), (value * scale, False, axis - 0.08)):
            axes.plot([at(what)] * 2, [y, bottom], color=palette.INK, lw=1.4, ls=(0, (2, 2)) if hollow else "-")
            axes.plot([at(what)], [y], "v", color=palette.INK, mfc=palette.PAPER if hollow else palette.INK, ms=6)
        axes.plot([LEFT + 0.05], [line], "v", color=palette.INK, mfc=palette.PAPER, ms=6)
        x = write_left(axes, LEFT + 0.15, line, "the value") + 0.3
        axes.plot([x], [line], "v", color=palette.INK, ms=6)
        x = write_left(axes, x + 0.1, line, "times the scale") + 0.3
        for fill, text in ((palette.GREEN, "all digits"), (pale, "fewer and fewer (subnormal)")):
            block(axes, x, line - 0.08, 0.22, 0.16, fill, line=0.4)
            x = write_left(axes, x + 0.28, line, text) + 0.3

    alt = f"{title}: {number(value)} × {number(scale)}. " + " ".join(f"{r['format']}: {r['verdict']}." for r in rows)
    return Picture(paint((WIDTH, height), draw), alt, rows, title)


def _stored(name, value, scale):
    """What the format keeps of value · scale, as a row of the picture's table."""
    exponent, mantissa = FORMATS[name]
    bits, kept = _rounded(name, np.float32(value * scale))
    back = float(kept) / scale
    bias = 2 ** (exponent - 1) - 1
    if math.isinf(kept):
        verdict = "infinite: the step is lost"
    elif kept == 0:
        verdict = "0: underflow"
    else:
        off = abs(back / value - 1)
        verdict = f"{number(back)} after unscaling, " + ("exact" if off < 1e-12 else f"off by {_percent(off)}")
    return {
        "format": name, "bits": bits, "kept": float(kept), "unscaled": back, "verdict": verdict,
        "smallest": 2.0 ** (1 - bias - mantissa), "smallest normal": 2.0 ** (1 - bias),
        "largest": (2 - 2.0**-mantissa) * 2.0**bias,
    }  # fmt: skip


def _percent(share):
    return f"{100 * share:.2g} %" if share >= 1e-4 else f"{100 * share:.0e} %"


def _rounded(name, value):
    """(bits as text, value) of a float32 in a format, rounded to nearest, ties to even."""
    whole = int(np.float32(value).view(np.uint32))
    if name == "float32":
        return f"{whole:032b}", float(value)
    if name == "bfloat16":
        short = whole + 0x7FFF + (whole >> 16 & 1) >> 16
        return f"{short:016b}", float(np.uint32(short << 16).view(np.float32))
    with np.errstate(over="ignore", under="ignore"):
        half = np.float16(value)
    return f"{int(half.view(np.uint16)):016b}", float(half)


def magnitudes(series, *, title="gradients by size", low=-40, high=20):
    """Histograms of the sizes of numbers, by powers of two, with float16's limits behind them.

    series: {"unscaled": array, "times 65536": array}, a panel each; zeros are left out.  low, high: the powers of two
    at the ends of the axis, where what lies beyond is heaped up.  The share below float16's smallest number (it
    becomes 0), where it has fewer digits, and above its largest (infinite) is written into each panel.
    Raises ValueError for empty series.
    """
    if not isinstance(series, dict) or not series:
        raise ValueError("magnitudes: expected {label: numbers}")
    sizes = {str(k): np.abs(array(v, f"magnitudes, {k}").astype(float)).ravel() for k, v in series.items()}
    sizes = {k: v[v > 0] for k, v in sizes.items()}
    if empty := [k for k, v in sizes.items() if not v.size]:
        raise ValueError(f"magnitudes: {empty[0]!r} has no number other than 0")
    limits = {"becomes 0": -25.0, "fewer digits": -14.0, "all digits": 16.0, "infinite": math.inf}
    rows = []
    for label, values in sizes.items():
        powers, start, row = np.log2(values), -math.inf, {"series": label, "numbers": int(values.size)}
        for name, end in limits.items():
            row[name] = float(
                ((powers > start) & (powers <= end)).mean() if start > -math.inf else (powers <= end).mean()
            )
            start = end
        rows.append(row)
    span, tall, gap = (WIDTH - 0.5) / (high - low), 1.0, 0.55
    height = 0.55 + len(sizes) * (tall + gap) + 0.15

    def x_of(power):
        return 0.25 + (min(max(power, low), high) - low) * span

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, "how many numbers have which size; behind them, what float16 makes of it")
        for i, (row, values) in enumerate(zip(rows, sizes.values(), strict=True)):
            top = 0.8 + i * (tall + gap)
            axes.text(0.25, top - 0.13, row["series"], size=9, weight="bold", va="center")
            start = low
            fills = (palette.VERMILLION, palette.YELLOW, palette.GREEN, palette.VERMILLION)
            for (name, end), fill in zip(limits.items(), fills, strict=True):
                if end > start:
                    a, b = x_of(start), x_of(end)
                    pale = palette.mix(palette.PAPER, fill, 0.3)
                    block(axes, a, top, b - a, tall, pale, line=0)
                    text = f"{name}\n{row[name]:.0%}"
                    axes.text((a + b) / 2, top + 0.17, text, size=8, ha="center", va="center", linespacing=1.2)
                start = end
            heaps, _ = np.histogram(np.clip(np.log2(values), low, high - 1e-9), bins=np.arange(low, high + 1))
            scale = (tall - 0.36) / heaps.max()
            for j, many in enumerate(heaps):
                if many:
                    block(axes, 0.25 + j * span, top + tall - many * scale, span, many * scale, palette.BLUE, line=0.4)
            axes.plot([0.25, WIDTH - 0.25], [top + tall] * 2, color=palette.INK, lw=0.8)
            for power in range(low, high + 1, 5):
                axes.text(x_of(power), top + tall + 0.11, f"2^{power}", size=7.5, ha="center", va="center",
                          color=palette.MUTED)  # fmt: skip

    alt = f"{title}, {count(len(rows), 'histogram')} by powers of two, against float16's range. " + " ".join(
        f"{r['series']}: {r['becomes 0']:.0%} become 0, {r['infinite']:.0%} infinite." for r in rows
    )
    return Picture(paint((WIDTH, height), draw), alt, rows, title)
