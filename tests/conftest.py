"""Shared by all tests: warm ranks, one set for each world size."""

import os

import pytest

os.environ.setdefault("PARDIST_LIVE", "0")  # nbval does not follow updates of a display


@pytest.fixture(scope="session")
def ranks_of():
    """`ranks_of(4)` is a warm Ranks of that size, shared by all tests of the session."""
    from pardist_lib import Ranks

    sets = {}

    def of(n):
        if n not in sets or sets[n].state == "closed":
            sets[n] = Ranks(n)
        return sets[n]

    yield of
    for ranks in sets.values():
        ranks.close()
