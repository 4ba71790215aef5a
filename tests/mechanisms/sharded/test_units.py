"""Units that are called twice, checkpointed, or return whatever: trained, they are what one process trains."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.mechanisms.sharded import ShardedDataParallel
from tests.mechanisms.sharded.cases import close, loss_of, rows_of
from tests.mechanisms.sharded.unusual_modules import CASES, Scaled, filled

STAGES = [2, 3]


@pytest.fixture(scope="module")
def ranks(ranks_of):
    return ranks_of(4)


class Recalled(nn.Module):
    """Checkpointing, a unit called twice, one that returns a dict, one that gets keywords, one without a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.named = Named()
        self.normal = nn.LayerNorm(6)
        self.lstm = nn.LSTM(6, 6)
        self.table = nn.Embedding(10, 6)
        self.double()

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        x = checkpoint(self.blocks[0], x, use_reentrant=False)
        x = self.blocks[1](self.blocks[1](x)) + x
        out = self.named(x=x)
        y = self.normal(out["y"] + out["z"][0])
        with torch.no_grad():
            gate = torch.sigmoid(self.blocks[2](y))
        hidden, _ = self.lstm((gate * y + self.blocks[2](y)).unsqueeze(0))
        return hidden[0] + self.table(torch.arange(6) % 3).sum(0)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, *, x):
        return {"y": self.a(x), "z": (self.b(x).relu_(), 3)}


def train_recalled(n, stage=3, **how):
    model = Recalled()
    if n:
        model = ShardedDataParallel(model, stage, **how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(4):
        loss = loss_of(model, step, torch.float64, n)
        (loss + loss_of(model, step + 1, torch.float64, n)).backward(retain_graph=step == 1)  # two forwards, then …
        if step == 1:
            (0.1 * loss).backward()  # … a second backward of one of them
        with torch.no_grad():
            model.eval()(rows_of(step, torch.float64))
            model.train()
        loss_of(model, step, torch.float64, n)  # a forward without a backward
        if n and step == 2:  # a forward, and a backward, that fail in the middle
            with pytest.raises(RuntimeError):
                model(torch.ones(3, 5, dtype=torch.float64))
        optimizer.step()
        optimizer.zero_grad()
    return model.full_state_dict() if n else model.state_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_checkpointing_units_called_twice_dicts_and_failed_forwards(ranks, stage):
    def run():
        return train_recalled(4, stage), train_recalled(4, stage, prefetch=False, units=nn.Linear), train_recalled(None)

    for got, other, alone in ranks.run(run, quiet=True):
        close(got, alone, "by default")
        close(other, alone, "each Linear")


def train_unusual(name, n, **how):
    make, loss_of_batch = CASES[name]
    model = filled(make())
    if n:
        model = ShardedDataParallel(model, **how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(3):
        x = rows_of(step, torch.float64)
        loss_of_batch(model, x[dist.get_rank() :: n] if n else x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.full_state_dict() if n else model.state_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_units_that_do_something_unusual(ranks, stage):
    ways = [{}, {"units": (Scaled, nn.Linear)}, *([{"prefetch": False}] if stage == 3 else ())]

    def run():
        alone = {name: train_unusual(name, None) for name in CASES}
        return alone, [(way, {name: train_unusual(name, 4, stage=stage, **way) for name in CASES}) for way in ways]

    for alone, results in ranks.run(run, quiet=True):
        for way, got in results:
            for name in CASES:
                close(got[name], alone[name], f"{name}, {way}")
