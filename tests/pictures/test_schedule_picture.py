"""A schedule's picture: what it was given stands in its table and its words, and what is no action is refused."""

import pytest

from pardist_lib import pictures
from tests.pictures.picture_examples import PIPELINE


def test_the_table_has_every_box_of_every_panel():
    panels = {"computed": PIPELINE, "measured": PIPELINE[:1]}
    rows = pictures.schedule(panels).table().rows
    assert [(r["panel"], r["rank"], r["action"], r["start"], r["end"]) for r in rows] == [
        (name, rank, *box) for name, lanes in panels.items() for rank, row in enumerate(lanes) for box in row
    ]


def test_in_words_there_are_the_actions_in_their_order_and_no_times():
    later = [[(action, start + 0.005, end + 0.007) for action, start, end in row] for row in PIPELINE]
    words = [pictures.schedule({"computed": PIPELINE, "measured": rows}).alt for rows in (PIPELINE, later)]
    assert words[0] == words[1]
    assert "computed and measured, alike: rank 0 0F0 0F1 0B0 0B1; rank 1 1F0 1B0 1F1 1B1." in words[0]
    other = [PIPELINE[0][::-1], PIPELINE[1]]
    assert "measured: rank 0 0B1 0B0 0F1 0F0;" in pictures.schedule({"computed": PIPELINE, "measured": other}).alt


@pytest.mark.parametrize("rows", [[], [[]], [[("0X0", 0, 1)]], [[("0F0", 2, 1)]]])
def test_what_is_no_schedule_is_refused(rows):
    with pytest.raises(ValueError, match="schedule"):
        pictures.schedule(rows)
