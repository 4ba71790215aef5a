"""What is seen of an answer: its calls with group and dtype, its result whatever that is; nothing is left behind."""

import re
import sys
import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed import Work

from pardist_lib.lessons.exercises import check
from pardist_lib.lessons.exercises.watch import calls_so_far, watched
from pardist_lib.lessons.worlds import group_of
from pardist_lib.mechanisms.tensor_parallel import ColumnParallelLinear

pytestmark = pytest.mark.usefixtures("ranks", "answers_folder")


@pytest.mark.parametrize("result", ["threading.Lock()", "(i for i in [1])", "object", "[[[[[[1]]]]]]", "float('nan')",
                                    "b'x' * 10**7", "torch.ones(2).to_sparse()", "{'a': 1}", "1 << 70"])  # fmt: skip
def test_results_that_are_not_asked_for(result):
    def answer(n, rank, world_size):
        return eval(result, {"threading": threading, "torch": torch})

    def numbers(size_in_bytes, n):
        return eval(result, {"threading": threading, "torch": torch})

    assert check("shard_rows", answer).status == check("ring_bytes", numbers).status == "failed"
    assert len(repr(check("shard_rows", answer))) < 2000


def calls_of_all_kinds():
    half = group_of([0, 2]) if dist.get_rank() % 2 == 0 else group_of([0, 2]) and None
    x = torch.ones(2, dtype=torch.float64)

    def answer():
        dist.all_reduce(x.float() / 2)
        if half:
            functional.all_reduce(x, "sum", half)
            dist.all_reduce(x, group=half)

    return watched(answer)


def test_calls_are_seen_with_their_group_and_dtype(ranks):
    first, second = ranks.run(calls_of_all_kinds)[:2]
    assert [(c.op, c.bytes, c.dtype, c.group) for c in first.calls] == [
        ("all_reduce", 8, "float32", (0, 1, 2, 3)), ("all_reduce", 16, "float64", (0, 2)),
        ("all_reduce", 16, "float64", (0, 2)),
    ]  # fmt: skip
    assert len(second.calls) == 1 and "div" in first.ops and "add" not in first.ops and "float32" in first.dtypes


def functional_calls():
    x = torch.ones(2)

    def answer():
        dist._broadcast_coalesced(dist.group.WORLD, [x], 2**20, 0)
        functional.all_reduce_coalesced([x, x], "sum", dist.group.WORLD)
        functional.all_gather_tensor(x, 0, dist.group.WORLD)
        functional.all_to_all_single(x.repeat(2), None, None, dist.group.WORLD)
        return functional.all_reduce(x, "sum", dist.group.WORLD)

    return watched(answer)


def test_functional_collectives_have_the_names_of_others_and_are_waited_for(ranks):
    for seen in ranks.run(functional_calls):
        made = [(call.op, call.bytes) for call in seen.calls]
        n = len(seen.calls[-1].group)
        assert made == [
            ("broadcast", 8),
            ("all_reduce", 16),
            ("all_gather", 8 * n),
            ("all_to_all", 16),
            ("all_reduce", 8),
        ]
        assert torch.equal(seen.result, torch.full((2,), float(n)))
        assert not seen.unwaited and not seen.hidden and not seen.early


def test_a_check_leaves_no_trace_on_the_ranks(ranks):
    def state():
        return repr(Work.wait), sys.getprofile(), torch.utils._python_dispatch._get_current_dispatch_mode() is None

    before = ranks.run(state)
    check("exchange", lambda tensor: tensor)
    assert re.sub("0x\\w+", "", repr(ranks.run(state))) == re.sub("0x\\w+", "", repr(before))


def calls_of_all_threads():
    began, one_more = calls_so_far(), threading.Thread(target=lambda: dist.all_reduce(torch.ones(1)))
    seen = watched(lambda: [one_more.start(), one_more.join(), dist.all_reduce(torch.ones(1))])
    return calls_so_far() - began, len(seen.calls), seen.hidden


def test_calls_are_counted_where_nobody_looks(ranks):
    assert ranks.run(calls_of_all_threads) == [(2, 1, 1)] * 4


def reduce_scatter_of_a_list():
    n = dist.get_world_size()
    return watched(lambda: dist.reduce_scatter(torch.empty(1), [torch.ones(1) for _ in range(n)]))


def test_a_call_that_torch_makes_of_several_is_not_hidden(ranks):
    for seen in ranks.run(reduce_scatter_of_a_list):
        assert [call.op for call in seen.calls] == ["reduce_scatter"] and seen.hidden == 0


def step_after_a_split():
    ColumnParallelLinear(4, 4)  # from now on every optimizer's step is looked at on this rank
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)

    def answer():
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        torch.optim.SGD([p], lr=0.1).step()

    return watched(answer)


def test_a_guard_that_the_lesson_has_set_up_is_not_called_by_the_answer(ranks):
    assert [seen.reference for seen in ranks.run(step_after_a_split)] == [""] * 4
