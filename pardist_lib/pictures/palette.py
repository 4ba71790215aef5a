"""Colours: one per rank (Okabe and Ito 2008), and a paper that reads the same in light and dark notebooks.

Figures are opaque: they bring their own near-white paper, so no colour ever meets a theme's background.
Colour is never the only carrier: every block also says its rank in words, and ranks from 8 on are hatched.
"""

import itertools

PAPER = "#fafaf8"  # background of every figure
INK = "#1a1a1a"  # text and outlines
MUTED = "#595959"  # secondary text, still 6.7 : 1 on PAPER
LINE = "#b8b8b2"  # thin rules and axes
NEUTRAL = "#deded8"  # values that belong to no single rank: sums, averages

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILLION, YELLOW, BLACK = "#56B4E9", "#D55E00", "#F0E442", "#000000"

RANKS = (BLUE, VERMILLION, SKY, YELLOW, GREEN, ORANGE, PURPLE, BLACK)  # the four furthest apart come first
LINES = (BLUE, VERMILLION, GREEN, BLACK, PURPLE, ORANGE)  # for thin strokes: the darker ones first
HATCHES = ("", "///", "...", "xxx")
# For kinds (of memory, of operation, of time), none of them near a rank's colour: each with a hatch, 42 pairs.
KINDS = ("#332288", "#d8b4a0", "#b15928", "#b3de69", "#5f0f40", "#7f6a93")
KIND_HATCHES = ("", "////", "\\\\\\\\", "....", "xxxx", "----", "||||")
# What a kind is called decides how it looks, in every picture of the course. A name may go on: "optimizer state".
FIXED = ("parameters", "gradients", "optimizer", "activations", "gathered", "other",
         "all_reduce", "reduce_scatter", "all_gather", "broadcast", "send", "recv", "all_to_all", "barrier",
         "compute", "bubble", "tensor", "context", "expert", "pipeline", "data")  # fmt: skip


def kind_styles(names):
    """{name: (colour, hatch)}: that of its kind where it has one in `FIXED`, else the next that is free."""
    free = itertools.count(len(FIXED))
    known = [next((i for i, kind in enumerate(FIXED) if str(name).startswith(kind)), None) for name in names]
    places = [next(free) if i is None else i for i in known]
    pairs = [(KINDS[i % len(KINDS)], KIND_HATCHES[i % len(KIND_HATCHES)]) for i in places]
    return dict(zip(names, pairs, strict=True))


def rank_colour(rank):
    """Colour of a rank; the eight colours repeat, told apart by `rank_hatch`."""
    return RANKS[rank % len(RANKS)]


def rank_hatch(rank):
    """Matplotlib hatch of a rank: none for ranks 0–7, another one for every further eight."""
    return HATCHES[rank // len(RANKS) % len(HATCHES)]


def channels(colour):
    """'#rrggbb' -> three floats in 0..1 (sRGB)."""
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def mix(colour, other, share):
    """`share` of `other` stirred into `colour`, as '#rrggbb'."""
    pairs = zip(channels(colour), channels(other), strict=True)
    return "#" + "".join(f"{round(255 * (a + (b - a) * share)):02x}" for a, b in pairs)


def luminance(colour):
    """Relative luminance, 0 (black) to 1 (white); WCAG 2.2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    """Contrast ratio of two colours, 1 to 21; WCAG asks 4.5 of text."""
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def text_on(colour):
    """Black or white, whichever reads better on `colour` (always at least 4.5 : 1)."""
    return max(("#000000", "#ffffff"), key=lambda text: contrast(text, colour))
