"""Tensors as messages need them: views where that is possible, scratch memory kept, results where they belong."""

import threading

import pytest
import torch
import torch.distributed as dist

from pardist_lib.mechanisms.collectives import buffers
from tests.mechanisms.collectives.cases import same


def test_flattened_is_a_view_or_is_written_back():
    x = torch.arange(6.0).view(2, 3)
    with buffers.flattened(x) as flat:
        assert flat.data_ptr() == x.data_ptr() and flat.shape == (6,)
    turned = x.t()
    with buffers.flattened(turned) as flat:
        assert flat.data_ptr() != x.data_ptr()
        flat += 1
    same(x, torch.arange(1.0, 7).view(2, 3), "written back")


@pytest.mark.parametrize("piece_bytes, count", [(8, 6), (16, 3), (20, 3), (48, 1), (1 << 20, 1)])
def test_every_chunk_is_cut_into_as_many_pieces_as_the_longest(piece_bytes, count):
    chunks = torch.arange(23.0).tensor_split([12, 12, 20])
    cut = buffers.pieces(chunks, piece_bytes)
    assert [len(of) for of in cut] == [count] * 4
    for of, chunk in zip(cut, chunks, strict=True):
        same(torch.cat(of), chunk, "put together")
    assert max(p.nbytes for p in cut[0]) <= max(piece_bytes, 4) + 4


def test_scratch_is_kept_for_the_next_one_of_its_thread():
    mine = buffers.scratch(torch.empty(0), 4, 5)
    assert mine.shape == (4, 5) and mine.dtype == torch.float32
    again = buffers.scratch(torch.empty(0, dtype=torch.int16), 3)
    assert again.data_ptr() == mine.data_ptr() and again.dtype == torch.int16
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(buffers.scratch(torch.empty(0), 4, 5)))
    thread.start()
    thread.join()
    assert elsewhere[0].data_ptr() != mine.data_ptr()


def test_out_has_to_fit():
    like = torch.empty(0)
    assert buffers.out_or_new(None, (2, 3), like).shape == (2, 3)
    out = torch.empty(2, 3)
    assert buffers.out_or_new(out, (2, 3), like).data_ptr() == out.data_ptr()
    for wrong in (torch.empty(3, 2), torch.empty(2, 3, dtype=torch.float64), torch.empty(3, 2).t()):
        with pytest.raises(ValueError, match=r"out must be a contiguous torch.float32 tensor of shape \[2, 3\]"):
            buffers.out_or_new(wrong, (2, 3), like)


def test_operations_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="not one of SUM, AVG, MAX, MIN, PRODUCT"):
        buffers.check_op(dist.ReduceOp.BAND, torch.ones(1))
    with pytest.raises(ValueError, match="AVG of torch.int32 is not a torch.int32"):
        buffers.check_op(dist.ReduceOp.AVG, torch.ones(1, dtype=torch.int32))
    buffers.check_op(dist.ReduceOp.AVG, torch.ones(1, dtype=torch.complex64))
