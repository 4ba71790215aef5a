"""The room's names, as lessons and readers import them."""

import importlib

import pytest

import pardist_lib.measure as measure


@pytest.mark.parametrize("name", measure.__all__)
def test_every_name_is_what_it_says(name):
    for file in ("alpha_beta", "costs", "planner", "trace", "fake_ranks"):  # a file has a function's name
        importlib.import_module(f"pardist_lib.measure.{file}")
    assert callable(getattr(measure, name)) and getattr(measure, name).__name__ == name


def test_other_names_are_refused():
    with pytest.raises(ImportError, match="best_plan"):
        from pardist_lib.measure import best_plan  # noqa: F401
