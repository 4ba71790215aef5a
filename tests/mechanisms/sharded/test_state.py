"""State dicts of sharded modules: whole ones, a rank's own, and everything besides parameters that they carry."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.sharded import ShardedDataParallel, ShardedOptimizer
from tests.mechanisms.sharded.cases import Model, close, loss_of

STAGES = [2, 3]


@pytest.fixture(scope="module")
def ranks(ranks_of):
    return ranks_of(4)


class Furnished(nn.Linear):
    """With buffers that gloo would not take as they are, a state of its own, and a note on a parameter."""

    def __init__(self):
        super().__init__(3, 4)
        rank = dist.get_rank()
        self.register_buffer("spread", torch.full((4, 1), float(rank)).expand(4, 3))
        self.register_buffer("gaps", torch.full((6,), float(rank))[::2])
        self.scale = nn.Parameter(torch.full((4, 1), 1.0 + rank).expand(4, 3), requires_grad=False)
        self.bias.note, self.said = "no decay", {"epoch": 1}

    def get_extra_state(self):
        return self.said

    def set_extra_state(self, state):
        self.said = state


def furnished(stage):
    model = Furnished()
    if stage == 1:
        ShardedOptimizer(model.parameters(), torch.optim.SGD)
        return [model.scale.tolist() == torch.ones(4, 3).tolist()]
    model = ShardedDataParallel(model, stage)
    state, shard = model.full_state_dict(), model.sharded_state_dict()
    found = [state[name].eq(want).all().item() for name, want in (("spread", 0), ("gaps", 0), ("scale", 1))]
    for load, saved in ((model.load_full_state_dict, state), (model.load_sharded_state_dict, shard)):
        model.module.said = None
        load(saved)
        found.append(model.module.said == {"epoch": 1})
    return [*found, model.module.bias.note == "no decay"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_any_buffers_extra_state_and_notes_on_parameters(ranks, stage):
    assert all(all(found) for found in ranks.run(furnished, stage, quiet=True))


def cloned(state):
    return torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, state)


def saved_and_loaded(stage):
    def steps(model, optimizer, first, n):
        for step in range(first, first + 5):
            loss_of(model, step, torch.float64, n).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.full_state_dict() if n else model.state_dict()

    def start(n, stage=stage):
        model = Model(seed=7)
        model = ShardedDataParallel(model, stage) if n else model
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def from_full(n, stage=stage):
        model, optimizer = start(n, stage)
        model.load_full_state_dict(cloned(full))
        model.load_full_optimizer_state_dict(optimizer, cloned(full_optimizer))
        return steps(model, optimizer, 5, n)

    model, optimizer = start(4)
    steps(model, optimizer, 0, 4)
    full, full_optimizer = model.full_state_dict(), model.full_optimizer_state_dict(optimizer)
    shard, shard_optimizer = model.sharded_state_dict(), cloned(optimizer.state_dict())
    alone, optimizer = start(None)
    alone.load_state_dict(full)
    optimizer.load_state_dict(cloned(full_optimizer))
    expected = steps(alone, optimizer, 5, None)
    model, optimizer = start(4)
    model.load_sharded_state_dict(shard)
    optimizer.load_state_dict(shard_optimizer)
    found = [steps(model, optimizer, 5, 4), from_full(4), from_full(4, 5 - stage), in_world(3, from_full, 3)]
    return expected, found, list(full) == list(Model().state_dict())


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_from_a_full_or_a_sharded_state_dict(ranks, stage):
    for rank, (expected, found, same_names) in enumerate(ranks.run(saved_and_loaded, stage, quiet=True)):
        assert same_names
        for got, how in zip(found, ("sharded", "full", "full, other stage", "full, three ranks"), strict=True):
            if got is not None or rank < 3:
                close(got, expected, how)


def integers():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.register_parameter("table", nn.Parameter(torch.arange(10), requires_grad=False))
    model = ShardedDataParallel(model, 3)
    model(torch.ones(1, 3)).sum().backward()
    return model.full_state_dict()["table"], model.table.shape if hasattr(model, "table") else model.module.table.shape


def test_frozen_integers_are_sharded_too(ranks):
    for rank, (whole, shape) in enumerate(ranks.run(integers)):
        assert torch.equal(whole, torch.arange(10)) and shape == (3 if rank < 2 else 2,)
