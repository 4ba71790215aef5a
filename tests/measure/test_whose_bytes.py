"""Bytes of every collective of FSDP2, DTensor, pipelining and our own, real and on fake ranks, equal the formula."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from pardist_lib.measure.fake_ranks import fake_trace
from pardist_lib.measure.trace import Trace, record
from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.sharded import ShardedDataParallel
from pardist_lib.mechanisms.tensor_parallel import ParallelMLP
from tests.versions import since


def made(trace, rank):
    """{(operation, bytes, ranks in the group): calls} of a rank."""
    return Counter((e.name, e.bytes, len(e.group)) for e in trace.collectives if e.rank == rank)


def same_on_real_and_fake(ranks, step, expected, *args):
    """A step's calls are `expected` on real ranks and on fake ranks."""
    n = ranks.n
    trace = Trace(ranks.run(step, *args))
    fake = fake_trace(step, *args, world_size=n, ranks=range(n))
    for rank in range(n):
        assert made(trace, rank) == made(fake, rank) == Counter(expected)


def net(width=30, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 50, bias=bias), nn.ReLU(), nn.Linear(50, width, bias=bias))


def taken(model, width=30, rows=4, steps=1):
    """`record` of steps, or on a fake rank their calls."""
    x = torch.ones(rows, width)

    def step():
        for _ in range(steps):
            model(x).square().mean().backward()

    return step() if dist.get_backend() == "fake" or dist.get_world_size() and _fake() else record(step)


def _fake():
    return isinstance(torch.empty(1), torch._subclasses.fake_tensor.FakeTensor)


def fsdp_step(bits):
    model = net()
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bits == 16 else MixedPrecisionPolicy()
    for layer in (model[0], model[2]):
        fully_shard(layer, mp_policy=half)
    fully_shard(model)
    return taken(model)


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_fsdp2_with_uneven_shards(ranks_of, n, bits):
    """Each parameter is cut along its first dimension into equal parts, the last ones filled up: ceil(d / n) rows."""

    def padded(rows, columns):
        return -(-rows // n) * columns + -(-rows // n)  # weight and bias

    lines = [padded(50, 30), padded(30, 50)]
    size = bits // 8
    expected = Counter()
    for line in lines:
        expected["all_gather", size * line, n] += 2
        expected["reduce_scatter", 4 * n * line, n] += 1
    # the last layer's parameters are still there when backward begins, as FSDP2 keeps the root's own only
    same_on_real_and_fake(ranks_of(n), fsdp_step, expected, bits)


def hybrid_step():
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard"))
    model = net(bias=False)
    fully_shard(model, mesh=mesh)
    return taken(model)


def test_hybrid_shards(ranks_of):
    """Shards among two, and an all-reduce of the shard with the other two."""
    shard = 4 * (25 * 30 + 15 * 50)
    expected = {("all_gather", shard, 2): 1, ("reduce_scatter", 2 * shard, 2): 1, ("all_reduce", shard, 2): 1}
    same_on_real_and_fake(ranks_of(4), hybrid_step, expected)


def tensor_parallel_step():
    model = net(width=32, bias=False)
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}, src_data_rank=None)
    x = torch.ones(4, 32, requires_grad=True)

    def step():
        model(x).square().mean().backward()

    return step() if _fake() else record(step)


def test_dtensor_tensor_parallel(ranks_of):
    """Column then row: an all-reduce of the output forward, one of the input's gradient backward."""
    same_on_real_and_fake(ranks_of(2), tensor_parallel_step, {("all_reduce", 4 * 4 * 32, 2): 2})


def redistributed():
    mesh = DeviceMesh("cpu", [0, 1])
    x = distribute_tensor(torch.ones(6, 10), mesh, [Shard(0)], src_data_rank=None)

    def step():
        x.redistribute(mesh, [Replicate()]).to_local().sum()
        x.redistribute(mesh, [Shard(1)]).to_local().sum()
        x.sum().full_tensor()

    return step() if _fake() else record(step)


def test_dtensor_redistributes(ranks_of):
    """Gather the shard; Shard(0) to Shard(1) as torch does it on this backend; a partial sum of one number."""
    trace = Trace(ranks_of(2).run(redistributed))
    for rank in (0, 1):
        calls = made(trace, rank)
        assert calls["all_reduce", 4, 2] == 1
        assert calls["all_gather", 120, 2] + calls["all_to_all", 120, 2] == 2
        assert sum(calls.values()) == 3
    fake = fake_trace(redistributed, world_size=2)
    assert made(fake, 0)["all_reduce", 4, 2] == 1 and sum(made(fake, 0).values()) == 3


def functional():
    from torch.distributed import _functional_collectives as fc

    group = dist.group.WORLD

    def step():
        x = torch.ones(12)
        for y in (
            fc.all_reduce(x, "sum", group),
            fc.all_gather_tensor(x, 0, group),
            fc.reduce_scatter_tensor(x, "sum", 0, group),
            fc.all_to_all_single(x, None, None, group),
            fc.broadcast(x, 0, group),
            *fc.all_reduce_coalesced([x, x[:3]], "sum", group),
            *fc.all_gather_into_tensor_coalesced([x, x[:3]], group),
        ):
            y.sum()

    return step() if _fake() else record(step)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_functional_collectives(ranks_of):
    expected = {
        ("all_reduce", 48, 2): 1, ("all_gather", 48, 2): 1, ("reduce_scatter", 48, 2): 1, ("all_to_all", 48, 2): 1,
        ("broadcast", 48, 2): 1, ("all_reduce", 60, 2): 1, ("all_gather", 60, 2): 1,
    }  # fmt: skip
    same_on_real_and_fake(ranks_of(2), functional, expected)


