"""The parameter server: against one process, with stale gradients against one process that keeps old versions too."""

import json
import pickle
import subprocess
import sys
import textwrap
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib import RankError
from pardist_lib.lessons.lesson05.arrivals import arrival_order
from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.collectives.agreement import described, named_tensors
from pardist_lib.mechanisms.parameter_server import Applied, ParameterServer
from pardist_lib.mechanisms.parameter_server.flat_buffer import FlatBuffer

STEPS = 20
OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.05),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
}


class Net(nn.Module):
    """A weight that two layers share, a frozen layer, one that nobody uses, one that some ranks use, and a buffer."""

    def __init__(self, seed, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name in ("fc1", "fc2", "again", "frozen", "unused", "extra"):
            layer = nn.Linear(6, 6, dtype=dtype)
            for p in layer.parameters():
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) / 2
            self.add_module(name, layer)
        self.again.weight = self.fc2.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.randn((), generator=generator, dtype=torch.float64).to(dtype))

    def forward(self, x, with_extra=False):
        x = self.frozen(torch.tanh(self.again(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))))
        return self.scale * (self.extra(x) if with_extra else x)


def rows_of(worker, step, dtype=torch.float64):
    """Uneven batches, one of them empty now and then."""
    count = 0 if (worker + step) % 7 == 6 else 1 + (worker + step) % 3
    generator = torch.Generator().manual_seed(1000 * worker + step)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(net, x, with_extra=False):
    return net(x, with_extra).square().sum(1).mean()


def gradient_of(net, x, with_extra=False):
    net.zero_grad()
    if len(x):
        loss_of(net, x, with_extra).backward()


def state(net):
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def same(got, want, relative=1e-10, absolute=1e-10, what=""):
    assert got.keys() == want.keys()
    for name in want:
        close = torch.allclose(got[name], want[name], relative, absolute)
        assert close, f"{what} {name} is off by {(got[name] - want[name]).abs().max():.2g}"


# ---- synchronous ----------------------------------------------------------------------------------------------


def train(steps, optimizer, dtype=torch.float64, server=0, group=None, extra_on=(), **options):
    """On a rank: everything from the start to the end; every rank begins with weights of its own."""
    rank = dist.get_rank(group)
    net = Net(rank, dtype)
    with ParameterServer(net, OPTIMIZERS[optimizer](net.parameters()), server=server, group=group, **options) as ps:
        if ps.serving:
            ps.serve()
        else:
            for step in range(steps):
                x = rows_of(rank, step, dtype)
                gradient_of(net, x, rank in extra_on)
                ps.step(rows=len(x))
    return state(net), ps.log, ps.version


def alone(steps, optimizer, workers, seed, dtype=torch.float64, extra_on=()):
    """The same in one process, on the whole batch."""
    net = Net(seed, dtype)
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    for step in range(steps):
        batches = [(rows_of(w, step, dtype), w in extra_on) for w in workers]
        total = sum(len(x) for x, _ in batches)
        optimizer.zero_grad()
        if total:
            sum(len(x) / total * loss_of(net, x, extra) for x, extra in batches if len(x)).backward()
        optimizer.step()
    return state(net)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_synchronous_equals_one_process(ranks_of, n, optimizer):
    results = ranks_of(4).run(in_world, n, train, STEPS, optimizer, quiet=True)[:n]
    want = alone(STEPS, optimizer, range(1, n), seed=0)
    for rank, (got, *_) in enumerate(results):
        same(got, want, what=f"rank {rank}")
    _, log, version = results[0]
    assert version == STEPS
    assert log == [Applied(w, step, step) for step in range(STEPS) for w in range(1, n)]


