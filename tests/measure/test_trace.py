"""A trace shows every call with its exact bytes, group and peer, and what is compute, on one clock."""

import gzip
import json
import pickle
import threading
import time
import uuid
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pardist_lib import RankError, torchrun
from pardist_lib.measure import recording
from pardist_lib.measure.trace import Event, Trace, record
from tests.versions import since

ALL = (0, 1, 2, 3)


def calls(trace, rank):
    """[(name, bytes, group, peer)] of a rank, in the order of its calls' work."""
    return [(e.name, e.bytes, e.group, e.peer) for e in trace.collectives if e.rank == rank]


# ---- bytes, group and peer of every operation -----------------------------------------------------------------


def every_collective():
    rank, t = dist.get_rank(), torch.ones(10, 10)
    lists = [torch.empty(10, 10) for _ in range(4)]
    dist.all_reduce(t)
    dist.all_reduce(t.double(), op=dist.ReduceOp.MAX, async_op=True).wait()
    dist.all_reduce(torch.ones(3, dtype=torch.bfloat16))
    dist.all_reduce(torch.ones(3, dtype=torch.complex64))
    dist.all_reduce(torch.empty(0))
    dist.all_reduce(torch.ones(5, 2).t())
    dist.broadcast(t, 1)
    dist.reduce(t, 2)
    dist.all_gather(lists, t)
    dist._all_gather_base(torch.empty(40, 10), t)
    dist.reduce_scatter(torch.empty(3), [torch.ones(3) for _ in range(4)])
    dist._reduce_scatter_base(torch.empty(3), torch.ones(12))
    dist.all_to_all_single(torch.empty(8), torch.ones(8))
    dist.all_to_all_single(torch.empty(10), torch.ones(4 * (rank + 1)), [1, 2, 3, 4], [rank + 1] * 4)
    dist.all_to_all_single(torch.empty(18), torch.ones(12 * rank), [0, 3, 6, 9], [3 * rank] * 4)
    dist.all_to_all([torch.empty(2) for _ in range(4)], [torch.ones(2) for _ in range(4)])
    dist.gather(t, lists if rank == 0 else None, 0)
    dist.scatter(t, lists if rank == 3 else None, 3)
    dist.barrier()
    return rank


@since("2.13", "gloo has no all_to_all of lists")
def test_payload_bytes_of_every_collective(ranks_of):
    trace = ranks_of(4).trace(every_collective)
    assert trace.results == [0, 1, 2, 3] and trace.world_size == 4
    for rank in ALL:
        assert calls(trace, rank) == [
            ("all_reduce", 400, ALL, None),
            ("all_reduce", 800, ALL, None),
            ("all_reduce", 6, ALL, None),
            ("all_reduce", 24, ALL, None),
            ("all_reduce", 0, ALL, None),
            ("all_reduce", 40, ALL, None),
            ("broadcast", 400, ALL, None),
            ("reduce", 400, ALL, None),
            ("all_gather", 400, ALL, None),
            ("all_gather", 400, ALL, None),
            ("reduce_scatter", 48, ALL, None),
            ("reduce_scatter", 48, ALL, None),
            ("all_to_all", 32, ALL, None),
            ("all_to_all", 16 * (rank + 1), ALL, None),
            ("all_to_all", 48 * rank, ALL, None),
            ("all_to_all", 32, ALL, None),
            ("gather", 400, ALL, None),
            ("scatter", 1600 if rank == 3 else 400, ALL, None),
            ("barrier", 0, ALL, None),
        ]
    assert trace.bytes("gather") == 1600 and trace.bytes("scatter", rank=3) == 1600
    assert trace.bytes(rank=0) == sum(e.bytes for e in trace.collectives if e.rank == 0)


