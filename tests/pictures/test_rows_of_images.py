"""Images in rows and messages in columns: what they refuse, what their words say."""

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


def test_messages_say_who_knows_what():
    picture = pictures.messages(
        ["value", "message"], {"client 0": [(7, "secret"), (93, "sent")], "server": [None, None]}
    )
    assert "client 0: value 7 (known to the client alone), message 93 (the server sees it)" in picture.alt
    assert "server: nothing yet" in picture.alt
    with pytest.raises(ValueError, match="client 0: 1 cells for 2 columns"):
        pictures.messages(["a", "b"], {"client 0": [None]})
    with pytest.raises(ValueError, match="client 0: 'whispered' is none of secret, sent"):
        pictures.messages(["a"], {"client 0": [(1, "whispered")]})
