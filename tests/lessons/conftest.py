"""For all tests of lessons: four warm ranks, and a folder of one's own for answers."""

import pytest


@pytest.fixture
def answers_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PARDIST_ANSWERS", str(tmp_path / "pardist_answers"))
    return tmp_path / "pardist_answers"


@pytest.fixture
def ranks(ranks_of, monkeypatch):
    """Ranks that the checks will find, and little patience with answers that hang."""
    from pardist_lib.lessons.exercises import bench

    monkeypatch.setattr(bench, "PATIENCE", 1.5)
    return ranks_of(4)