def test_float32_other_servers_groups_and_layers_that_only_some_use(ranks_of):
    ranks = ranks_of(4)
    for got, *_ in ranks.run(train, STEPS, "SGD", torch.float32, quiet=True):
        same(got, alone(STEPS, "SGD", [1, 2, 3], 0, torch.float32), 1e-5, 1e-6)
    for got, *_ in ranks.run(train, STEPS, "AdamW", server=2, extra_on=[3], quiet=True):
        same(got, alone(STEPS, "AdamW", [0, 1, 3], 2, extra_on=[3]))

    def in_pairs():
        members = [[0, 2], [1, 3]][dist.get_rank() % 2]
        groups = [group_of([0, 2]), group_of([1, 3])]
        return train(STEPS, "SGD", server=members[1], group=groups[dist.get_rank() % 2])

    for got, *_ in ranks.run(in_pairs, quiet=True):
        same(got, alone(STEPS, "SGD", [0], 1))  # ranks 0 and 1 of each group


def test_a_parameter_without_a_gradient_anywhere_is_left_alone(ranks_of):
    before = state(Net(0))
    [after, *_], *_ = ranks_of(4).run(train, 3, "AdamW", quiet=True)
    for name in ("unused.weight", "frozen.weight", "extra.weight"):
        assert torch.equal(after[name], before[name])
    assert not torch.equal(after["fc1.weight"], before["fc1.weight"])


