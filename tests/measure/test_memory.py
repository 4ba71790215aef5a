"""Memory over time by kind: in tensor storages, exact, whoever makes, shards and frees them."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pardist_lib.measure.memory import KINDS, Memory, watching
from pardist_lib.measure.trace import Trace, record
from pardist_lib.mechanisms.sharded import ShardedDataParallel


def net(width=64, layers=2):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def held(fn):
    with watching() as watch:
        kept = fn()
    return Memory(0, *watch.history()), kept


def test_a_step_by_hand():
    """Two layers of W bytes, inputs of A bytes: each kind at its highest is what one can count."""
    model, x = net(), torch.ones(16, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    W, A = 4 * 64 * 64, 4 * 16 * 64

    def step():
        model(x).sum().backward()
        optimizer.step()

    memory, _ = held(step)
    highest = memory.highest
    assert highest["parameters"] == highest["gradients"] == 2 * W
    assert highest["optimizer state"] == 4 * W + 2 * 4  # two moments, and a counter of steps for each parameter
    assert highest["activations"] == 3 * A + 4  # x, the first layer's output, the second's; then the sum
    assert memory.end == {"parameters": 2 * W, "gradients": 2 * W, "optimizer state": 4 * W + 8, "activations": A,
                          "other": 0}  # fmt: skip
    assert (memory.bytes >= 0).all() and (np.diff(memory.times) > 0).all()


def test_it_is_known_even_where_all_is_gone_at_the_end():
    """Made, trained and dropped inside: what it was, is told from what happened to it."""

    def step():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        model(torch.ones(4, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    memory, _ = held(step)
    W = 4 * 64 * 64
    assert [memory.highest[k] for k in KINDS[:3]] == [2 * W] * 3
    assert sum(memory.end.values()) == 0


def test_checkpointing_keeps_less():
    model, x = net(layers=6), torch.ones(32, 64)
    A = 4 * 32 * 64

    def plain():
        y = x
        for layer in model:
            y = layer(y).exp().tanh().sin()
        y.sum().backward()

    def again():
        y = x
        for layer in model:
            y = checkpoint(lambda y, layer=layer: layer(y).exp().tanh().sin(), y, use_reentrant=False)
        y.sum().backward()

    kept, computed = (held(f)[0].highest["activations"] for f in (again, plain))
    assert computed >= 6 * 3 * A
    assert 7 * A <= kept <= 11 * A


def test_freed_and_resized_storages():
    def step():
        line = torch.zeros(1000)
        line.untyped_storage().resize_(0)
        line.untyped_storage().resize_(8000)
        line = None

    memory, _ = held(step)
    assert memory.total.tolist()[-4:] == [4000, 0, 8000, 0] or memory.total.max() == 8000
    assert sum(memory.end.values()) == 0


def test_everything_is_as_it_was_afterwards():
    before = vars(nn.Parameter)["__new__"], "resize_" in vars(torch.UntypedStorage)
    model = net()
    with pytest.raises(KeyError), watching():
        model(torch.ones(1, 64)).sum().backward()
        raise KeyError
    assert (vars(nn.Parameter)["__new__"], "resize_" in vars(torch.UntypedStorage)) == before
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


# ---- on ranks -------------------------------------------------------------------------------------------------


def step_of(kind):
    model, x = net(layers=3), torch.ones(8, 64)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp":
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    elif kind == "ours":
        model = ShardedDataParallel(model, stage=3, overlap=False)
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    return record(step, memory=True)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "ours"])
def test_memory_of_sharded_and_replicated_models(ranks_of, kind):
    n, W = 4, 4 * 64 * 64
    trace = Trace(ranks_of(n).run(step_of, kind))
    assert sorted(trace.memory) == list(range(n))
    for memory in trace.memory.values():
        share = 3 * W if kind == "ddp" else 3 * W // n
        end, highest = memory.end, memory.highest
        assert end["parameters"] == end["gradients"] == share
        assert end["optimizer state"] == 2 * share + 3 * 4
        assert highest["gradients"] <= share + (2 * W if kind != "ddp" else 0)
        if kind != "ddp":  # at least one whole layer, at most two and a half beside the shards
            assert W <= highest["parameters"] - share <= 2.5 * W
        assert highest["activations"] >= 4 * 4 * 8 * 64 - 4 * 8 * 64
        assert memory.times[0] >= 0 and memory.times[-1] <= trace.seconds + 0.05


def test_without_it_there_is_none(ranks_of):
    trace = ranks_of(2).trace(dist.barrier)
    assert trace.memory == {} and not hasattr(trace, "nothing")
    assert "at most 0 bytes" in repr(Memory(0, np.zeros(0), np.zeros((0, 5))))
