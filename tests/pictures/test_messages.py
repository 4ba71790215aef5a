"""Messages in columns: what their words say, what is refused."""

import pytest

from pardist_lib import pictures


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
