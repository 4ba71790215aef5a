"""Who has which tokens; a sequence dealt out and put together, with gradients both ways."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.context_parallel.order import collect, deal, own_positions, places, shares
from tests.mechanisms.refusals import refused


def test_zigzag_gives_rank_i_the_chunks_i_and_2n_minus_1_minus_i():
    owner = torch.empty(16, dtype=torch.long)
    for rank, share in enumerate(shares(16, 4)):
        owner[places(share)] = rank
    assert owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 2, 2, 1, 1, 0, 0]


@given(st.integers(0, 70), st.integers(1, 9))
def test_shares_are_chunks_of_tensor_split_and_hold_each_token_once(length, n):
    for order, chunks in (("zigzag", 2 * n), ("contiguous", n)):
        cut = torch.arange(length).tensor_split(chunks)
        got = [places(share) for share in shares(length, n, order)]
        wanted = [torch.cat([cut[i], cut[2 * n - 1 - i]]) for i in range(n)] if order == "zigzag" else cut
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert torch.equal(torch.cat(got).sort().values, torch.arange(length))


def test_zigzag_evens_out_causal_work_and_contiguous_does_not():
    """Keys that a rank's queries see in step t, from all positions: what each waits for is the largest of a step."""
    n, c = 4, 16  # tokens of a zigzag chunk

    def seconds(order):
        at = [places(share) for share in shares(2 * n * c, n, order)]
        seen = [[(at[i][:, None] >= at[(i - t) % n]).sum().item() for i in range(n)] for t in range(n)]
        return sum(map(max, seen)), seen

    (plain, _), (even, seen) = seconds("contiguous"), seconds("zigzag")
    assert all(step == [2 * c * c] * n for step in seen[1:]) and seen[0] == [c * (2 * c + 1)] * n
    diagonal = c  # half of a square is half of its diagonal more: 2c·(2c + 1)/2 keys
    assert plain == (2 * c) ** 2 * (n - 0.5) + diagonal and even == (2 * c) ** 2 * n / 2 + diagonal


# ---- on ranks -------------------------------------------------------------------------------------------------


def there_and_back(cases):
    results = []
    for shape, dim, order, dtype, length in cases:
        g = torch.Generator().manual_seed(0)
        whole = torch.randn(shape, generator=g, dtype=torch.float64).mul(9).to(dtype)
        own = deal(whole, dim=dim, order=order)
        back = collect(own, dim=dim, order=order, length=shape[dim] if length else None)
        positions = own_positions(shape[dim], order=order)
        apart = own.numel() == 0 or own.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
        results.append((torch.equal(back, whole), torch.equal(own, whole.index_select(dim, positions)), apart))
    return results


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_what_is_dealt_comes_back(ranks_of, n):
    cases = [((2, s), 1, order, torch.int64, s % 2) for s in (0, 1, 2, 7, 8, 21) for order in ("zigzag", "contiguous")]
    cases += [((2, 3, 9, 4), dim, "zigzag", torch.float32, True) for dim in (0, 1, 2, -1, -4)]
    cases += [((5,), 0, "zigzag", torch.bool, False), ((0, 6), 1, "zigzag", torch.float32, False)]
    for results in ranks_of(4).run(in_world, n, there_and_back, cases, quiet=True)[:n]:
        for case, result in zip(cases, results, strict=True):
            assert all(result), (case, result)


def gradients(order):
    """Of what is dealt: each rank's part of it in its own loss. Of what is collected: the same loss on every rank."""
    whole = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    weights = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = deal(whole, order=order)
    (own.sin() * deal(weights, order=order)).sum().backward()
    leaf = deal(whole.detach(), order=order).requires_grad_()
    (collect(leaf, order=order).sin() * weights).sum().backward()
    return whole.grad, collect(leaf.grad, order=order), whole.detach().cos() * weights


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_gradients_go_both_ways(ranks_of, n):
    for order in ("zigzag", "contiguous"):
        for dealt, collected, want in ranks_of(4).run(in_world, n, gradients, order, quiet=True)[:n]:
            torch.testing.assert_close(dealt, want, rtol=1e-12, atol=0)
            torch.testing.assert_close(collected, want, rtol=1e-12, atol=0)


REFUSED = [
    (lambda: deal(torch.zeros(2, 4), order="zig"), "order is 'zigzag' or 'contiguous', not 'zig'"),
    (lambda: deal(torch.zeros(4)), r"deal: a tensor of shape \[4\] has no dimension 1"),
    (lambda: deal(torch.zeros(2, 4), group=4), "deal: group has to be a process group, or None.*, not a int"),
    (lambda: collect(torch.zeros(2, dist.get_rank())), r"have \[0, 1, 2, 3\] tokens, but of 6 the order 'zigzag'"),
    (lambda: collect(deal(torch.zeros(2, 7)), order="contiguous"), r"were they dealt with order='zigzag'\?"),
    (lambda: collect(deal(torch.zeros(2, 8)), length=4), "rank . has 2 tokens, but of 4 the order 'zigzag' gives it 1"),
    (lambda: collect(torch.zeros(2 + dist.get_rank() // 3, 2)), "numbers to a token: rank 0 has 2, rank 3 has 3"),
    (lambda: collect(torch.zeros(2, 1), order=("zigzag", "contiguous")[dist.get_rank() // 2]),
     "the ranks differ in order: rank 0 has zigzag, rank 2 has contiguous"),
    (lambda: collect(torch.zeros(2, 1), length=2.0), "length is how many tokens the whole sequence has.*not 2.0"),
    (lambda: own_positions(-1), "own_positions: length is how many tokens .*, 0 or more, not -1"),
    (lambda: deal(torch.zeros(2, 4), group=dist.new_group([0, 1])), "deal: rank . is not in this group"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, told", REFUSED)
def test_refused_with_a_reason(ranks_of, wrong, told):
    with refused(told) as caught:
        ranks_of(4).run(wrong, quiet=True)
    assert caught.value.cause == "ValueError"