def messages():
    rank = dist.get_rank()
    ahead, behind = (rank + 1) % 4, (rank - 1) % 4
    if rank == 0:
        dist.send(torch.ones(5), 3)
    if rank == 3:
        dist.recv(torch.empty(5), 0)
    pending = [dist.isend(torch.ones(6), ahead), dist.irecv(torch.empty(6), behind)]
    [p.wait() for p in pending]
    operations = [dist.P2POp(dist.irecv, torch.empty(7), behind), dist.P2POp(dist.isend, torch.ones(7), ahead)]
    [p.wait() for p in dist.batch_isend_irecv(operations)]
    if rank == 1:
        dist.send(torch.ones(8, dtype=torch.float64), 2, tag=5)
    return dist.recv(torch.empty(8, dtype=torch.float64), tag=5) if rank == 2 else None


def test_messages_with_their_peers(ranks_of):
    trace = ranks_of(4).trace(messages)
    assert trace.results[2] == 1
    for rank in ALL:
        ahead, behind = (rank + 1) % 4, (rank - 1) % 4
        expected = [("send", 24, ALL, ahead), ("recv", 24, ALL, behind)]
        expected += [("recv", 28, ALL, behind), ("send", 28, ALL, ahead)]
        expected += {0: [("send", 20, ALL, 3)], 3: [("recv", 20, ALL, 0)]}.get(rank, [])
        expected += {1: [("send", 64, ALL, 2)], 2: [("recv", 64, ALL, 1)]}.get(rank, [])
        assert sorted(calls(trace, rank)) == sorted(expected)


def groups_of_two():
    """One group that outlives the call, one that is destroyed in it, a mesh; the peer is a global rank."""
    rank, t = dist.get_rank(), torch.ones(4)
    even, odd = dist.new_group([0, 2]), dist.new_group([1, 3])
    mine = odd if rank % 2 else even
    dist.all_reduce(t, group=mine)
    if rank < 2:
        dist.send(t, rank + 2, group=mine)
    else:
        dist.recv(t, rank - 2, group=mine)
    dist.destroy_process_group(mine)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dist.all_reduce(t, group=mesh.get_group("tp"))
    dist.all_reduce(t, group=mesh.get_group("dp"))


def test_groups_are_given_as_global_ranks(ranks_of):
    trace = ranks_of(4).trace(groups_of_two)
    for rank in ALL:
        pair, tp, dp = [(0, 2), (1, 3)][rank % 2], [(0, 1), (2, 3)][rank // 2], [(0, 2), (1, 3)][rank % 2]
        message = ("send", 16, pair, rank + 2) if rank < 2 else ("recv", 16, pair, rank - 2)
        reduces = [("all_reduce", 16, group, None) for group in (pair, tp, dp)]
        assert [c for c in calls(trace, rank) if c[2] != ALL] == [reduces[0], message, *reduces[1:]]


def two_groups_at_once(key):
    """Three all-reduces of all ranks wait for rank 3 (gloo works on two of a group's calls at a time, the third
    stands in line), while an all-reduce of two ranks comes later and goes through."""
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]

    def three():
        return [dist.all_reduce(torch.ones(size), async_op=True) for size in (10, 20, 30)]

    held = three() if rank < 3 else []
    dist.all_reduce(torch.ones(1), group=pair)
    if rank == 3:
        store.wait([f"{key}0", f"{key}1"])
        held = three()
    store.set(f"{key}{rank}", "")
    [h.wait() for h in held]


@since("2.11", "works of two groups at once may get each other's times")
def test_work_of_two_groups_at_once_is_told_apart(ranks_of):
    trace = ranks_of(4).trace(two_groups_at_once, str(uuid.uuid4()))
    for rank in (0, 1):
        mine = {e.bytes: e for e in trace.collectives if e.rank == rank and e.name == "all_reduce"}
        first, second, third, pair = (mine[size] for size in (40, 80, 120, 4))
        assert pair.group == (0, 1) and first.group == second.group == third.group == ALL
        assert pair.end < min(first.end, second.end) <= third.start


# ---- who else communicates ------------------------------------------------------------------------------------


