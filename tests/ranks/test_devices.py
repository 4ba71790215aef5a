"""Which backend and device a rank takes, on machines that are not here: the count of GPUs is a stand-in."""

import pytest
import torch
import torch.distributed as dist

from pardist_lib.ranks.rank import backend_and_device


@pytest.mark.parametrize(
    "gpus, nccl, backend, devices",
    [
        (0, True, "gloo", ["cpu"] * 4),
        (1, True, "gloo", ["cuda:0"] * 4),
        (3, True, "gloo", ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]),
        (4, True, "cpu:gloo,cuda:nccl", ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        (8, True, "cpu:gloo,cuda:nccl", ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        (8, False, "gloo", ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
    ],
)
def test_a_rank_takes_what_there_is(monkeypatch, gpus, nccl, backend, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    assert [backend_and_device(rank, 4) for rank in range(4)] == [(backend, torch.device(d)) for d in devices]