def test_workers_with_fewer_batches_leave_and_the_mean_is_over_the_others(ranks_of):
    def fewer():
        rank, net = dist.get_rank(), Net(0)
        with ParameterServer(net, torch.optim.SGD(net.parameters(), lr=0.1)) as ps:
            if ps.serving:
                return ps.serve(), state(net)
            for _ in range(2 * rank):
                gradient_of(net, torch.full((1, 6), float(rank), dtype=torch.float64))
                ps.step()

    log, got = ranks_of(4).run(fewer, quiet=True)[0]
    net = Net(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(6):
        x = torch.stack([torch.full((6,), float(w), dtype=torch.float64) for w in (1, 2, 3) if step < 2 * w])
        gradient_of(net, x)
        optimizer.step()
    same(got, state(net))
    assert [sum(a.applied_to == step for a in log) for step in range(6)] == [3, 3, 2, 2, 1, 1]


def test_pushed_parameters_are_averaged_by_rows(ranks_of):
    """Two local steps on each worker, then the server takes the mean: federated averaging (McMahan et al. 2017)."""

    def local_steps(net, worker, round):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for step in range(2):
            gradient_of(net, torch.ones(1, 6, dtype=torch.float64) * (worker + round + step))
            optimizer.step()

    def federated():
        rank, net = dist.get_rank(), Net(0)
        with ParameterServer(net, torch.optim.SGD(net.parameters(), lr=1), push="parameters") as ps:
            if ps.serving:
                ps.serve()
            else:
                for round in range(3):
                    local_steps(net, rank, round)
                    ps.step(rows=rank)
        return state(net)

    want = Net(0)
    for round in range(3):
        nets = [Net(0) for _ in range(3)]
        for worker, net in enumerate(nets, 1):
            net.load_state_dict(want.state_dict())
            local_steps(net, worker, round)
        with torch.no_grad():
            for p, *theirs in zip(want.parameters(), *(net.parameters() for net in nets), strict=True):
                p.copy_(sum(worker / 6 * t for worker, t in enumerate(theirs, 1)))
    for got in ranks_of(4).run(federated, quiet=True):
        same(got, state(want))


# ---- asynchronous ---------------------------------------------------------------------------------------------


def stale_alone(schedule, optimizer, staleness=None):
    """One process that keeps every version: each gradient from the version that its worker had."""
    net, old = Net(0), Net(0)
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    versions, log, done = [state(net)], [], dict.fromkeys(schedule, 0)
    holds, waiting = dict.fromkeys(schedule, 0), []
    for worker in schedule:
        old.load_state_dict(versions[holds[worker]])
        gradient_of(old, rows_of(worker, done[worker]))
        for p, q in zip(net.parameters(), old.parameters(), strict=True):
            p.grad = q.grad
        log.append(Applied(worker, holds[worker], len(versions) - 1))
        optimizer.step()
        versions.append(state(net))
        done[worker] += 1
        waiting.append(worker)
        for free in [w for w in waiting if staleness is None or done[w] - min(done.values()) <= staleness]:
            waiting.remove(free)
            holds[free] = len(versions) - 1
    return state(net), log


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("staleness", [None, 0, 2])
def test_a_scripted_order_equals_one_process_with_old_versions(ranks_of, optimizer, staleness):
    schedule = arrival_order([1.0, 1.7, 4.1], STEPS, staleness, workers=[1, 2, 3])
    options = {"synchronous": False, "staleness": staleness, "schedule": schedule}
    got, log, version = ranks_of(4).run(train, STEPS, optimizer, quiet=True, **options)[0]
    want, expected = stale_alone(schedule, optimizer, staleness)
    assert log == expected and version == 3 * STEPS
    assert max(a.staleness for a in log) > 0
    same(got, want)


def test_the_order_of_arrivals():
    assert arrival_order([1, 2.5], 3) == [1, 1, 2, 1, 2, 2]
    assert arrival_order([1, 2.5], 3, staleness=0) == [1, 2] * 3
    assert arrival_order([1, 1], 2, workers=[0, 3]) == [0, 3, 0, 3]
    assert arrival_order([1, 2.5], 0) == []


def test_free_running_applies_every_push_and_bounded_staleness_holds(ranks_of):
    def free(staleness, slow=0.004):
        rank, net = dist.get_rank(), Net(0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        with ParameterServer(net, optimizer, synchronous=False, staleness=staleness) as ps:
            if ps.serving:
                return ps.serve()
            for step in range(12):
                gradient_of(net, rows_of(rank, step))
                time.sleep(slow if rank == 3 else 0)
                ps.step()

    for bound in (0, 1, 3, None):
        log = ranks_of(4).run(free, bound, quiet=True)[0]
        assert sorted(a.worker for a in log) == sorted([1, 2, 3] * 12)
        assert [a.applied_to for a in log] == list(range(36))
        if bound is not None:
            assert max(a.staleness for a in log) <= 2 * (2 * bound + 1)  # (N - 1)(2s + 1)
            clock = dict.fromkeys([1, 2, 3], 0)
            for a in log:
                assert clock[a.worker] - min(clock.values()) <= bound
                clock[a.worker] += 1


def test_staleness_is_what_the_workers_saw(ranks_of):
    """Each step adds 1 to the weight: it is the version, and each worker reads off which one it computes from."""

    def counting():
        rank, net, saw = dist.get_rank(), nn.Linear(1, 1, bias=False), []
        nn.init.zeros_(net.weight)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        with ParameterServer(net, optimizer, synchronous=False, staleness=2) as ps:
            if ps.serving:
                return ps.serve()
            for _ in range(10):
                saw.append(int(net.weight))
                net.weight.grad = -torch.ones(1, 1)
                time.sleep(0.002 if rank == 3 else 0)
                ps.step()
        return saw

    log, *saw = ranks_of(4).run(counting, quiet=True)
    for worker in (1, 2, 3):
        assert [a.computed_at for a in log if a.worker == worker] == saw[worker - 1]
    assert any(a.staleness for a in log)


def test_after_step_is_called_with_each_version(ranks_of):
    def scheduled():
        rank, net = dist.get_rank(), Net(0)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        rates, scheduler = [], torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        with ParameterServer(net, optimizer) as ps:
            if ps.serving:
                ps.serve(lambda: (rates.append((ps.version, scheduler.get_last_lr()[0])), scheduler.step()))
            else:
                for step in range(4):
                    gradient_of(net, rows_of(rank, step))
                    ps.step()
        return rates

    assert ranks_of(4).run(scheduled, quiet=True)[0] == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5)]


