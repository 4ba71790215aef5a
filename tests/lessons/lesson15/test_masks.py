"""The pictures of secure aggregation: masks cancel, and what the server is shown is what the arithmetic gives."""

import pytest

from pardist_lib.lessons.lesson15 import masks

VALUES, OWN = {0: 7, 1: 12, 2: 30}, {0: 55, 1: 8, 2: 93}
PAIR = {(0, 1): 31, (0, 2): 64, (1, 2): 77}


def test_pair_masks_cancel_in_the_sum_of_all():
    assert [masks.signed(PAIR, c) for c in VALUES] == [{1: 31, 2: 64}, {0: -31, 2: 77}, {0: -64, 1: -77}]


@pytest.mark.parametrize("silent, rest", [(0, "12 + 30 = 42"), (1, "7 + 30 = 37"), (2, "7 + 12 = 19")])
def test_the_last_picture_has_the_sum_of_those_who_are_there(silent, rest):
    frames, captions = masks.steps(VALUES, OWN, PAIR, silent)
    assert len(frames) == len(captions) == 7
    assert rest in frames[-1].alt
    assert "server: message 5 (" in frames[3].alt  # (57 + 66 + 82) % 100, as in the lesson


def test_nothing_is_shown_before_its_step():
    frames, _ = masks.steps(VALUES, OWN, PAIR, 1)
    assert "mask" not in frames[0].alt.split("client 0")[1] and "never arrives" not in frames[3].alt
    assert "never arrives" in frames[4].alt
