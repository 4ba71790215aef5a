"""Images in rows: what their words say, what is refused."""

import numpy as np
import pytest

from pardist_lib import pictures


def test_images_say_what_they_show_and_refuse_what_is_none():
    picture = pictures.images({"the clients'\ndigits": np.zeros((3, 8, 8)), "stolen": np.ones((2, 8, 8))}, title="x")
    assert picture.alt == "x: 2 rows of up to 3 images: the clients' digits and stolen."
    assert [row["images"] for row in picture.rows] == [3, 2]
    for bad in ({}, [1, 2], {"flat": np.zeros((8, 8))}, {"none": np.zeros((0, 8, 8))}):
        with pytest.raises(ValueError, match="images"):
            pictures.images(bad)
