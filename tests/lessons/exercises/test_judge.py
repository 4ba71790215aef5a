"""How what an answer gave is judged, and how typical mistakes are recognised."""

import pytest
import torch

from pardist_lib.lessons.exercises.judge import Wrong, only_calls, same
from pardist_lib.lessons.exercises.watch import Call, Seen

X = torch.arange(6.0).view(2, 3)


def refused(got, expected, mistakes=(), **more):
    with pytest.raises(Wrong) as found:
        same(got, expected, "the result", mistakes=mistakes, **more)
    return found.value


def test_one_tensor_stands_for_all_ranks():
    same([X, X.clone()], X, "the result")
    wrong = refused([X, X + 1], X, [("one too much", X + 1)])
    assert (wrong.diagnosis, wrong.where) == ("one too much", "rank 1, the result")
    assert (wrong.expected, wrong.got) == ("[0, 1, 2, 3, …]", "[1, 2, 3, 4, …]")


def test_a_mistake_has_to_explain_every_rank_that_is_wrong():
    mistakes = [("doubled", 2 * X), ("the rank's own", [X, X + 1])]
    assert refused([X, X + 1], X, mistakes).diagnosis == "the rank's own"
    assert refused([2 * X, X + 1], X, mistakes).diagnosis not in ("doubled", "the rank's own")


def test_a_mistake_of_another_shape_or_type():
    mistakes = [("one below the other", torch.Size([4, 3])), ("a list", list), ("transposed", X.T)]
    assert refused([torch.cat([X, -X])] * 2, X, mistakes).diagnosis == "one below the other"
    assert refused([[X, X]] * 2, X, mistakes).diagnosis == "a list"
    wrong = refused([X.T] * 2, X, mistakes)
    assert (wrong.diagnosis, wrong.got) == ("transposed", "a float32 tensor of shape (3, 2)")
    assert "has shape (3,), where (2, 3) is asked for" in refused([X[0]], X, mistakes).diagnosis
    assert "is None" in refused([None], X, [("unknown", None)]).diagnosis


@pytest.mark.parametrize("got, said", [
    (X * 3, "in the result elements 1 to 5"), (X.double() + 1, "is float64, where float32"),
    (X.flip(0), "in the wrong places"),
    (torch.zeros(2, 3), "is zero everywhere"), (X + float("nan"), "contains NaN"),
    ([X, X], "is a list of 2 tensors, where a float32 tensor of shape (2, 3)"),
    (None, "What a collective returns is None, too"),
])  # fmt: skip
def test_a_difference_in_one_sentence(got, said):
    assert said in refused([got], X).diagnosis


def test_only_some_calls_are_allowed():
    seen = [Seen(calls=[Call("all_reduce", 8)]), Seen(calls=[Call("broadcast", 8)])]
    only_calls(seen, ("all_reduce", "broadcast"), {})
    with pytest.raises(Wrong, match="it calls broadcast") as found:
        only_calls(seen, ("all_reduce",), {"": "it calls {op}"})
    assert found.value.where == "rank 1"