def ddp_step(bucket_mb, bias):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64, bias=bias) for _ in range(4)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=bucket_mb)

    def step():
        model(torch.randn(8, 64)).square().mean().backward()

    step(), step()  # after the first step the buckets are put together anew
    return record(step)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(
    ("bucket_mb", "bias", "buckets"),
    [
        (64 * 64 * 4 / 2**20, False, [16384] * 4),  # a bucket for each weight
        (2 * 64 * 64 * 4 / 2**20, False, [32768] * 2),
        (25, True, [4 * 4 * (64 * 64 + 64)]),
    ],
)
def test_every_bucket_of_a_ddp_step(ranks_of, n, bucket_mb, bias, buckets):
    trace = Trace(ranks_of(n).run(ddp_step, bucket_mb, bias))
    parameters = 4 * (64 * 64 + 64 * bias)
    for rank in range(n):
        assert calls(trace, rank) == [("all_reduce", size, tuple(range(n)), None) for size in buckets]
        assert trace.bytes("all_reduce", rank) == trace.bytes(rank=rank) == 4 * parameters


def ddp_start():
    torch.manual_seed(dist.get_rank())
    DistributedDataParallel(torch.nn.Linear(100, 30))


def test_ddp_broadcasts_its_parameters_at_the_start(ranks_of):
    trace = ranks_of(2).trace(ddp_start)
    assert max(e.bytes for e in trace.collectives if e.name == "broadcast" and e.rank == 1) == 4 * (100 * 30 + 30)
    assert not trace.bytes("all_reduce")


def fsdp_step():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32, bias=False), torch.nn.Linear(32, 8, bias=False))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    model(torch.ones(4, 16)).sum().backward()


