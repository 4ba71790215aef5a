"""The parameter server: synchronous training against one process, bytes, and what is refused."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.collectives.agreement import described, named_tensors
from pardist_lib.mechanisms.parameter_server import Applied, ParameterServer
from tests.mechanisms.nets import OPTIMIZERS, STEPS, Net, fails, gradient_of, same, state
from tests.mechanisms.parameter_server.training import alone, rows_of, train

# ---- synchronous ----------------------------------------------------------------------------------------------


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


# ---- bad input ------------------------------------------------------------------------------------------------


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
