"""The inputs that answers are given, and what a failure says of its case."""

import pytest
import torch

from pardist_lib.lessons.exercises import cases
from pardist_lib.lessons.exercises.judge import Wrong
from pardist_lib.lessons.exercises.watch import Seen


def test_values_depend_on_rank_and_seed_only():
    x = cases.values((2, 3), torch.float32, rank=1, seed=2)
    assert torch.equal(x, cases.values((2, 3), torch.float32, 1, 2)) and x.dtype == torch.float32
    assert not torch.equal(x, cases.values((2, 3), torch.float32, 2, 2))
    assert cases.values((4,), torch.int64, 0).dtype == torch.int64


def failing(*bad):
    def one(seed, *case):
        if case in bad:
            raise Wrong(f"case {seed}")

    return one


def news(n, dtype):
    return {f"it works with 4 ranks, but not with {n}": n != 4, f"not for {dtype}": dtype != "float32"}


def told(*bad):
    with pytest.raises(Wrong) as found:
        cases.one_by_one([(4, "float32"), (3, "float32"), (2, "float64"), (2, "int64")], news, failing(*bad))
    return found.value.diagnosis


def test_a_failure_tells_the_one_thing_that_is_new_in_its_case():
    assert told((4, "float32")) == "case 0"
    assert told((3, "float32")) == "it works with 4 ranks, but not with 3: case 1"
    assert told((2, "float64"), (2, "int64")) == "not for float64: case 2"  # other than four ranks were known by then
    assert told((2, "int64")) == "case 3"
    with pytest.raises(Wrong, match="^case 0"):  # two new things at once: neither is blamed
        cases.one_by_one([(3, "int64")], news, failing((3, "int64")))


def in_this_process(answer):
    return lambda fn, *args, n: [fn(answer, *args)]


def twice(x, y):
    return 2 * x * y


def test_a_formula():
    inputs, mistakes = [(1, 2), (3, 4.5)], [("not doubled", lambda x, y: x * y)]
    cases.formula(in_this_process(lambda x, y: torch.tensor(x * y + x * y)), twice, inputs, mistakes)
    with pytest.raises(Wrong) as found:
        cases.formula(in_this_process(lambda x, y: x * y), twice, inputs, mistakes)
    wrong = found.value
    assert (wrong.diagnosis, wrong.where, wrong.expected, wrong.got) == ("not doubled", "twice(1, 2)", "4", "2")


def test_an_answer_that_writes_into_what_it_was_given():
    def writes(x, y):
        y += 1
        return x

    seen = cases.call(writes, {"x": torch.ones(2), "y": torch.zeros(2)})
    assert torch.equal(seen.kept["given"]["y"], torch.zeros(2))
    with pytest.raises(Wrong, match="`y` was changed"):
        cases.untouched([Seen(kept={"changed": []}), seen], "here")