# ---- bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"synchronous": False}])
def test_bytes_are_what_the_formula_says(ranks_of, n, options):
    net = Net(0)
    size = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)  # S
    everything = sum(t.numel() * t.element_size() for t in [*net.parameters(), *net.buffers()])
    header = 8 + 2  # nine trainable tensors
    assert sum(p.requires_grad for p in net.parameters()) == 9
    trace = ranks_of(4).trace(in_world, n, partial(train, 5, "SGD", **options), quiet=True)
    alike = described(named_tensors(net))
    hello, answer = (8 + len(pickle.dumps(o)) for o in (alike, [described(named_tensors(net)) for _ in range(n)]))
    goodbye = header + 1
    for worker in range(1, n):
        assert trace.bytes("send", worker) == hello + 5 * (size + header) + goodbye
        assert trace.bytes("recv", worker) == answer + everything + 5 * size
    workers = n - 1
    assert trace.bytes("send", 0) == workers * (answer + everything + 5 * size)
    assert trace.bytes("recv", 0) == workers * (hello + 5 * (size + header) + goodbye)
    assert {e.name for e in trace.collectives} == {"send", "recv"}


def test_a_flat_buffer_holds_any_dtypes_without_gaps():
    tensors = [torch.ones(3, dtype=torch.bfloat16), torch.arange(4), torch.ones(2, 2), torch.tensor(True),
               torch.ones(1, dtype=torch.complex64), torch.empty(0, 3)]  # fmt: skip
    buffer = FlatBuffer(tensors).read_from(tensors)
    assert buffer.raw.numel() == 6 + 32 + 16 + 1 + 8
    again = [torch.zeros_like(t) for t in tensors]
    buffer.write_into(again)
    assert all(torch.equal(a, t) and a.dtype == t.dtype for a, t in zip(again, tensors, strict=True))
    assert not FlatBuffer(tensors).read_from([None] * 6).raw.any()


def test_mixed_dtypes(ranks_of):
    def mixed():
        net = nn.Sequential(nn.Linear(3, 4, dtype=torch.bfloat16), nn.Linear(4, 2))
        with ParameterServer(net, torch.optim.SGD(net.parameters(), lr=0.5)) as ps:
            if ps.serving:
                ps.serve()
            else:
                for p in net.parameters():
                    p.grad = torch.full_like(p, float(dist.get_rank()))
                before = [p.detach().clone() for p in net.parameters()]
                ps.step()
                return [(b - p).float().mean().item() for b, p in zip(before, net.parameters(), strict=True)]

    for moved in ranks_of(4).run(mixed, quiet=True)[1:]:
        assert moved == pytest.approx([1.0] * 4, abs=0.02)  # lr 0.5 times the mean of 1, 2, 3


# ---- when it goes wrong ---------------------------------------------------------------------------------------

