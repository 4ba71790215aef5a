"""Messages: what is sent and received, in which order, and through which memory."""

import pytest
import torch
import torch.distributed as dist

from pardist_lib.mechanisms.collectives import point_to_point
from tests.mechanisms.collectives.cases import NAMES, case_of, expected, same, several


def through_the_host(cases):
    """As for ranks that share one GPU: each message through a copy."""
    saved = point_to_point._gloo_on_gpu
    point_to_point._gloo_on_gpu = lambda tensor, group: True
    try:
        return several(cases)
    finally:
        point_to_point._gloo_on_gpu = saved


def test_messages_can_pass_through_the_hosts_memory(ranks_of):
    cases = [case_of(name, 3) for name in NAMES]
    results = ranks_of(3).run(through_the_host, cases, quiet=True)
    for i, case in enumerate(cases):
        for rank, want in enumerate(expected(case)):
            same(results[rank][i], want, f"rank {rank} of {case}")


def swapped():
    """Everybody sends to everybody before anybody waits; what is empty is not sent at all."""
    rank, n = dist.get_rank(), dist.get_world_size()
    others = [r for r in range(n) if r != rank]
    arriving = {r: torch.empty(3) for r in others}
    sends = [(torch.full((3,), 10.0 * rank + r), r) for r in others]
    nothing = [(torch.empty(0), r) for r in others]
    works = point_to_point.exchange(sends + nothing, [(arriving[r], r) for r in others] + nothing)
    point_to_point.wait(works)
    assert point_to_point.exchange() == point_to_point.exchange(nothing, nothing) == []
    return arriving


def test_messages_cross_and_empty_ones_are_left_out(ranks_of):
    for rank, arriving in enumerate(ranks_of(3).run(swapped, quiet=True)):
        assert {r: t.tolist() for r, t in arriving.items()} == {r: [10.0 * r + rank] * 3 for r in range(3) if r != rank}


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_pipelined_tasks_take_turns_at_most_so_many_at_a_time(depth):
    events = []

    def task(i):
        for step in range(i % 3 + 1):
            events.append((i, step))
            yield
        events.append((i, "done"))

    point_to_point.pipelined((task(i) for i in range(5)), depth)
    assert sorted(i for i, step in events if step == "done") == list(range(5))
    running = set()
    for i, step in events:
        running = running - {i} if step == "done" else running | {i}
        assert len(running) <= depth
    if depth == 1:
        assert [i for i, _ in events] == sorted(i for i, _ in events)
    if depth == 2:  # the second starts before the first goes on
        assert events[:3] == [(0, 0), (1, 0), (0, "done")]