def ddp_step(bucket_mb):
    model = DistributedDataParallel(net(width=6000), bucket_cap_mb=bucket_mb)
    x = torch.ones(4, 6000)

    def step():
        model(x).square().mean().backward()

    step(), step()
    return step() if _fake() else record(step)


@pytest.mark.parametrize("bucket_mb", [25, 0.3])
def test_ddp(ranks_of, bucket_mb):
    """Every gradient once. (Fake ranks see the two steps before, too: three times.)"""
    size = 4 * (2 * 6000 * 50 + 6050)
    trace = Trace(ranks_of(2).run(ddp_step, bucket_mb))
    fake = fake_trace(ddp_step, bucket_mb, world_size=1000, ranks=[0, 999])
    for rank in (0, 1):
        assert trace.bytes("all_reduce", rank) == trace.bytes(rank=rank) == size
    for rank in (0, 999):
        assert fake.bytes("all_reduce", rank) == 3 * size
    last = [e.bytes for e in fake.collectives if e.rank == 0 and e.name == "all_reduce"]
    buckets = [e.bytes for e in trace.collectives if e.rank == 0]
    assert last[-len(buckets) :] == buckets and len(buckets) == (1 if bucket_mb == 25 else 2)


def our_sharded_step():
    model = ShardedDataParallel(net(), stage=3)
    taken = model(torch.ones(4, 30)).square().mean
    taken().backward()


def test_our_sharded_on_fake_ranks():
    """Each unit is gathered twice and its gradient reduced once; what n does not divide in uneven parts."""
    fake = fake_trace(our_sharded_step, world_size=4, ranks=range(4))
    lines = [50 * 30 + 50, 30 * 50 + 30]  # elements; 4 does not divide the second
    for rank in range(4):
        agreed = 2  # the ranks first compare what they hold
        calls = [e for e in fake.collectives if e.rank == rank][agreed:]
        parts = [sum(line // 4 + (rank < line % 4) for _ in range(2)) for line in lines]
        gathered = sum(e.bytes for e in calls if e.name == "all_gather")
        assert gathered in (4 * sum(parts), 4 * sum(parts) - 4 * parts[1] // 2)  # the last one may still be there
        assert sum(e.bytes for e in calls if e.name == "reduce_scatter") == 4 * sum(lines)


def our_step(kind):
    n = dist.get_world_size()
    torch.manual_seed(0)
    model = DataParallel(net()) if kind == "dp" else ParallelMLP(32, 16 * n)
    x = torch.ones(4, 30 if kind == "dp" else 32, requires_grad=True)

    def step():
        model(x).square().mean().backward()

    return step() if _fake() else record(step)


def test_our_data_and_tensor_parallel(ranks_of):
    trace = Trace(ranks_of(4).run(our_step, "dp"))
    size = 4 * (2 * 30 * 50 + 80)
    assert all(trace.bytes("all_reduce", r) == trace.bytes(rank=r) == size for r in range(4))
    assert fake_trace(our_step, "dp", world_size=512).bytes("all_reduce") == size
    trace = Trace(ranks_of(4).run(our_step, "tp"))
    assert all(trace.bytes("all_reduce", r) == trace.bytes(rank=r) == 2 * 4 * 4 * 32 for r in range(4))


def pipelined(schedule, micro):
    from torch.distributed import pipelining

    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    part, whole = nn.Linear(16, 16), torch.ones(micro * 2, 16)
    args = {"input_args": (torch.empty(2, 16, requires_grad=rank > 0),)}
    args |= {"output_args": torch.empty(2, 16, requires_grad=True)}
    stage = pipelining.PipelineStage(part, rank, n, torch.device("cpu"), **args)
    made = getattr(pipelining, schedule)(stage, micro, loss_fn=lambda y, t: (y - t).square().mean())

    def step():
        made.step(*((whole,) if rank == 0 else ()), **({"target": whole} if rank == n - 1 else {}))

    if _fake():
        return step()
    step()
    return record(step)


@since("2.13", "a pipeline sends its shapes, too")
@pytest.mark.parametrize("schedule", ["ScheduleGPipe", "Schedule1F1B"])
def test_pipelining(ranks_of, schedule):
    """A micro-batch's activation to the next stage, its gradient back: 2·16 floats each."""
    n, micro, size = 4, 4, 4 * 2 * 16
    trace = Trace(ranks_of(n).run(pipelined, schedule, micro))
    for rank in range(n):
        neighbours = (rank > 0) + (rank < n - 1)
        assert made(trace, rank) == {("send", size, n): neighbours * micro, ("recv", size, n): neighbours * micro}
        peers = {e.peer for e in trace.collectives if e.rank == rank}
        assert peers == {rank - 1, rank + 1} & set(range(n))
    fake = fake_trace(pipelined, schedule, 100, world_size=100, ranks=[0, 50, 99])
    for rank, neighbours in ((0, 1), (50, 2), (99, 1)):
        assert made(fake, rank) == {("send", size, 100): 100 * neighbours, ("recv", size, 100): 100 * neighbours}
