"""Matmuls whose messages travel meanwhile: any chunks, against one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.mechanisms.group import split_sizes
from pardist_lib.mechanisms.tensor_parallel import (
    ParallelMLP,
)
from pardist_lib.mechanisms.tensor_parallel.overlapped import column_linear, row_linear, summed_matmul
from tests.mechanisms.tensor_parallel.nets import CLOSE, close, seeded


def half_precision():
    torch.manual_seed(0)
    mlp, x = ParallelMLP(8, 16), seeded((4, 8), torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x)
        whole = mlp.to_module()(x.detach())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and mlp[0].weight.grad.dtype == torch.float32 == x.grad.dtype
    return (y - whole).abs().max().item()


def test_under_autocast(ranks_of):
    assert max(ranks_of(2).run(half_precision, quiet=True)) < 0.02


def linear_of(which, x, weight, bias, chunks, sequence_dim, keep_gathered):
    """A rank's call, from whole tensors: (output, gradients of x, weight, bias) as parts, and what one process has."""
    rank, n = dist.get_rank(), dist.get_world_size()
    cut = lambda t, dim: t.tensor_split(n, dim)[rank].clone()  # noqa: E731
    whole = [t.clone().requires_grad_() for t in (x, weight, bias)]
    wanted = nn.functional.linear(*whole)
    upstream = seeded(wanted.shape, wanted.dtype, 7)
    wanted.backward(upstream)
    if which == "column":
        parts = [x.clone() if sequence_dim is None else cut(x, sequence_dim), cut(weight, 0), cut(bias, 0)]
        parts = [t.requires_grad_() for t in parts]
        sizes = None if sequence_dim is None else split_sizes(x.size(sequence_dim), n)
        how = {"sequence_dim": sequence_dim, "sizes": sizes, "keep_gathered": keep_gathered}
        y = column_linear(*parts, chunks=chunks, **how)
        y.backward(cut(upstream, -1))
        wanted, gradients = cut(wanted, -1), [whole[0].grad, cut(whole[1].grad, 0), cut(whole[2].grad, 0)]
        if sequence_dim is not None:
            gradients[0] = cut(gradients[0], sequence_dim)
    else:
        parts = [t.requires_grad_() for t in (cut(x, -1), cut(weight, 1), bias.clone())]
        y = row_linear(*parts, chunks=chunks, sequence_dim=sequence_dim)
        if sequence_dim is not None:
            wanted, upstream = cut(wanted, sequence_dim), cut(upstream, sequence_dim)
        y.backward(upstream)
        gradients = [cut(whole[0].grad, -1), cut(whole[1].grad, 1), whole[2].grad]
    close(y.detach(), wanted.detach(), f"{which}'s output")
    for name, p, right in zip(("x", "weight", "bias"), parts, gradients, strict=True):
        close(p.grad, right, f"{which}'s gradient of {name}")


def every_form(dtype):
    x, weight, bias = seeded((3, 5, 7), dtype), seeded((9, 7), dtype, 1), seeded((9,), dtype, 2)
    for which in ("column", "row"):
        for chunks in (1, 2, 4, 20):  # 15 tokens: some chunks have none
            for sequence_dim in (None, 0, 1, -2):
                linear_of(which, x, weight, bias, chunks, sequence_dim, True)
        linear_of(which, x[0, 0], weight, bias, 2, None, True)
        linear_of(which, x[:0], weight, bias, 2, None, True)
    linear_of("column", x, weight, bias, 1, 1, False)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_any_chunks_and_dimension_of_the_sequence_equal_one_process(ranks_of, n):
    for dtype in CLOSE:
        ranks_of(n).run(every_form, dtype, quiet=True)


def sums(chunks):
    """The sum is only there after the works' wait, and each chunk is a message of its own."""
    x, matrix = torch.ones(6, 4) * (dist.get_rank() + 1), torch.ones(4, 3)
    y, works = summed_matmul(x, matrix, chunks=chunks)
    for work in works:
        work.wait()
    return y, len(works)


def test_each_chunk_is_one_all_reduce(ranks_of):
    for chunks in (1, 2, 6, 8):
        trace = ranks_of(3).trace(sums, chunks, quiet=True)
        for rank, (y, many) in enumerate(trace.results):
            assert torch.equal(y, torch.full((6, 3), 24.0)) and many == min(chunks, 6)
            sizes = [e.bytes for e in trace.collectives if e.rank == rank]
            assert len(sizes) == many and sum(sizes) == 6 * 3 * 4
