"""The serving rank: stale gradients against one process that keeps old versions too; workers that die or leave."""

import json
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib import RankError
from pardist_lib.lessons.lesson05.arrivals import arrival_order, arrivals
from pardist_lib.mechanisms.parameter_server import Applied, ParameterServer
from tests.mechanisms.nets import OPTIMIZERS, STEPS, Net, gradient_of, same, state
from tests.mechanisms.parameter_server.training import rows_of, train

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


def test_arrivals_end_with_the_time_or_with_the_steps():
    assert arrivals([1, 2.5], until=3) == [(1, 1), (2, 1), (2.5, 2), (3, 1)]
    assert arrivals([1, 2.5], 2, until=3) == [(1, 1), (2, 1), (2.5, 2)]  # rank 1 is done
    assert arrivals([1, 2.5], staleness=0, until=5.5) == [(1, 1), (2.5, 2), (3.5, 1), (5.0, 2)]  # rank 1 has waited
    assert sum(rank == 3 for _, rank in arrivals([1, 2.3, 6.1], until=20 * 6.1)) == 20  # the last one just in time
    with pytest.raises(ValueError, match="never ends"):
        arrivals([1, 2.5])


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


# ---- when it goes wrong ---------------------------------------------------------------------------------------

DYING = """
import json, os, signal, sys, torch, torch.distributed as dist
import torch.distributed.nn  # lets a group end before Python does
from pardist_lib.mechanisms.parameter_server import ParameterServer
from pardist_lib.mechanisms.parameter_server.messages import header
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
                ps.send(header(1, [True, True]), 0).wait()
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