DYING = """
import json, os, signal, sys, torch, torch.distributed as dist
import torch.distributed.nn  # lets a group end before Python does
from pardist_lib.mechanisms.parameter_server import ParameterServer
from pardist_lib.mechanisms.parameter_server.server import _header
rank, store, out, when = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", store=dist.FileStore(store, 3), rank=rank, world_size=3)
net = torch.nn.Linear(2, 2) if when == "between" else torch.nn.Linear(2000, 2000)
ps = ParameterServer(net, torch.optim.SGD(net.parameters(), lr=0.1), synchronous=False, staleness=1)
if ps.serving:
    ps.serve()
    json.dump({"log": ps.log, "lost": list(ps.lost)}, open(out, "w"))
else:
    for step in range(8):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        if rank == 2 and step == 3:
            if when != "between":
                pushed = ps.leaving.read_from([p.grad for p in net.parameters()]).raw
                ps.arriving.raw.zero_()
                pulls = dist.irecv(ps.arriving.raw, 0)
                ps.send(_header(1, [True, True]), 0).wait()
                push = ps.send(pushed, 0)
                while when == "pulling" and not ps.arriving.raw[:100].any():
                    pass
            os.kill(os.getpid(), signal.SIGKILL)
        ps.step()
    ps.leave()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("when", ["between", "pushing", "pulling"])
def test_a_worker_that_dies_does_not_stop_the_asynchronous_server(tmp_path, when):
    """Three real processes; the others may not wait for the dead one either, though they are bound to it. It dies
    between two steps, or in the middle of a message of 16 MB."""
    script, out = tmp_path / "dying.py", tmp_path / "out.json"
    script.write_text(textwrap.dedent(DYING))
    command = [sys.executable, str(script)]
    processes = [subprocess.Popen([*command, str(r), str(tmp_path / "store"), str(out), when]) for r in range(3)]
    try:
        assert [p.wait(200) for p in processes] == [0, 0, -9]
    finally:
        for p in processes:
            p.kill()
    told = json.loads(out.read_text())
    workers = [worker for worker, *_ in told["log"]]
    assert workers.count(1) == 8 and workers.count(2) == 3 + (when == "pulling")
    assert told["lost"] == [2]


def test_a_worker_that_dies_stops_the_synchronous_server_by_name(ranks_of, tmp_path):
    def dying():
        net = Net(0)
        ps = ParameterServer(net, torch.optim.SGD(net.parameters(), lr=0.1))
        if ps.serving:
            try:
                ps.serve()
            except ConnectionError as error:
                (tmp_path / "said").write_text(str(error))
        for step in range(0 if ps.serving else 5):
            gradient_of(net, rows_of(1, step))
            if dist.get_rank() == 1 and step == 1:  # has no more batches
                return ps.leave()
            if dist.get_rank() == 2 and step == 3:
                import os

                os._exit(3)
            ps.step()

    with pytest.raises(RankError, match="rank 2"):
        ranks_of(4).run(dying, quiet=True)
    assert "worker 2 is lost after 3 steps: a synchronous server cannot" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("synchronous", [True, False])
def test_a_worker_that_raises_is_lost_and_its_own_error_is_told(ranks_of, synchronous, tmp_path):
    def raising(catch):
        net, rank = Net(0), dist.get_rank()
        try:
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            with ParameterServer(net, optimizer, synchronous=synchronous) as ps:
                if ps.serving:
                    ps.serve()
                for step in range(0 if ps.serving else 4):
                    if rank == 2 and step == 1:
                        raise KeyError("batch 17")
                    gradient_of(net, rows_of(1, step))
                    ps.step()
        except ConnectionError as error:
            (tmp_path / "said").write_text(str(error))
            raise
        except KeyError:
            if not catch:
                raise
        return rank or sorted(a.worker for a in ps.log), {w: str(error) for w, error in ps.lost.items()}

    with pytest.raises(RankError, match="batch 17"):
        ranks_of(4).run(raising, False, quiet=True)
    if synchronous:
        assert "worker 2 is lost after 1 steps" in (tmp_path / "said").read_text()
    else:
        told = ranks_of(4).run(raising, True, quiet=True)[0]
        assert told == ([1] * 4 + [2] + [3] * 4, {2: "an exception ended its `with`"})


def fails(ranks, why, make, n=4):
    def refused():
        try:
            make(dist.get_rank())
        except ValueError as error:
            return str(error)

    said = ranks.run(in_world, n, refused, quiet=True)[:n]
    assert all(text and why in text for text in said), said


def test_bad_arguments_are_named(ranks_of):
    ranks = ranks_of(4)

    def server(rank, net=None, optimizer=None, **options):
        net = Net(0) if net is None else net
        ParameterServer(net, optimizer or torch.optim.SGD(net.parameters(), lr=0.1), **options)

    fails(ranks, "at least two ranks", server, n=1)
    frozen = Net(0).requires_grad_(False)
    fails(ranks, "nothing to train", lambda r: server(r, frozen, torch.optim.SGD(frozen.parameters())))
    fails(ranks, "11 of the optimizer's 11 parameters are not the module's",
          lambda r: server(r, optimizer=torch.optim.SGD(Net(1).parameters())))  # fmt: skip
    fails(ranks, "not 'weights'", lambda r: server(r, push="weights"))
    fails(ranks, "for synchronous=False", lambda r: server(r, staleness=1))
    fails(ranks, "for synchronous=False", lambda r: server(r, schedule=[1]))
    fails(ranks, "not -1", lambda r: server(r, synchronous=False, staleness=-1))
    fails(ranks, "rank 0: the workers are [1, 2, 3]", lambda r: server(r, synchronous=False, schedule=[1, 0]))
    fails(ranks, "rank 9 is not in the group", lambda r: server(r, server=9))
    differ = "Build the same model on every rank"
    for odd in (0, 2):  # all ranks say so, those that agree with the server too
        fails(ranks, differ, lambda r, odd=odd: server(r, nn.Linear(2, 2 + (r == odd))))
    fails(ranks, differ, lambda r: server(r, nn.Linear(2, 2, bias=r > 0, dtype=torch.float64)))


def test_wrong_use_is_named(ranks_of):
    def used():
        net, said = Net(0), []

        def note(call, *args):
            try:
                call(*args)
            except (RuntimeError, ValueError) as error:
                said.append(str(error))

        with ParameterServer(net, torch.optim.SGD(net.parameters(), lr=0.1)) as ps:
            if ps.serving:
                note(ps.step)
                ps.serve()
                note(ps.serve)
            else:
                note(ps.serve)
                note(ps.step, -1)
                note(ps.step, 0.5)
                ps.step(rows=np.int64(2))
                ps.leave()
                note(ps.step)
                ps.leave()  # once more does no harm
        return said

    server, worker, *_ = ranks_of(4).run(used, quiet=True)
    assert server == [
        "rank 0 is the server: it calls serve(), step() is for the workers",
        "this server has served, its workers have left: make a new ParameterServer on all ranks",
    ]
    assert [text.split(":")[0].split(",")[0] for text in worker] == [
        "rank 1 is a worker", "rows is how many rows this gradient is the mean over",
        "rows is how many rows this gradient is the mean over", "rank 1 has left the server",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "schedule, staleness, why",
    [
        ([1, 2, 3], None, "the schedule ends after 3 pushes, but worker"),
        ([1, 1, 1, 2, 3, 2, 3, 2, 3], 1, "the schedule's push 2 (from 0) is worker 1's, which waits for slower ones"),
        ([1, 1, 1, 1, 2, 3, 2, 3, 2, 3], None, "the schedule's push 3 (from 0) is worker 1's, which has left"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_refused(ranks_of, schedule, staleness, why):
    with pytest.raises(RankError) as caught:
        ranks_of(4).run(train, 3, "SGD", synchronous=False, staleness=staleness, schedule=schedule, quiet=True)
    assert why in str(caught.value)


def test_a_schedule_may_count_on_a_slow_worker_to_leave(ranks_of):
    """Worker 1 waits for rank 2, which makes no step and leaves; worker 3's push comes before its turn meanwhile."""

    def leaves():
        rank, net = dist.get_rank(), Net(0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        schedule = [3, 1, 1, 1, 3]
        with ParameterServer(net, optimizer, synchronous=False, staleness=1, schedule=schedule) as ps:
            if ps.serving:
                return [a.worker for a in ps.serve()]
            time.sleep(0.5 if rank == 2 else 0)
            for step in range([3, 0, 2][rank - 1]):
                gradient_of(net, rows_of(1, step))
                ps.step()

    assert ranks_of(4).run(leaves, quiet=True)[0] == [3, 1, 1, 1, 3]


def test_one_server_after_the_other(ranks_of):
    def in_turn():
        net, logs = Net(0), []
        for server in (2, 0, 1, 0):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            with ParameterServer(net, optimizer, synchronous=server != 1, server=server) as ps:
                if ps.serving:
                    logs.append(len(ps.serve()))
                for step in range(0 if ps.serving else 3):
                    gradient_of(net, rows_of(1, step))
                    ps.step()
        return logs, state(net)["fc1.weight"]

    results = ranks_of(4).run(in_turn, quiet=True)
    assert [logs for logs, _ in results] == [[9, 9], [9], [9], []]
    for _, weight in results:
        assert torch.equal(weight, results[0][1]) and not torch.equal(weight, state(Net(0))["fc1.weight"])
