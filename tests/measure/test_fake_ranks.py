"""Fake ranks: the reader's own model at up to 4,096 ranks in one process, and what cannot be traced."""

import resource
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from pardist_lib.measure.fake_ranks import CannotTrace, fake_trace
from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.sharded import ShardedDataParallel
from pardist_lib.mechanisms.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from tests.versions import since


class Block(nn.Module):
    """A layer of Llama 3."""

    def __init__(self, h, heads, kv, ffn):
        super().__init__()
        self.head = h // heads
        self.norm1, self.norm2 = nn.RMSNorm(h), nn.RMSNorm(h)
        self.q, self.o = (nn.Linear(h, h, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(h, kv * self.head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(h, ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn, h, bias=False)

    def forward(self, x):
        y, (b, s, _) = self.norm1(x), x.shape
        q, k, v = (f(y).view(b, s, -1, self.head).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, layers=32, h=4096, heads=32, kv=8, ffn=14336, vocabulary=128256):
        super().__init__()
        self.table = nn.Embedding(vocabulary, h)
        self.layers = nn.ModuleList(Block(h, heads, kv, ffn) for _ in range(layers))
        self.norm, self.out = nn.RMSNorm(h), nn.Linear(h, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.out(self.norm(x))


SMALL = {"layers": 3, "h": 256, "heads": 8, "kv": 8, "ffn": 512, "vocabulary": 1024}


def train(model, rows=1, length=2048):
    optimizer, tokens = torch.optim.AdamW(model.parameters()), torch.zeros(rows, length, dtype=torch.long)
    F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten()).backward()
    optimizer.step()


def sharded(kind, size, length):
    model = Llama(**size).bfloat16()
    count = sum(p.numel() for p in model.parameters())
    if kind == "fully_shard":
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    elif kind == "ours":
        model = ShardedDataParallel(model, stage=3, units=Block)
    elif kind == "tensor parallel":
        n = 8
        groups = [dist.new_group(list(range(i, i + n))) for i in range(0, dist.get_world_size(), n)]
        group = groups[dist.get_rank() // n]
        for layer in model.layers:
            for name in ("q", "k", "v", "gate", "up"):
                setattr(layer, name, ColumnParallelLinear.from_module(getattr(layer, name), group=group))
            for name in ("o", "down"):
                setattr(layer, name, RowParallelLinear.from_module(getattr(layer, name), group=group))
    elif kind == "DTensor":
        mesh = init_device_mesh("cpu", (dist.get_world_size() // 8, 8), mesh_dim_names=("dp", "tp"))
        plan = {name: ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}
        for layer in model.layers:
            parallelize_module(layer, mesh["tp"], plan | {"o": RowwiseParallel(), "down": RowwiseParallel()})
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    train(model, length=length)
    return count, model  # the model stays to the end


@pytest.mark.timeout(150)
@pytest.mark.share(1)
@pytest.mark.parametrize("kind", ["fully_shard", "ours", "tensor parallel"])
def test_eight_billion_parameters_on_4096_ranks(kind):
    trace = fake_trace(sharded, kind, {}, 2048, world_size=4096, ranks=[7])
    assert trace.results[0][0] == 8_030_261_248
    layer = 218_112_000  # parameters
    root = 8_030_261_248 - 32 * layer
    calls = [(c.name, c.bytes, len(c.group)) for c in trace.collectives]
    if kind == "fully_shard":  # each matrix by its rows; those with 1,024 rows are filled up to one row a rank
        rows = {4096: 1, 1024: 1, 14336: 4}
        mine = sum(rows[r] * c for r, c in [(4096, 4096), (4096, 4096), (1024, 4096), (1024, 4096), (14336, 4096)]
                   + [(14336, 4096), (4096, 14336)]) + 2  # fmt: skip
        assert calls.count(("all_gather", 2 * mine, 4096)) == 64
        assert calls.count(("reduce_scatter", 2 * mine * 4096, 4096)) == 32
    elif kind == "ours":  # one line, cut evenly
        assert calls.count(("all_gather", 2 * layer // 4096, 4096)) == 64
        assert calls.count(("reduce_scatter", 2 * layer, 4096)) == 32
        assert calls.count(("reduce_scatter", 2 * root, 4096)) == 1
        assert trace.memory[7].end["parameters"] == 2 * 8_030_261_248 // 4096
    else:  # forward o and down; backward what comes out of q, k, v, gate and up
        assert calls.count(("all_reduce", 2 * 2048 * 4096, 8)) == 7 * 32
        split = (layer - 2 * 4096) // 8 + 2 * 4096
        assert trace.memory[7].end["parameters"] == 2 * (32 * split + root)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB
    assert not dist.is_initialized()


def test_dtensor_and_fully_shard_on_a_mesh():
    trace = fake_trace(sharded, "DTensor", SMALL, 64, world_size=64, ranks=[0, 9])
    for rank in (0, 9):
        rows = {(r["operation"], r["ranks in the group"]): r["calls"] for r in trace.rows() if r["rank"] == rank}
        assert rows["all_reduce", 8] >= 3 * 4 and rows["reduce_scatter", 8] == 4
        assert trace.memory[rank].highest["activations"] > 0


def test_memory_is_that_of_real_ranks(ranks_of):
    """The same step on real and on fake ranks: the same bytes of every kind. (What is gathered when, may differ.)"""

    def step():
        torch.manual_seed(0)
        model = Llama(**SMALL)
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        train(model, length=64)

    real = ranks_of(2).trace(step, memory=True)
    fake = fake_trace(step, world_size=2, ranks=[0, 1])
    for rank in (0, 1):
        highest = [m.memory[rank].highest for m in (real, fake)]
        assert highest[0]["optimizer state"] == highest[1]["optimizer state"]
        assert highest[0]["gradients"] == pytest.approx(highest[1]["gradients"], rel=0.01)
        assert highest[0]["parameters"] == pytest.approx(highest[1]["parameters"], rel=0.15)
        assert highest[0]["activations"] == pytest.approx(highest[1]["activations"], rel=0.05)


class Half(nn.Module):
    """Of three layers one is never used."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.c(self.a(x))


def in_half(state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    small = bucket.buffer().half()
    return dist.all_reduce(small, async_op=True).get_future().then(lambda done: bucket.buffer().copy_(done.value()[0]))


@pytest.mark.parametrize("how", [{"find_unused_parameters": True}, {"static_graph": True}, {}])
def test_data_parallel_calls_are_those_of_real_ranks(ranks_of, how):
    """Parameters that are not used, and a communication hook."""

    def steps():
        model = nn.parallel.DistributedDataParallel(Half() if how else nn.Linear(8, 8), **how)
        if not how:
            model.register_comm_hook(None, in_half)
        for _ in range(3):
            model(torch.randn(4, 8)).sum().backward()

    real, fake = ranks_of(2).trace(steps), fake_trace(steps, world_size=2, ranks=[0, 1])
    for rank in (0, 1):
        calls = [[(c.name, c.bytes) for c in trace.collectives if c.rank == rank] for trace in (real, fake)]
        assert calls[0][:2] == [("all_gather", 8), ("broadcast", 48 * (3 if how else 1))]  # whether shapes agree
        assert calls[0] == calls[1]


def test_object_collectives_are_counted_as_real_ones(ranks_of):
    """Where ranks give objects of the same size."""

    def step():
        n, first = dist.get_world_size(), dist.get_rank() == 0
        dist.all_gather_object([None] * n, {"weights": [1, 2.5]})
        dist.gather_object("loss", [None] * n if first else None, 0)
        dist.broadcast_object_list(["a name", 3], 0)
        dist.scatter_object_list(["part"], ["part"] * n if first else None, 0)
        DataParallel(nn.Linear(4, 4))
        ShardedDataParallel(nn.Linear(4, 4), stage=2)

    real, fake = ranks_of(3).trace(step), fake_trace(step, world_size=3, ranks=range(3))
    for rank in range(3):
        calls = [[(c.name, c.bytes, c.group) for c in trace.collectives if c.rank == rank] for trace in (real, fake)]
        assert calls[0] == calls[1] and len(calls[0]) > 12


@since("2.13", "a pipeline needs as many micro-batches as stages")
def test_a_pipeline_without_shapes_is_told_to_give_them():
    def stage():
        made = PipelineStage(nn.Linear(4, 4), dist.get_rank(), 8, torch.device("cpu"))
        ScheduleGPipe(made, 2, loss_fn=F.mse_loss).step(torch.ones(4, 4))

    with pytest.raises(CannotTrace, match="input_args=…, output_args=…"):
        fake_trace(stage, world_size=8)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x = self.layer(x)
        if x.sum() > 0:
            x = -x
        return x


def chosen(x):
    return x[x > 0].sum()


def test_a_model_that_cannot_be_traced_says_the_line():
    with pytest.raises(CannotTrace, match=r"line \d+ of test_fake_ranks.py: `if x.sum\(\) > 0:` needs the value"):
        fake_trace(lambda: Branches()(torch.ones(2, 4)), world_size=16)
    with pytest.raises(CannotTrace, match="whose shape depends on values .* use a fixed shape"):
        fake_trace(lambda: chosen(nn.Linear(4, 4)(torch.randn(2, 4))), world_size=16)
    with pytest.raises(CannotTrace, match="reads a tensor's memory"):
        fake_trace(lambda: torch.randn(3).numpy().sum(), world_size=16)
    with pytest.raises(CannotTrace, match=r"lazy modules cannot be traced: give the sizes"):
        fake_trace(lambda: nn.LazyLinear(4)(torch.randn(2, 4)), world_size=16)
    assert not dist.is_initialized()


def test_other_errors_pass_through():
    error = KeyError("mine")

    def fails():
        raise error

    with pytest.raises(KeyError) as caught:
        fake_trace(fails, world_size=3)
    assert caught.value is error and not dist.is_initialized()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"world_size": 0}, "from 1 to 4,096, not 0"),
        ({"world_size": 5000}, "from 1 to 4,096, not 5000"),
        ({"world_size": "8"}, "from 1 to 4,096, not '8'"),
        ({"world_size": 8, "ranks": [8]}, "no rank 8 in a world of 8"),
        ({"world_size": 8, "ranks": []}, "at least one rank"),
    ],
)
def test_bad_sizes(how, said):
    with pytest.raises(ValueError, match=said):
        fake_trace(print, **how)


def test_a_model_from_outside_is_refused():
    with pytest.raises(ValueError, match="make the model inside"):
        fake_trace(lambda model: model, nn.Linear(2, 2), world_size=2)


PROGRAM = """
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from pardist_lib.measure.fake_ranks import fake_trace
dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
try:
    fake_trace(print, world_size=4)
except RuntimeError as error:
    print(error)
print(dist.get_world_size())
"""


def test_a_process_with_a_group_is_refused():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    said, kept = done.stdout.splitlines()
    assert "rank 1 of 3 already" in said and "destroy_process_group" in said and kept == "3"


def test_patches_are_gone_afterwards():
    before = dist.all_reduce, dist.get_backend, torch.utils.swap_tensors
    fake_trace(lambda: nn.Linear(2, 2).to(torch.float64), world_size=2)
    assert (dist.all_reduce, dist.get_backend, torch.utils.swap_tensors) == before
    assert torch.ones(2).sum().item() == 2.0


def test_values_that_are_written_down_stay():
    """Python's own numbers are real, and what all ranks add up of them."""

    def step():
        counts = torch.tensor([1, 2])
        dist.all_reduce(counts)
        return counts.tolist()

    assert fake_trace(step, world_size=100).results == [[100, 200]]
