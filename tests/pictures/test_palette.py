"""Colours can be told apart by colour-blind readers, and text on them can be read."""

from itertools import combinations

import numpy as np
import pytest

from pardist_lib.pictures import palette
from pardist_lib.ranks import output

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
SIGHT = {
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(colour, sight):
    """CIELAB (D65) of '#rrggbb' as somebody with that sight sees it."""
    rgb = np.array(palette.channels(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = TO_XYZ @ np.clip(np.array(sight) @ linear, 0, 1) / [0.95047, 1.0, 1.08883]
    fx, fy, fz = (np.cbrt(t) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize(
    "colours, least", [(palette.RANKS[:4], 24), (palette.RANKS, 14), (palette.KINDS, 14), (palette.LINES, 14)]
)
def test_colours_stay_apart(sight, colours, least):
    """ΔE of 2.3 is just noticeable; ours keep six times that, and the usual four ranks ten times."""
    seen = {colour: lab(colour, SIGHT[sight]) for colour in colours}
    closest = min((float(np.linalg.norm(seen[a] - seen[b])), a, b) for a, b in combinations(colours, 2))
    assert closest[0] > least, closest


@pytest.mark.parametrize("fill", {*palette.RANKS, *palette.KINDS, palette.NEUTRAL, palette.PAPER})
def test_text_can_be_read_on_every_fill(fill):
    assert palette.contrast(palette.text_on(fill), fill) >= 4.5


def test_text_can_be_read_on_paper():
    assert palette.contrast(palette.INK, palette.PAPER) >= 7
    assert palette.contrast(palette.MUTED, palette.PAPER) >= 4.5


def test_contrast_is_wcag():
    assert palette.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert palette.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_no_two_of_many_ranks_look_alike():
    assert len({(palette.rank_colour(r), palette.rank_hatch(r)) for r in range(32)}) == 32
    assert len(set(palette.kind_styles([*palette.FIXED, *range(21)]).values())) == 42


@pytest.mark.parametrize("sight", SIGHT)
def test_no_kind_is_a_ranks_colour(sight):
    for kind in palette.KINDS:
        least = min(float(np.linalg.norm(lab(kind, SIGHT[sight]) - lab(c, SIGHT[sight]))) for c in palette.RANKS)
        assert least > 10, kind


def test_a_kind_looks_the_same_in_every_picture():
    one = palette.kind_styles(["gradients", "optimizer state", "something"])
    other = palette.kind_styles(["parameters", "activations", "gradients", "optimizer"])
    assert one["gradients"] == other["gradients"] and one["optimizer state"] == other["optimizer"]
    assert len({*one.values(), *other.values()}) == 5


def test_a_rank_has_its_colour_in_text_too():
    assert output.COLOURS == palette.RANKS
    for rank, colour in enumerate(palette.RANKS):
        ink = output.colours_of(rank).rpartition("color:")[2]
        assert palette.contrast(ink.replace("fff", "ffffff").replace("000", "000000")[:7], colour) >= 4.5
