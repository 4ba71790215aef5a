"""The ring: messages, memory that is given, what is refused."""

import pytest
import torch
import torch.distributed as dist

from pardist_lib.mechanisms import collectives
from tests.mechanisms.collectives.cases import case_of, same
from tests.mechanisms.collectives.counted import sent_by
from tests.mechanisms.refusals import refused


def test_the_ring_sends_two_n_minus_one_over_n_in_two_n_minus_one_messages(ranks_of):
    cases = [case_of("ring_all_reduce", 4, rows=1000, piece_bytes=piece_bytes) for piece_bytes in (1000, 250)]
    for messages, _ in ranks_of(4).run(sent_by, cases, quiet=True):
        assert messages[0] == [1000] * 6  # one chunk of 250 float32 a step
        assert len(messages[1]) == 24 and sum(messages[1]) == 6000 and max(messages[1]) <= 252


def with_out_and_parameters():
    rank, n = dist.get_rank(), dist.get_world_size()
    whole = torch.zeros(n, 2)
    whole[rank] = rank + 1  # as nccl's in-place all-gather: each rank's rows are where they belong already
    gathered = collectives.ring_all_gather(whole[rank : rank + 1], out=whole)
    room = torch.empty(1, 2)
    reduced = collectives.ring_reduce_scatter(whole, out=room)
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.weight, rank)
    collectives.tree_broadcast(layer.weight, src=n - 1)
    number = collectives.ring_all_reduce(torch.tensor(2.0))
    row = collectives.ring_all_gather(torch.tensor(float(rank)))
    return gathered is whole or gathered.data_ptr() == whole.data_ptr(), whole, reduced, layer.weight, number, row


def test_into_given_memory_and_of_parameters_and_single_numbers(ranks_of):
    for rank, (same_memory, whole, reduced, weight, number, row) in enumerate(ranks_of(3).run(with_out_and_parameters)):
        assert same_memory
        same(whole, torch.tensor([[1.0, 1], [2, 2], [3, 3]]), "all_gather")
        same(reduced, torch.full((1, 2), 3.0 * (rank + 1)), "reduce_scatter")
        assert weight.requires_grad and torch.equal(weight.detach(), torch.full((2, 2), 2.0))
        assert number.shape == () and number == 6
        same(row, torch.tensor([0.0, 1, 2]), "all_gather of numbers")


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda c: c.ring_all_reduce(torch.zeros(3, dtype=torch.int32), dist.ReduceOp.AVG), "AVG of torch.int32"),
        (lambda c: c.ring_all_gather(torch.zeros(3), [3, 4, 5]), "do not fit: 2 ranks"),
        (lambda c: c.ring_all_gather(torch.zeros(3, 2), out=torch.zeros(5, 2)), r"shape \[6, 2\]"),
        (lambda c: c.ring_reduce_scatter(torch.zeros(4), out=torch.zeros(4)[::2]), "out must be a contiguous"),
    ],
)
def test_refused_with_a_reason(ranks_of, wrong, told):
    with refused(told) as caught:
        ranks_of(2).run(wrong, collectives, quiet=True)
    assert caught.value.cause == "ValueError"
