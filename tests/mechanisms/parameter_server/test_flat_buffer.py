"""Tensors of any dtypes in one run of bytes."""

import torch

from pardist_lib.mechanisms.parameter_server.flat_buffer import FlatBuffer


def test_a_flat_buffer_holds_any_dtypes_without_gaps():
    tensors = [torch.ones(3, dtype=torch.bfloat16), torch.arange(4), torch.ones(2, 2), torch.tensor(True),
               torch.ones(1, dtype=torch.complex64), torch.empty(0, 3)]  # fmt: skip
    buffer = FlatBuffer(tensors).read_from(tensors)
    assert buffer.raw.numel() == 6 + 32 + 16 + 1 + 8
    again = [torch.zeros_like(t) for t in tensors]
    buffer.write_into(again)
    assert all(torch.equal(a, t) and a.dtype == t.dtype for a, t in zip(again, tensors, strict=True))
    assert not FlatBuffer(tensors).read_from([None] * 6).raw.any()
