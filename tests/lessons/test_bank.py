"""Every planted mistake is refused with its own diagnosis; the reference solutions and other right answers pass."""

import importlib
import inspect
from pathlib import Path

import cloudpickle
import pytest

from pardist_lib.lessons.exercises import reader as exercises
from tests.lessons import planted

BANKS = [p for p in sorted(Path(__file__).parent.glob("lesson[0-9][0-9]/*.py")) if not p.stem.startswith("test_")]
for bank in BANKS:
    cloudpickle.register_pickle_by_value(importlib.import_module(f"tests.lessons.{bank.parent.name}.{bank.stem}"))


pytestmark = pytest.mark.usefixtures("ranks", "answers_folder")


def copied(name):
    """The reference solution as a reader's own function."""
    names = {"__name__": "copied"}
    exec("import torch\nimport torch.distributed as dist\n" + inspect.getsource(exercises.reference(name)), names)
    return names[name]


@pytest.mark.share(180)  # of a thousand; all with --whole
@pytest.mark.parametrize(
    "name, answer, phrase", [pytest.param(*m, id=f"{m[0]}-{m[1].__name__}") for m in planted.MISTAKES]
)
def test_a_planted_mistake_is_refused_with_its_own_diagnosis(name, answer, phrase):
    verdict = exercises.check(name, answer)
    assert verdict.status == "failed", verdict
    assert phrase in verdict.diagnosis, verdict


@pytest.mark.parametrize("name", exercises.exercises())
def test_the_reference_passes_when_a_reader_writes_it(name):
    verdict = exercises.check(name, copied(name))
    assert verdict.passed, verdict


@pytest.mark.parametrize("name, answer", [pytest.param(*r, id=f"{r[0]}-{r[1].__name__}") for r in planted.RIGHT])
def test_other_ways_pass_too(name, answer):
    verdict = exercises.check(name, answer)
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", exercises.exercises())
def test_each_exercise_has_hints_and_a_bank_of_mistakes(name):
    assert 2 <= len(exercises.exercise_of(name).hints) <= 4
    assert sum(exercise == name for exercise, *_ in planted.MISTAKES) >= 4


@pytest.mark.parametrize("name", exercises.exercises())
def test_each_exercise_says_how_long_how_hard_and_why(name):
    exercise = exercises.exercise_of(name)
    assert 1 <= exercise.minutes <= 60 and exercise.level in ("easy", "medium", "hard")
    assert 40 < len(exercise.why) < 400 and exercise.why.endswith((".", "!"))
