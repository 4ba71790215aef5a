"""Collectives with a root: the trees, whom a rank talks to, what is refused."""

import pytest
import torch
import torch.distributed as dist

from pardist_lib.mechanisms import collectives
from pardist_lib.mechanisms.collectives import rooted
from tests.mechanisms.refusals import refused


@pytest.mark.parametrize("n", range(1, 20))
@pytest.mark.parametrize("tree", [rooted.star, rooted.chain, rooted.binomial])
def test_a_tree_reaches_every_seat_once(tree, n):
    found = [0]
    for seat in found:
        parent, children = tree(seat, n)
        assert (parent is None) == (seat == 0)
        assert all(tree(child, n)[0] == seat for child in children)
        found += children
    assert sorted(found) == list(range(n))


@pytest.mark.parametrize("n", range(1, 20))
def test_a_binomial_tree_is_as_deep_as_the_logarithm_and_branches_are_runs_of_seats(n):
    for seat in range(n):
        steps, above = 0, seat
        while above:
            steps, above = steps + 1, rooted.binomial(above, n)[0]
        assert steps <= (n - 1).bit_length()
        below = [seat]
        for s in below:
            below += rooted.binomial(s, n)[1]
        assert sorted(below) == list(range(seat, seat + rooted.branch(rooted.binomial, seat, n)))


def test_the_root_may_be_any_rank():
    assert rooted.neighbours(rooted.chain, 2, 1, 4) == (1, [3])
    assert rooted.neighbours(rooted.chain, 0, 1, 4) == (3, [])
    assert rooted.neighbours(rooted.star, 1, 1, 3) == (None, [2, 0])


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda c: c.tree_reduce(torch.zeros(3), 0, dist.ReduceOp.BAND), "not one of SUM, AVG, MAX, MIN, PRODUCT"),
        (lambda c: c.naive_scatter(torch.zeros(2), torch.zeros(5) if dist.get_rank() == 0 else None), "whole tensor"),
    ],
)
def test_refused_with_a_reason(ranks_of, wrong, told):
    with refused(told) as caught:
        ranks_of(2).run(wrong, collectives, quiet=True)
    assert caught.value.cause == "ValueError"
