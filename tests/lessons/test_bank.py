"""Every planted mistake is refused with its own diagnosis; the reference solutions and other right answers pass."""

import inspect

import bank00
import bank01
import cloudpickle
import other_ways
import planted
import pytest

from pardist_lib.lessons import exercises

for bank in (bank00, bank01, other_ways):
    cloudpickle.register_pickle_by_value(bank)


pytestmark = pytest.mark.usefixtures("ranks", "answers_folder")


def copied(name):
    """The reference solution as a reader's own function."""
    names = {"__name__": "copied"}
    exec("import torch\nimport torch.distributed as dist\n" + inspect.getsource(exercises._reference(name)), names)
    return names[name]


@pytest.mark.parametrize(
    "name, answer, phrase", [pytest.param(*m, id=f"{m[0]}-{m[1].__name__}") for m in planted.MISTAKES]
)
def test_a_planted_mistake_is_refused_with_its_own_diagnosis(name, answer, phrase):
    verdict = exercises.check(name, answer)
    assert verdict.status == "failed", verdict
    assert phrase in verdict.diagnosis, verdict


@pytest.mark.parametrize("name", exercises.exercises())
def test_the_reference_passes_when_a_reader_writes_it(name):
    assert exercises.check(name, copied(name)).passed


@pytest.mark.parametrize("name, answer", [pytest.param(*r, id=f"{r[0]}-{r[1].__name__}") for r in other_ways.RIGHT])
def test_other_ways_pass_too(name, answer):
    verdict = exercises.check(name, answer)
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", exercises.exercises())
def test_each_exercise_has_hints_and_a_bank_of_mistakes(name):
    assert 2 <= len(exercises._exercise(name).hints) <= 4
    assert sum(exercise == name for exercise, *_ in planted.MISTAKES) >= 4
