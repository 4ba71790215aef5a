"""torch.compile of what the mechanisms make: it computes what it computes uncompiled, on real ranks."""

import pytest
import torch
from torch import nn

from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.expert_parallel import ExpertParallel, MoE
from pardist_lib.mechanisms.sharded import ShardedDataParallel, ShardedOptimizer
from pardist_lib.mechanisms.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    parallelize,
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 6), nn.Tanh()), nn.Linear(6, 4))


def compiled_inside(backend):
    model = net()
    model[0].compile(backend=backend)
    return model


def whole(make):
    """A model, compiled where there is a backend."""
    return lambda backend: torch.compile(made, backend=backend) if (made := make()) is not None and backend else made


def inside(wrap):
    """A model of which a layer was compiled before."""
    return lambda backend: wrap(compiled_inside(backend) if backend else net())


SPLIT = {"0": "column", "2.0": "row"}
MODELS = {
    "row": whole(lambda: RowParallelLinear(4, 4, input_is_parallel=False)),
    "column": whole(lambda: ColumnParallelLinear(4, 4, gather_output=True)),
    "parallelize": whole(lambda: parallelize(net(), SPLIT)),
    "vocabulary": whole(lambda: VocabParallelEmbedding(7, 4)),
    "DataParallel": whole(lambda: DataParallel(net())),
    "DataParallel, a layer compiled": inside(DataParallel),
    "ExpertParallel": whole(lambda: ExpertParallel.from_module(MoE(4, 8, 3, 2))),
    "stage 2": whole(lambda: ShardedDataParallel(net(), 2)),
    "stage 3": whole(lambda: ShardedDataParallel(net(), 3)),
    "stage 3, one unit": whole(lambda: ShardedDataParallel(net(), 3, units=[])),
    "stage 3, bfloat16": whole(lambda: ShardedDataParallel(net(), 3, compute_dtype=torch.bfloat16)),
    "stage 3, a layer compiled": inside(ShardedDataParallel),
    "stage 1": whole(net),
}


def trained(name, backend):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = MODELS[name](backend)
    if name == "stage 1":
        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen = []
    for step in range(3):
        rows = 5 + step % 2  # a shape of its own, to be compiled for
        x = torch.arange(rows) if name == "vocabulary" else torch.randn(rows, 4)
        y = model(x)
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            seen += [y.detach().clone(), model(x)]
    return seen + [p.detach().clone() for p in model.parameters()]


def beside(name, backend):
    return trained(name, None), trained(name, backend)


@pytest.mark.share(10)  # compiling takes a second or two a case
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_trains_as_it_does_uncompiled(ranks_of, name, backend):
    for plain, compiled in ranks_of(2).run(beside, name, backend, quiet=True, timeout=120):
        for a, b in zip(plain, compiled, strict=True):
            torch.testing.assert_close(b, a)


STEPS = {
    "stage 1": lambda: (made := net(), ShardedOptimizer(made.parameters(), torch.optim.SGD, lr=0.1)),
    "stage 3": lambda: (made := ShardedDataParallel(net(), 3), torch.optim.SGD(made.parameters(), lr=0.1)),
    "parallelize": lambda: (made := parallelize(net(), SPLIT), torch.optim.SGD(made.parameters(), lr=0.1)),
}


def whole_steps(name, backend):
    """Forward, backward and the optimizer's step in one compiled function."""
    torch.compiler.reset()
    model, optimizer = STEPS[name]()

    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step = torch.compile(step, backend=backend) if backend else step
    return torch.stack([step(torch.full((3, 4), 1.0 + i)) for i in range(3)])


@pytest.mark.parametrize("name", STEPS)
def test_a_compiled_training_step_does_what_it_does_uncompiled(ranks_of, name):
    ranks = ranks_of(2)
    plain, compiled = (ranks.run(whole_steps, name, b, quiet=True, timeout=120) for b in (None, "eager"))
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(b, a)
