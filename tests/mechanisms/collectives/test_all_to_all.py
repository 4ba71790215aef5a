"""All-to-all: chunks of any size, and what is refused."""

import pytest
import torch
import torch.distributed as dist

from pardist_lib.mechanisms import collectives
from tests.mechanisms.collectives.cases import same
from tests.mechanisms.refusals import refused


def uneven(rows_of, width):
    """rows_of[a][b]: rows that rank a has for rank b; each row says where it comes from and goes to."""
    rank, n = dist.get_rank(), dist.get_world_size()
    chunks = [torch.full((rows_of[rank][to], width), 10.0 * rank + to) for to in range(n)]
    return collectives.pairwise_all_to_all(torch.cat(chunks), rows_of[rank], [rows_of[a][rank] for a in range(n)])


def test_every_rank_may_have_other_sizes_for_every_other(ranks_of):
    rows_of = [[2, 0, 3], [1, 1, 0], [0, 4, 2]]
    for rank, got in enumerate(ranks_of(3).run(uneven, rows_of, 5, quiet=True)):
        wanted = torch.cat([torch.full((rows_of[a][rank], 5), 10.0 * a + rank) for a in range(3)])
        same(got, wanted, f"rank {rank}")


def there_and_back(rows_of, dtype, group=None):
    """(what arrives, the gradient of what was sent, where the gradient of a row says where it was computed); and the
    gradient of its gradient."""
    rank, n = dist.get_rank(), dist.get_world_size()
    chunks = [torch.full((rows_of[rank][to], 2), 10.0 * rank + to) for to in range(n)]
    x = torch.cat(chunks).to(dtype).requires_grad_()
    received = [rows_of[a][rank] for a in range(n)]
    y = collectives.all_to_all_in_group(x, rows_of[rank], received, group)
    factors = torch.full_like(y, rank + 1.0).requires_grad_()
    (gradient,) = torch.autograd.grad((y * factors).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((gradient * x.detach()).sum(), factors)
    return y.detach(), gradient.detach(), second


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gradient_goes_back_to_where_its_row_came_from(ranks_of, dtype):
    rows_of = [[2, 0, 3], [1, 1, 0], [0, 4, 0]]
    for rank, (y, gradient, second) in enumerate(ranks_of(3).run(there_and_back, rows_of, dtype, quiet=True)):
        arrived = [torch.full((rows_of[a][rank], 2), 10.0 * a + rank) for a in range(3)]
        same(y, torch.cat(arrived).to(dtype), f"rank {rank}")
        same(second, y, f"gradient of the gradient on rank {rank}")
        computed = [torch.full((rows_of[rank][to], 2), to + 1.0) for to in range(3)]
        same(gradient, torch.cat(computed).to(dtype), f"gradient on rank {rank}")


def into_given_memory():
    x, n = torch.arange(6.0) + 10 * dist.get_rank(), dist.get_world_size()
    out = [torch.empty(6) for _ in range(3)]
    got = [collectives.pairwise_all_to_all(x, out=out[0]), collectives.naive_all_to_all(x, out=out[1]),
           collectives.bruck_all_to_all(x, out=out[2])]  # fmt: skip
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(got, out, strict=True)) and 6 % n == 0
    return out


def test_into_given_memory(ranks_of):
    for rank, out in enumerate(ranks_of(3).run(into_given_memory, quiet=True)):
        wanted = torch.cat([torch.arange(6.0).tensor_split(3)[rank] + 10 * a for a in range(3)])
        for got in out:
            same(got, wanted, f"rank {rank}")


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda c: c.bruck_all_to_all(torch.zeros(3)), "2 ranks do not divide 3 rows"),
        (lambda c: c.pairwise_all_to_all(torch.zeros(3), [1, 1]), "do not fit 3 rows"),
        (
            lambda c: c.all_to_all_in_group(torch.zeros(3), [1, 1], [1, 1]),
            r"rank \d: send_sizes \[1, 1\] .* do not fit",
        ),
        (lambda c: c.all_to_all_in_group(torch.zeros(3), [3], [3]), "one size for each rank"),
        (lambda c: c.all_to_all_in_group(torch.zeros(3), [4, -1], [4, -1]), r"send_sizes \[4, -1\]"),
    ],
)
def test_refused_with_a_reason(ranks_of, wrong, told):
    with refused(told) as caught:
        ranks_of(2).run(wrong, collectives, quiet=True)
    assert caught.value.cause == "ValueError"
