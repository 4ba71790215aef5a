"""Verdicts say what equals what."""

import numpy as np
import pytest

from pardist_lib.pictures import Verdict


def test_a_line_for_each_claim():
    seen = Verdict({"a equals <b>": True, "c equals d": (np.bool_(False), "0.13 apart")})
    assert repr(seen) == "✓ a equals <b>\n✗ c equals d: 0.13 apart" and not seen.holds
    assert "a equals &lt;b&gt;" in seen._repr_html_() and seen._repr_html_().count("<div") == 2
    assert Verdict({"a": True}).holds


@pytest.mark.parametrize("claims, error", [({}, ValueError), ({"a": 1}, TypeError), ({"a": "yes"}, TypeError)])
def test_wrong_input_is_told(claims, error):
    with pytest.raises(error, match="verdict"):
        Verdict(claims)
