"""The picture of who holds what: what it says, and what it refuses."""

import pytest

from pardist_lib import pictures
from pardist_lib.pictures.values import size


def test_it_tells_every_plan_and_its_formula():
    plans = {"plain": {"parameters": [8, 8], "state": [16, 16]}, "sharded": {"parameters": [4, 4], "state": [9, 7]}}
    picture = pictures.memory(plans, {"sharded": 12}, title="two ranks")
    assert picture.alt == "two ranks: plain 24 bytes a rank; sharded 11 to 13 bytes a rank (computed 12)."
    assert picture.rows[3] == {"plan": "sharded", "rank": 1, "parameters": 4, "state": 7, "total": 11, "computed": 12.0}


def test_thousands_of_gigabytes_are_terabytes():
    assert [size(n) for n in (2.8e12, 2.73e9, 154e3)] == ["2.8 TB", "2.73 GB", "154 kB"]


def test_plans_may_have_different_ranks_and_nothing_at_all():
    picture = pictures.memory({"one": {"parameters": [0]}, "three": {"parameters": [1, 2, 3]}})
    assert "one 0 bytes a rank" in picture.alt and len(picture.rows) == 4


@pytest.mark.parametrize(
    "plans, said",
    [
        ({}, "expected {plan: {kind"),
        ({"plain": [1, 2]}, "expected {plan: {kind"),
        ({"plain": {"a": [1, 2], "b": [1]}}, "in 'plain' every kind needs one value per rank"),
        ({"plain": {"a": []}}, "in 'plain' every kind needs one value per rank"),
        ({"plain": {"a": [-1]}}, "negative bytes"),
    ],
)
def test_it_says_what_it_cannot_draw(plans, said):
    with pytest.raises(ValueError, match=said):
        pictures.memory(plans)
