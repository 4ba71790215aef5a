"""How tensors are put into buckets."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pardist_lib.mechanisms.data_parallel.buckets import fill_buckets


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
        assert all(v.is_contiguous() for v in bucket.views)
        places = [next(i for i, t in enumerate(tensors) if t is m) for m in bucket.parameters]
        assert places == sorted(places)
        *before, last = (t.numel() * t.element_size() for t in bucket.parameters)
        assert sum(before) < (first if index == 0 else max(mb, first)) * 2**20, "closed as soon as it is large enough"


def test_views_lie_in_memory_as_their_tensors_do_but_without_gaps():
    tensors = [torch.empty(6, 4).t(), torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
               torch.empty(6, 9)[:, :4], torch.empty(1).expand(5), torch.empty(()), torch.empty(0, 3)]  # fmt: skip
    [bucket] = fill_buckets(tensors)
    for i, (t, view) in enumerate(zip(tensors, bucket.views, strict=True)):
        view.fill_(i)
        assert view.shape == t.shape and (i > 1 or view.stride() == t.stride())
    assert bucket.flat.tolist() == sum(([i] * t.numel() for i, t in enumerate(tensors)), [])
