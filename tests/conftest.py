"""Shared by all tests: warm ranks, one set for each world size."""

import functools
import os
import random
import subprocess
from pathlib import Path

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


def pytest_addoption(parser):
    parser.addoption("--whole", action="store_true", help="all cases of the tests of which a run takes a share")


def pytest_configure(config):
    config.addinivalue_line("markers", "share(k): a run takes k of this test's cases, chosen by the commit")


def pytest_collection_modifyitems(config, items):
    """Of a test marked share(k), keep k cases, others with each commit; all with --whole, or when named with ::."""
    if config.getoption("--whole") or any("::" in argument for argument in config.args):
        return
    cases = {}
    for item in items:
        if item.get_closest_marker("share"):
            cases.setdefault((item.path, item.originalname), []).append(item)
    left_out = set()
    for group in cases.values():
        k = group[0].get_closest_marker("share").args[0]
        kept = random.Random(commit()).sample(group, min(k, len(group)))
        left_out |= {item for item in group if item not in kept}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@functools.cache
def commit():
    """The commit that is tested, as text; empty where git knows none."""
    here = Path(__file__).parent
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
