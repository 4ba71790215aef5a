"""How tensors are put into buckets."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pardist_lib.mechanisms.buckets import fill_buckets


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 600), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))),
    st.floats(1e-6, 2e-3), st.floats(1e-6, 2e-3),
)  # fmt: skip
def test_buckets_hold_every_tensor_once_in_order(kinds, mb, first):
    tensors = [torch.empty(size, dtype=dtype) for size, dtype in kinds]
    buckets = fill_buckets(tensors, mb, first)
    assert sorted(id(t) for b in buckets for t in b.parameters) == sorted(map(id, tensors))
    for index, bucket in enumerate(buckets):
        assert bucket.index == index and len({t.dtype for t in bucket.parameters}) == 1
        assert [v.shape for v in bucket.views] == [t.shape for t in bucket.parameters]
        places = [next(i for i, t in enumerate(tensors) if t is m) for m in bucket.parameters]
        assert places == sorted(places)
        *before, last = (t.numel() * t.element_size() for t in bucket.parameters)
        assert sum(before) < (first if index == 0 else max(mb, first)) * 2**20, "closed as soon as it is large enough"
