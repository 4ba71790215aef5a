"""What attention of a dealt-out sequence refuses, on which rank, and what it says would fit."""

import pytest
import torch
import torch.distributed as dist

from pardist_lib.mechanisms.context_parallel.labels import mean_over_tokens, next_tokens
from tests.mechanisms.context_parallel.cases import ATTENTIONS
from tests.mechanisms.refusals import refused


def called(how, q=(2, 4, 3, 8), k=None, v=None, dtypes=(torch.float32,) * 3, **options):
    """On a rank: attention of tensors of these shapes; 12 tokens in all where nothing else is said."""
    shapes = q, k or q, v or k or q
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return ATTENTIONS[how](*tensors, **options)


BOTH = [
    (lambda how: called(how, (2, 3, 8)), r"rank .: q, k and v are \(batch, heads, own tokens, width\), not q \["),
    (lambda how: called(how, k=(2, 4, 4, 8)), "rank .: q has 3 tokens, k 4 and v 4.*deal all three in the same order"),
    (lambda how: called(how, v=(2, 4, 2, 8)), "q has 3 tokens, k 3 and v 2"),
    (lambda how: called(how, k=(1, 4, 3, 8)), "all have the same batch"),
    (lambda how: called(how, k=(2, 4, 3, 8), v=(2, 2, 3, 8)), "k and v the same heads"),
    (lambda how: called(how, k=(2, 4, 3, 4)), "q and k the same width"),
    (lambda how: called(how, (2, 4, 3, 0)), "the same width, 1 or more"),
    (lambda how: called(how, k=(2, 3, 3, 8)), "4 heads of queries cannot share 3 heads of keys and values evenly"),
    (lambda how: called(how, k=(2, 0, 3, 8)), "cannot share 0 heads"),
    (lambda how: called(how, dtypes=(torch.float32, torch.float32, torch.float64)), "of one floating-point dtype, not"),
    (lambda how: called(how, dtypes=(torch.int64,) * 3), "of one floating-point dtype"),
    (lambda how: called(how, mask=torch.ones(12, 12)), "mask is a function of positions.*not a Tensor"),
    (lambda how: called(how, mask=lambda q, k: q - k), r"has to answer with bool of shape \[.*not with torch.int64"),
    (lambda how: called(how, mask=lambda q, k: True), "has to answer with bool .* not with bool"),
    (lambda how: called(how, mask=lambda q, k: (q > k)[:, :1, None]), "has to answer with bool"),
    (lambda how: called(how, mask=lambda q, k: torch.ones(7, 1).bool()), r"not with torch.bool \[7, 1\]"),
    (lambda how: called(how, documents=torch.zeros(3).long()), r"of shape \[12\] or \[2, 12\], not torch.int64 \[3\]"),
    (lambda how: called(how, documents=[0] * 11), r"of shape \[12\] or \[2, 12\], not torch.int64 \[11\]"),
    (lambda how: called(how, documents=torch.zeros(3, 12).long()), r"not torch.int64 \[3, 12\]"),
    (lambda how: called(how, documents=torch.zeros(12)), "whole numbers of shape"),
    (lambda how: called(how, order="ring"), "order is 'zigzag' or 'contiguous', not 'ring'"),
    (lambda how: called(how, group="all"), "group has to be a process group, or None for all ranks, not a str"),
    (lambda how: called(how, length=8), "rank . has 3 tokens, but of 8 the order 'zigzag' gives it 2"),
    (lambda how: called(how, length="12"), "length is how many tokens the whole sequence has"),
    (lambda how: called(how, (2, 4, 2 + dist.get_rank() // 3, 8), order="contiguous"),
     r"the ranks have \[2, 2, 2, 3\] tokens, but of 9 the order 'contiguous' gives \[3, 2, 2, 2\]: deal\(sequence"),
    (lambda how: called(how, (2, 4, 2 - dist.get_rank() // 3, 8)), r"\[2, 2, 2, 1\].*with order='contiguous'\?"),
    (lambda how: called(how, causal=dist.get_rank() != 2), "differ in causal: rank 0 has True, rank 2 has False"),
    (lambda how: called(how, (2, 4, 3, 8 + 8 * (dist.get_rank() == 1))), "width: rank 0 has 8, rank 1 has 16"),
    (lambda how: called(how, order=("zigzag", "contiguous")[dist.get_rank() == 3]), "order: rank 0 has zigzag, rank 3"),
    (lambda how: called(how, documents=[0] * 12 if dist.get_rank() else None), "differ in documents given"),
    (lambda how: called(how, dtypes=((torch.float32, torch.bfloat16)[dist.get_rank() % 2],) * 3),
     "dtype: rank 0 has torch.float32, rank 1 has torch.bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("how", ATTENTIONS)
@pytest.mark.parametrize("case", range(len(BOTH)))
def test_refused_with_a_reason(ranks_of, how, case):
    wrong, told = BOTH[case]
    with refused(told) as caught:
        ranks_of(4).run(wrong, how, quiet=True)
    assert caught.value.cause == "ValueError"


ONE = [
    (lambda: called("all to all", (2, 6, 3, 8)),
     "6 heads cannot be split over 4 ranks.*: 1 or 2 or 3 or 6 ranks would fit, or 4 or 8 heads; ring_att"),
    (lambda: called("all to all", (2, 4, 3, 8), (2, 2, 3, 8)),
     "2 key-value heads cannot be split over 4 ranks.*: 1 or 2 ranks would fit, or 4 key-value heads"),
    (lambda: next_tokens(torch.zeros(4).long()), r"tokens are \(batch, s\), the whole sequence, not of shape \[4\]"),
    (lambda: next_tokens(torch.zeros(2, 4).long(), documents=[0, 0, 1]), r"next_tokens: documents.*\[4\] or \[2, 4\]"),
    (lambda: mean_over_tokens(torch.zeros(4), torch.ones(3).bool()), r"rank .: counted .* \[4\], not torch.bool \[3\]"),
    (lambda: mean_over_tokens(torch.zeros(4), torch.ones(4)), "counted has to be bool"),
    (lambda: mean_over_tokens(torch.zeros(4), group=0), "mean_over_tokens: group has to be a process group"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, told", ONE)
def test_refused_by_one_of_them(ranks_of, wrong, told):
    with refused(told) as caught:
        ranks_of(4).run(wrong, quiet=True)
    assert caught.value.cause == "ValueError"
