"""Other ways to all-reduce and all-gather: how many messages each rank sends."""

import pytest
import torch

from pardist_lib.mechanisms import collectives
from pardist_lib.mechanisms.group import split_sizes
from tests.mechanisms.collectives.cases import (
    case_of,
    same,
)
from tests.mechanisms.collectives.counted import sent_by


@pytest.mark.parametrize("n", [2, 3, 4])
def test_how_many_messages(ranks_of, n):
    """Few steps are what these are for."""
    names = ["recursive_doubling_all_reduce", "halving_doubling_all_reduce", "bruck_all_gather", "tree_all_reduce"]
    cases = [case_of(name, n, rows=12, sizes=split_sizes(12, n), piece_bytes=1 << 20) for name in names]
    steps, power = n.bit_length() - 1, 1 << n.bit_length() - 1
    for rank, (messages, _) in enumerate(ranks_of(n).run(sent_by, cases, quiet=True)):
        doubling, halving, bruck, _ = (len(sizes) for sizes in messages)
        paired = rank < 2 * (n - power)
        sits_out = paired and rank % 2 == 0
        assert doubling == (1 if sits_out else steps + paired)
        assert halving == (1 if sits_out else 2 * steps + paired)
        assert bruck == (n - 1).bit_length()
    assert sum(len(messages[3]) for messages, _ in ranks_of(n).run(sent_by, cases, quiet=True)) == 2 * (n - 1)


def test_naive_reduce_scatter_leaves_the_first_ranks_tensor_alone(ranks_of):
    def on_rank():
        x = torch.arange(6.0)
        got = collectives.naive_reduce_scatter(x)
        return got, x

    for rank, (got, x) in enumerate(ranks_of(3).run(on_rank, quiet=True)):
        same(got, 3 * torch.arange(6.0).tensor_split(3)[rank], f"rank {rank}")
        same(x, torch.arange(6.0), "input")
