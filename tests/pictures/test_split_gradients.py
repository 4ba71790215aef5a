"""Split gradients drawn beside the unsplit ones: what is said of them, and what is refused."""

import numpy as np
import pytest

from pardist_lib import pictures

WHOLE = np.arange(12.0).reshape(4, 3)


def test_it_says_which_are_equal_and_how_far_the_others_are_apart():
    picture = pictures.split_gradients(
        {
            "rows": (WHOLE, np.array_split(WHOLE, 3), 0),
            "columns": (WHOLE, np.array_split(WHOLE + 1e-9, 2, 1), -1),
            "vector": (WHOLE[:, 0], np.array_split(WHOLE[:, 0] + 0.5, 2), 0),
            "everywhere": (WHOLE, [WHOLE, WHOLE - 2], None),
        },
        title="four ways",
    )
    assert "rows (4, 3), cut along rows, equal. columns (4, 3), cut along columns, equal." in picture.alt
    assert (
        "vector (4,), cut along columns, up to 0.5 apart. everywhere (4, 3), whole on every rank, up to 2"
        in picture.alt
    )
    assert [row["shape"] for row in picture.rows[:3]] == ["(2, 3)", "(1, 3)", "(1, 3)"]


@pytest.mark.parametrize(
    "given, said",
    [
        ({"w": (WHOLE, [WHOLE[:2], WHOLE[:1]], 0)}, "w: the parts do not make up the whole"),
        ({"w": (WHOLE, [WHOLE[:, :2], WHOLE[:2]], 0)}, "w: the parts do not make up the whole"),
        ({"w": (WHOLE[None], [WHOLE[None]], None)}, "w: the parts do not make up the whole"),
        ({}, "expected {name: "),
        ([WHOLE], "expected {name: "),
    ],
)
def test_what_does_not_fit_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        pictures.split_gradients(given)
