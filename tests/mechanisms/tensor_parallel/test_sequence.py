"""Norms on a part of the sequence: against one process and DTensor."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.collectives.autograd import gather_from_group
from pardist_lib.mechanisms.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from pardist_lib.mechanisms.tensor_parallel.sequence import (
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    parallel_norm,
)
from tests.mechanisms.refusals import refused
from tests.mechanisms.tensor_parallel.nets import weights_like


def close(got, want, what):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")


def norms():
    rank, n = dist.get_rank(), dist.get_world_size()
    found = []
    for kind, split_kind in ((nn.LayerNorm, SequenceParallelLayerNorm), (nn.RMSNorm, SequenceParallelRMSNorm)):
        torch.manual_seed(rank)
        norm = split_kind.from_module(nn.init.normal_((whole := kind(6, dtype=torch.float64)).weight) is None or whole)
        torch.manual_seed(0)
        nn.init.normal_((whole := kind(6, dtype=torch.float64)).weight)
        x = torch.randn(2, 7, 6, dtype=torch.float64)
        (whole(x) * weights_like(x)).sum().backward()
        mine = x.tensor_split(n, 1)[rank]
        (norm(mine) * weights_like(x).tensor_split(n, 1)[rank]).sum().backward()
        pairs = [(p.grad, q.grad) for p, q in zip(norm.parameters(), whole.parameters(), strict=True)]
        pairs += list(zip(norm.to_module().parameters(), whole.parameters(), strict=True))
        found.append(max((a - b).abs().max().item() for a, b in pairs))
        found.append(type(norm.to_module()) is kind)
        torch.manual_seed(rank)
        found.append(all(len(set(map(tuple, gather(p)))) == 1 for p in split_kind(6).parameters()))
    return found


def gather(p):
    return gather_from_group(p.detach()[None], 0).tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_norms_find_the_gradient_of_the_whole_sequence(ranks_of, n):
    for apart, back, alike, apart_rms, back_rms, alike_rms in ranks_of(4).run(in_world, n, norms, quiet=True)[:n]:
        assert apart < 1e-12 and apart_rms < 1e-12 and back and back_rms and alike and alike_rms


# ---- beside DTensor -------------------------------------------------------------------------------------------


def beside_dtensor():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    n, rank = dist.get_world_size(), dist.get_rank()

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(self.norm(x))))

    torch.manual_seed(0)
    theirs = Mlp()
    nn.init.normal_(theirs.norm.weight), nn.init.normal_(theirs.norm.bias)
    norm = parallel_norm(theirs.norm)
    up = ColumnParallelLinear.from_module(theirs.up, sequence_parallel=True)
    down = RowParallelLinear.from_module(theirs.down, sequence_parallel=True)
    plan = {
        "norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Shard(1)),
    }  # fmt: skip
    theirs = parallelize_module(theirs, init_device_mesh("cpu", (n,)), plan)
    shards = [
        torch.randn(2, 4 * n, 16, generator=torch.Generator().manual_seed(1)).chunk(n, 1)[rank].clone() for _ in "ab"
    ]
    x, theirs_x = (t.requires_grad_() for t in shards)
    y = x + down(F.gelu(up(norm(x))))
    y.square().sum().backward()
    their_y = theirs(theirs_x)
    their_y.pow(2).sum().backward()
    grads = [norm.weight.grad, norm.bias.grad, up.weight.grad, up.bias.grad, down.weight.grad, down.bias.grad]
    their_grads = [p.grad for p in theirs.parameters()]
    whole = [g.full_tensor() for g in their_grads[:2]] + [g.to_local() for g in their_grads[2:5]]
    return [y.detach(), x.grad, *grads], [
        their_y.to_local().detach(),
        theirs_x.grad,
        *whole,
        their_grads[5].full_tensor(),
    ]


@pytest.mark.parametrize("n", [2, 4])
def test_equals_dtensors_sequence_parallel(ranks_of, n):
    for ours, theirs in ranks_of(n).run(beside_dtensor, quiet=True):
        for i, (got, want) in enumerate(zip(ours, theirs, strict=True)):
            close(got, want, f"value {i}")


# ---- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda: parallel_norm(nn.BatchNorm1d(4)), "nn.LayerNorm and nn.RMSNorm can .* not BatchNorm1d"),
        (lambda: parallel_norm(parallel_norm(nn.LayerNorm(4))), "not SequenceParallelLayerNorm"),
        (
            lambda: SequenceParallelRMSNorm.from_module(nn.LayerNorm(4)),
            r"SequenceParallelRMSNorm.from_module takes an ordinary nn.RMSNorm, not LayerNorm",
        ),
        (lambda: SequenceParallelLayerNorm(4, group="tp"), "SequenceParallelLayerNorm: group is a str, but has to be"),
    ],
)
def test_refused_with_a_reason(ranks_of, wrong, told):
    with refused(told) as caught:
        ranks_of(4).run(wrong, quiet=True)
    assert caught.value.cause == "ValueError"
