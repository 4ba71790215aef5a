"""Bits and sizes of numbers: what is kept is what torch keeps, what is said, and what is refused."""

import math

import numpy as np
import pytest
import torch

from pardist_lib import pictures
from pardist_lib.pictures import precision

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def test_what_a_format_keeps_is_what_torch_keeps():
    """Random sizes, ties, subnormal numbers, both ends of the ranges, both signs."""
    values = [s * m * 2.0**e for e in range(-140, 120, 3) for m in (1.0, 1.5, 1.00390625, 1.7) for s in (1, -1)]
    values += [65504.0, 65519.9, 65520.0, 2.0**-24, 2.0**-25, 1.0001 * 2.0**-25, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11]
    for value in values:
        for name in DTYPES:
            row = precision._stored(name, value, 1.0)
            stored = torch.tensor(value, dtype=torch.float32).to(DTYPES[row["format"]])
            assert row["kept"] == stored.item(), (value, row)
            as_ints = stored.view(torch.int16 if stored.element_size() == 2 else torch.int32).item()
            assert int(row["bits"], 2) == as_ints % 2 ** (8 * stored.element_size())
            info = torch.finfo(DTYPES[row["format"]])
            assert (row["largest"], row["smallest normal"]) == (info.max, info.tiny)
            assert row["smallest"] == info.smallest_normal * info.eps


def test_it_says_what_is_left():
    assert "float16: 0: underflow. bfloat16: 9.97e-10 after unscaling, off by" in pictures.float_bits(1e-9).alt
    assert "float16: 0.25 after unscaling, exact." in pictures.float_bits(0.25, 64).alt
    assert "float16: infinite: the step is lost. bfloat16: 1.5" in pictures.float_bits(1.5, 65536).alt


def test_magnitudes_count_what_float16_loses():
    values = torch.tensor([2.0**-24, 2.0**-25, -(2.0**-26), 0.0, 1.0, -70000.0, 0.0, 2.0**-20])
    lost = (values != 0) & (values.half() == 0)
    row = pictures.magnitudes({"all": values}).rows[0]
    assert row["numbers"] == 6 and row["becomes 0"] == lost.sum() / 6 == 2 / 6
    assert row["infinite"] == 1 / 6 and row["fewer digits"] == 2 / 6 and row["all digits"] == 1 / 6
    assert "all: 33% become 0, 17% infinite." in pictures.magnitudes({"all": values}).alt


@pytest.mark.parametrize("value, scale", [(0, 1), (math.inf, 1), (math.nan, 1), (1, 0), (1, -2), (1e30, 1e30)])
def test_numbers_that_cannot_be_shown(value, scale):
    with pytest.raises(ValueError, match="float_bits: value and scale are numbers of float32 other than 0"):
        pictures.float_bits(value, scale)


def test_nothing_to_count():
    with pytest.raises(ValueError, match="expected {label: numbers}"):
        pictures.magnitudes({})
    with pytest.raises(ValueError, match="'none' has no number other than 0"):
        pictures.magnitudes({"none": np.zeros(3)})