def test_fsdp2(ranks_of):
    trace = ranks_of(4).trace(fsdp_step)
    first, second = 4 * 16 * 32, 4 * 32 * 8
    for rank in ALL:
        made = calls(trace, rank)
        assert sorted(c for c in made if c[0] == "all_gather") == sorted(
            [("all_gather", size // 4, ALL, None) for size in (first, second, second, first)]
        )
        assert [c for c in made if c[0] == "reduce_scatter"] == [
            ("reduce_scatter", size, ALL, None) for size in (second, first)
        ]


def dtensor_product():
    mesh = init_device_mesh("cpu", (4,))
    a, b = (distribute_tensor(torch.ones(8, 8), mesh, [Shard(i)], src_data_rank=None) for i in (0, 1))
    return record(lambda: (a @ b).to_local().sum().item())


def test_dtensor_communicates_inside_an_operation(ranks_of):
    trace = Trace(ranks_of(4).run(dtensor_product))
    assert trace.results == [128.0] * 4
    for rank in ALL:
        assert calls(trace, rank) == [("all_gather", 64, ALL, None)]
        (gather,) = (e for e in trace.collectives if e.rank == rank)
        compute = [e for e in trace.events if e.rank == rank and e.kind == "compute"]
        assert "mm" in [e.name for e in compute]
        assert not any(e.start < gather.start and gather.end < e.end for e in compute)


def in_a_thread():
    rank = dist.get_rank()

    def work():
        dist.all_reduce(torch.ones(7))
        dist.send(torch.ones(3), 1) if rank == 0 else dist.recv(torch.ones(3), 0)
        torch.ones(4, 4) @ torch.ones(4, 4)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_other_threads_are_seen(ranks_of):
    trace = ranks_of(2).trace(in_a_thread)
    assert calls(trace, 0) == [("all_reduce", 28, (0, 1), None), ("send", 12, (0, 1), 1)]
    assert calls(trace, 1) == [("all_reduce", 28, (0, 1), None), ("recv", 12, (0, 1), 0)]
    assert {e.rank for e in trace.events if e.name == "matmul"} == {0, 1}


def refused_and_unfinished(pending):
    """A send that is refused, a collective that is refused, a good one, and two that nobody waits for."""
    with suppress(ValueError):  # the ledger knows the group
        dist.send(torch.ones(9), group_dst=7)
    with suppress(RuntimeError):
        dist.all_gather([torch.ones(2)], torch.ones(3))
    dist.all_reduce(torch.ones(2))
    pending.append(dist.isend(torch.ones(1), 1 - dist.get_rank()))
    pending.append(dist.all_reduce(torch.ones(50), async_op=True))


def refused_and_unfinished_then_drained():
    pending = []
    made = record(refused_and_unfinished, pending)
    dist.recv(torch.empty(1), 1 - dist.get_rank())
    [p.wait() for p in pending]
    return made


def test_refused_calls_are_left_out_and_unfinished_ones_kept(ranks_of):
    trace = Trace(ranks_of(2).run(refused_and_unfinished_then_drained))
    for rank in (0, 1):
        made = sorted(calls(trace, rank))
        assert made == [("all_reduce", s, (0, 1), None) for s in (8, 200)] + [("send", 4, (0, 1), 1 - rank)]


PROGRAM = """
import torch, torch.distributed as dist
from pardist_lib.measure.trace import Trace, record
dist.init_process_group("gloo")
other = 1 - dist.get_rank()
def swap():
    message = dist.isend(torch.ones(3), other)
    dist.recv(torch.empty(3), other)
    message.wait()
traced = Trace([record(swap)])
swap()
print([(e.name, e.bytes) for e in traced.collectives])
dist.destroy_process_group()
"""


def test_a_record_in_a_plain_program_leaves_send_and_receive_as_they_were(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    # of torch 2.10 gloo says a line, too
    said = [text.splitlines()[-1] for text in torchrun(path, nproc=2, quiet=True)]
    assert said == ["[('send', 12), ('recv', 12)]"] * 2


# ---- times ----------------------------------------------------------------------------------------------------


def meet():
    for i in range(20):
        time.sleep(0.002 * ((dist.get_rank() + i) % 4))
        dist.barrier()
        dist.send(torch.ones(1), 1) if dist.get_rank() == 0 else None
        dist.recv(torch.ones(1), 0) if dist.get_rank() == 1 else None


def test_all_ranks_share_a_clock(ranks_of):
    """Nobody leaves a barrier before the last has come to it, and nothing arrives before it was sent."""
    trace = ranks_of(4).trace(meet)
    by_rank = [[e for e in trace.collectives if e.name == "barrier" and e.rank == r] for r in ALL]
    assert [len(b) for b in by_rank] == [20] * 4
    for barrier in zip(*by_rank, strict=True):
        assert max(e.start for e in barrier) <= min(e.end for e in barrier) + 1e-4
    sends, recvs = ([e for e in trace.collectives if e.name == name] for name in ("send", "recv"))
    assert all(s.start <= r.end for s, r in zip(sends, recvs, strict=True))
    assert all(0 <= e.start <= e.end <= trace.seconds + 0.05 for e in trace.events)


def overlapped(key):
    """Compute while an all-reduce waits for rank 1."""
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait([key])
    work = dist.all_reduce(torch.ones(10), async_op=True)
    torch.ones(64, 64) @ torch.ones(64, 64)
    store.set(key, "")
    work.wait()


def test_an_asynchronous_call_lasts_as_long_as_its_work(ranks_of):
    trace = ranks_of(2).trace(overlapped, str(uuid.uuid4()))
    (reduce,) = (e for e in trace.collectives if e.rank == 0)
    (product,) = (e for e in trace.events if e.rank == 0 and e.name == "matmul")
    assert product.end < reduce.end  # waiting for the other rank is part of it


# ---- compute --------------------------------------------------------------------------------------------------


def some_compute():
    x = torch.ones(4, 4, requires_grad=True)
    with torch.profiler.record_function("the::reader's"):
        torch.nn.functional.linear(x, torch.ones(4, 4)).sum().backward()
    dist.all_gather([torch.empty(3) for _ in range(2)], torch.ones(3))


def test_compute_is_the_outermost_operations(ranks_of):
    trace = ranks_of(2).trace(some_compute)
    names = [e.name for e in trace.events if e.rank == 0 and e.kind == "compute"]
    assert names[:2] == ["ones", "ones"] and "linear" in names and "sum" in names and "mm" in names
    assert not {"addmm", "matmul", "fill_", "the::reader's"} & set(names)  # inside others, or not an operation
    assert not {"copy_", "select", "view"} & set(names[-4:])  # what gloo does in its thread
    lane = [e for e in trace.events if e.rank == 0 and e.kind == "compute"]
    assert all(a.end <= b.start for a, b in zip(lane, lane[1:], strict=False))


class Profiled:
    """Stands in for an event of torch's profiler."""

    def __init__(self, name, start, end, number, launched_by=0, gpu=False):
        kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
        values = {"name": name, "start_ns": start, "end_ns": end, "correlation_id": number, "device_type": kind}
        values |= {"linked_correlation_id": launched_by, "is_user_annotation": False}
        self.__dict__ |= {key: lambda value=value: value for key, value in values.items()}


def test_on_a_gpu_compute_is_its_kernels_and_a_calls_kernels_are_its_work():
    """With made-up events: where there is no GPU the real ones cannot be had."""
    host = [Profiled("aten::addmm", 10, 20, 1), Profiled("c10d::allreduce_", 30, 40, 2), Profiled("x", 33, 35, 3)]
    device = [Profiled("gemm_128", 25, 60, 9, 1, gpu=True), Profiled("ncclDevKernel", 61, 90, 9, 3, gpu=True)]
    device += [Profiled("Memcpy", 91, 95, 9, gpu=True)]
    call = recording._Call(30, 40, "all_reduce")
    assert recording._kernels(device, host + device, [call]) == [("addmm", 25, 60), ("Memcpy", 91, 95)]
    assert call.work == [(61, 90)]


# ---- what goes wrong ------------------------------------------------------------------------------------------


def fail(error):
    dist.all_reduce(torch.ones(1))
    raise error


def state():
    names = [getattr(dist.ProcessGroup, n).__qualname__ for n in ("send", "recv", "recv_anysource")]
    return torch.autograd.profiler._is_profiler_enabled, names


def test_what_the_function_raises_passes_through_on_ranks(ranks_of):
    before = ranks_of(2).run(state)
    with pytest.raises(RankError) as caught:
        ranks_of(2).trace(fail, KeyError("mine"))
    assert caught.value.cause == "KeyError" and "mine" in caught.value.message
    assert ranks_of(2).run(state) == before and not before[0][0]
    assert ranks_of(2).trace(dist.barrier).rows()[0]["calls"] == 1


def raises(error):
    raise error


def test_record_in_one_process_without_a_group():
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        record(raises, error)
    assert caught.value is error
    trace = Trace([record(torch.add, torch.ones(3), 1)])
    assert [e.name for e in trace.events] == ["add"] and torch.equal(trace.results[0], torch.full((3,), 2.0))


def test_two_profilers_are_refused():
    with pytest.raises(RuntimeError, match="cannot be taken inside another profile"):
        record(record, torch.ones, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with pytest.raises(RuntimeError, match="being profiled already"):
            record(torch.ones, 3)
    assert profile.events() is not None

    def inner():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            torch.ones(3)

    with pytest.raises(RuntimeError, match="started a profiler of its own"):
        record(inner)
    assert record(torch.ones, 3)[1][4][0] == ["ones"]


def too_long():
    import os

    for _ in range(int(os.environ.get("TORCH_FR_BUFFER_SIZE", 2000)) + 1):
        dist.all_reduce(torch.ones(1))


def test_a_run_too_long_for_the_flight_recorder_says_so(ranks_of):
    with pytest.raises(RankError, match="TORCH_FR_BUFFER_SIZE"):
        ranks_of(1).trace(too_long)
    assert calls(ranks_of(1).trace(dist.all_reduce, torch.ones(3)), 0) == [("all_reduce", 12, (0,), None)]


def test_nothing_is_printed(ranks_of):
    ranks_of(4).trace(dist.barrier)
    assert not any(ranks_of(4).output)


# ---- the notebook's half --------------------------------------------------------------------------------------


def made_up():
    import numpy as np

    ms = 1_000_000
    table = np.array([[0, 5 * ms, 15 * ms], [1, 10 * ms, 20 * ms]])
    first = (0, 5 * ms, 40 * ms, [("send", 12 * ms, 30 * ms, 1234, (0, 1), 1)], (["mm", "<add>"], table))
    second = (1, 7 * ms, 45 * ms, [], ([], np.zeros((0, 3), dtype=np.int64)))
    return Trace([("a", first), ("b", second)])


def test_events_start_at_zero_and_overlaps_count_once():
    trace = made_up()
    assert trace.events == [
        Event(0, "compute", "mm", 0.0, 0.010),
        Event(0, "compute", "<add>", 0.005, 0.015),
        Event(0, "communication", "send", 0.007, 0.025, 1234, (0, 1), 1),
    ]
    assert trace.seconds == 0.040 and trace.results == ["a", "b"]
    assert trace.rows() == [
        {"rank": 0, "calls": 1, "bytes": 1234, "compute ms": 15.0, "communication ms": 18.0}
        | {"hidden ms": 8.0, "exposed ms": 10.0},
        {"rank": 1, "calls": 0, "bytes": 0, "compute ms": 0.0, "communication ms": 0.0}
        | {"hidden ms": 0.0, "exposed ms": 0.0},
    ]
    assert repr(trace).splitlines()[0] == "Trace of 2 ranks, 40.0 ms" and "1,234" in repr(trace)
    assert "<td>1,234</td>" in trace._repr_html_()
    assert pickle.loads(pickle.dumps(trace)).events == trace.events


def busy():
    x = torch.ones(3)
    for _ in range(5000):
        x = x + 1


def test_a_long_record_is_small():
    _, made = record(busy)
    assert made[4][1].shape == (5001, 3) and len(pickle.dumps(made)) < 25 * 5001 + 1000


def of_rank(rank, messages, compute=()):
    import numpy as np

    ms = 1_000_000
    table = np.array([[0, a * ms, b * ms] for a, b in compute], dtype=np.int64).reshape(-1, 3)
    made = [(name, a * ms, b * ms, 8, group, peer, known) for name, a, b, group, peer, known in messages]
    return None, (rank, 0, 100 * ms, made, (["mm"], table))


def test_whom_a_call_waited_for():
    """Two groups of the same ranks are told apart by torch's name for them; a receive waits for its sender."""
    pair = (0, 1)
    trace = Trace(
        [
            of_rank(0, [("all_reduce", 0, 30, pair, None, "a"), ("all_reduce", 40, 61, pair, None, "b")]
                    + [("send", 70, 71, pair, 1, "a"), ("broadcast", 80, 81, pair, None, "a")]),
            of_rank(1, [("all_reduce", 60, 62, pair, None, "b"), ("all_reduce", 20, 30, pair, None, "a")]
                    + [("recv", 65, 72, pair, 0, "a"), ("broadcast", 90, 91, pair, None, "a")]),
        ]
    )  # fmt: skip
    said = {(e.rank, e.name, e.start): (e.waited_for, round(e.waited * 1e3)) for e in trace.collectives if e.waited}
    assert said == {
        (0, "all_reduce", 0.0): (1, 20),
        (0, "all_reduce", 0.04): (1, 20),
        (1, "recv", 0.065): (0, 5),
    }  # the broadcast's root left before the other rank came


def late():
    time.sleep(0.03 * (dist.get_rank() == 2))
    dist.all_reduce(torch.ones(4))


def test_the_late_rank_is_named(ranks_of):
    trace = ranks_of(4).trace(late)
    for e in trace.collectives:
        assert (e.waited_for, e.waited > 0.015) == ((None, False) if e.rank == 2 else (2, True))


def test_hidden_and_exposed():
    """Communication from 10 to 50 and 45 to 60; compute from 0 to 20 and from 30 to 40: 20 of 50 are hidden."""
    messages = [("all_reduce", 10, 50, (0,), None, "a"), ("all_reduce", 45, 60, (0,), None, "a")]
    (row,) = Trace([of_rank(0, messages, [(0, 20), (30, 40)])]).rows()
    assert (row["compute ms"], row["communication ms"]) == (30.0, 50.0)
    assert (row["hidden ms"], row["exposed ms"]) == (20.0, 30.0)


# ---- as a file ------------------------------------------------------------------------------------------------


def with_messages():
    rank, n = dist.get_rank(), dist.get_world_size()
    layer = torch.nn.Linear(64, 64)
    layer(torch.ones(8, 64)).sum().backward()
    held = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(2)]
    message = dist.isend(torch.ones(9), (rank + 1) % n)
    dist.recv(torch.empty(9), (rank - 1) % n)
    message.wait(), [h.wait() for h in held]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_perfetto(ranks_of, tmp_path, name):
    trace = ranks_of(2).trace(with_messages, memory=True)
    raw = trace.to_perfetto(tmp_path / name).read_bytes()
    events = json.loads(gzip.decompress(raw) if name.endswith("gz") else raw)["traceEvents"]
    by = {ph: [e for e in events if e["ph"] == ph] for ph in "MXCsf"}
    assert sum(map(len, by.values())) == len(events)
    assert len(by["X"]) == len(trace.events) and len(by["s"]) == len(by["f"]) == 2
    assert {e["id"] for e in by["s"]} == {e["id"] for e in by["f"]}
    assert all(a["ts"] <= b["ts"] for a, b in zip(by["s"], by["f"], strict=True))
    assert {e["args"]["name"] for e in by["M"] if e["name"] == "process_name"} == {"rank 0", "rank 1"}
    (message, *_) = (e for e in by["X"] if e["name"] == "send" and e["pid"] == 1)
    assert message["args"]["bytes"] == 36 and message["args"]["peer"] == 0 and message["cat"] == "communication"
    assert {e["args"]["parameters"] for e in by["C"]} >= {4 * (64 * 64 + 64)}
    for rank in (0, 1):  # what lies on one track does not overlap
        tracks = {}
        for e in sorted((e for e in by["X"] if e["pid"] == rank), key=lambda e: e["ts"]):
            assert e["tid"] == 0 or tracks.get(e["tid"], 0) <= e["ts"] + 1e-6
            tracks[e["tid"]] = e["ts"] + e["dur"]


def test_a_file_for_perfetto_ends_in_json(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.json or \.json\.gz"):
        made_up().to_perfetto(tmp_path / "trace.txt")


# ---- regions --------------------------------------------------------------------------------------------------


def marked():
    for number in range(2):
        with torch.profiler.record_function(f"my own {number}"):
            torch.ones(300, 300) @ torch.ones(300, 300)
            dist.all_reduce(torch.ones(3))


def test_regions_are_what_a_reader_has_marked(ranks_of, tmp_path):
    for memory in (False, True):
        trace = ranks_of(2).trace(marked, memory=memory)
        assert trace.regions == sorted(trace.regions, key=lambda e: e.start)
        for rank in (0, 1):
            first, second = [e for e in trace.regions if e.rank == rank]
            assert [first.name, second.name] == ["my own 0", "my own 1"] and first.kind == "region"
            assert 0 <= first.start < first.end <= second.start < second.end <= trace.seconds
            inside = [e for e in trace.events if e.rank == rank and first.start <= e.start and e.end <= first.end]
            assert "matmul" in {e.name for e in inside} and "my own 0" not in {e.name for e in trace.events}
            assert any(e.kind == "communication" and e.start >= second.start for e in trace.events)
        drawn = json.loads(trace.to_perfetto(tmp_path / "trace.json").read_text())["traceEvents"]
        names = {e["args"]["name"] for e in drawn if e["name"] == "thread_name" and e["tid"] == 1000}
        assert names == {"regions"} and {e["pid"] for e in drawn if e.get("cat") == "region"} == {0, 1}
        assert sorted(e["name"] for e in drawn if e.get("cat") == "region") == 2 * ["my own 0"] + 2 * ["my own 1"]
        assert bool(trace.memory) == memory


def test_without_marks_there_are_no_regions(ranks_of, tmp_path):
    trace = ranks_of(2).trace(with_messages)
    assert trace.regions == [] and "regions" not in trace.to_perfetto(tmp_path / "trace.json").read_text()
