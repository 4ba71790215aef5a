"""The run follows its table, never blocks itself, and says where it stands."""

import queue
import random
import threading
import time
from collections import defaultdict
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib import RankHang, Ranks
from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.collectives.point_to_point import exchange, wait
from pardist_lib.mechanisms.pipeline import (
    Action,
    Pipeline,
    Schedule,
    gpipe,
    interleaved,
    messages,
    one_f_one_b,
    zbv,
    zero_bubble,
)
from pardist_lib.mechanisms.pipeline.simulate import waits_for
from tests.mechanisms.pipeline.nets import agree, beside_one_process, case, linears, rows_of, stepped


def one_step(schedule):
    pipeline = Pipeline(linears(schedule.stages), schedule, nn.functional.mse_loss)
    for _ in range(2):
        stepped(pipeline, rows_of(2 * schedule.micro_batches), rows_of(2 * schedule.micro_batches, 1))


def test_each_rank_does_its_row_in_its_order(ranks_of):
    p = 4
    for schedule in (gpipe(p, 3), one_f_one_b(p, 6), interleaved(p, 4, 2), zero_bubble(p, 5), zbv(p, 5)):
        trace = ranks_of(p).trace(one_step, schedule, quiet=True)
        for rank, row in enumerate(schedule.rows):
            done = [e.name for e in trace.regions if e.rank == rank]
            assert done == 2 * [f"pipeline {action}" for action in row]


def test_a_stage_without_gradients_does_its_forwards_only(ranks_of):
    schedule = one_f_one_b(4, 4)
    trace = ranks_of(4).trace(without_gradients, schedule, quiet=True)
    for rank in range(4):
        assert [e.name for e in trace.regions if e.rank == rank] == [f"pipeline {rank}F{i}" for i in range(4)]


def without_gradients(schedule):
    Pipeline(linears(4), schedule, nn.functional.mse_loss)(rows_of(8))


# ---- any order that check() accepts -------------------------------------------------------------------------------


def any_schedule(rng, p):
    """Stages anywhere, backwards whole and in halves; an order in which everything is there when it is needed, and
    for the rest by chance: by other preferences in each schedule."""
    stages, m = rng.randint(p, 3 * p), rng.randint(1, 5)
    rank_of = [*range(p), *(rng.randrange(p) for _ in range(stages - p))]
    rng.shuffle(rank_of)
    todo = []
    for stage in range(stages):
        for i in range(m):
            todo += [Action(stage, kind, i) for kind in ("F", *rng.choice(["B", "IW"]))]
    liking = defaultdict(lambda: rng.random() ** rng.choice([1, 8]))
    rows, done = [[] for _ in range(p)], set()
    while todo:
        ready = [a for a in todo if all(need in done for need in waits_for(a, stages))]
        action = max(ready, key=lambda a: liking[a.kind, a.stage] * liking[a.micro_batch] * rng.random())
        todo.remove(action)
        done.add((action.stage, "I" if action.kind == "B" else action.kind, action.micro_batch))
        rows[rank_of[action.stage]].append(action)
    return Schedule(rows).check()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.1, dtype=torch.float64))

    def forward(self, x):
        return x.sin() * self.weight


@pytest.mark.share(2)
@pytest.mark.parametrize("p", [2, 3, 4])
def test_no_schedule_that_can_be_run_blocks(ranks_of, p):
    """With messages that fit into a socket's buffer, and of 1 MB, which do not."""
    rng, cases = random.Random(p), []
    for number in range(16):
        schedule = any_schedule(rng, p)
        for width in (3, 2**17):
            x = rows_of(schedule.micro_batches, number, width=width)
            build = lambda n=schedule.stages: [Scale() for _ in range(n)]  # noqa: E731
            cases.append(case(f"{number}: {schedule!r}", build, schedule, (x, x * 2)))
    agree(ranks_of, p, cases)


class OneAfterTheOther:
    """Messages as nccl has them: each begins when the one before it, started on the same rank, is through on both."""

    def __init__(self):
        self.queue = queue.SimpleQueue()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while work := self.queue.get():
            wait(exchange(*work.message))
            work.done.set()

    def __call__(self, sends=(), receives=(), group=None):
        work = SimpleNamespace(message=(sends, receives, group), done=threading.Event())
        work.wait = work.done.wait
        self.queue.put(work)
        return [work]


def as_on_nccl(cases):
    line = OneAfterTheOther()
    with mock.patch.object(messages, "exchange", line), mock.patch.object(messages, "on_nccl", lambda *_: True):
        beside_one_process(cases)
    line.queue.put(None)


@pytest.mark.share(2)
@pytest.mark.parametrize("p", [2, 3, 4])
def test_nor_where_messages_wait_for_each_other(ranks_of, p):
    rng = random.Random(10 + p)
    schedules = [gpipe(p, 4), one_f_one_b(p, 5), interleaved(p, 2 * p, 2), zbv(p, 4)]
    schedules += [any_schedule(rng, p) for _ in range(12)]
    cases = [case(f"{s!r}", lambda n=s.stages: linears(n), s, *2 * [(rows_of(9), rows_of(9, 1))]) for s in schedules]
    ranks_of(4).run(in_world, p, as_on_nccl, cases, quiet=True)


# ---- where it stands ----------------------------------------------------------------------------------------------


class Sleeps(nn.Module):
    def forward(self, x):
        if dist.get_rank() == 1 and x[0, 0] > 0:
            time.sleep(60)
        return x


def asleep():
    layers = [*linears(1), Sleeps(), *linears(1)]
    with torch.no_grad():
        layers[0].weight.fill_(1.0), layers[0].bias.zero_()
    pipeline = Pipeline(layers, one_f_one_b(3, 3), nn.functional.mse_loss)
    x = -torch.ones(3, 6, dtype=torch.float64)
    x[1] = 1.0
    stepped(pipeline, x, rows_of(3))


def left_out():
    """Rank 1 does not come; then rank 2 comes once more."""
    pipeline = Pipeline(linears(3), one_f_one_b(3, 3), nn.functional.mse_loss)
    for _ in range(1 + (dist.get_rank() == 2)):
        stepped(pipeline, rows_of(3), rows_of(3))


def not_there():
    pipeline = Pipeline(linears(3), one_f_one_b(3, 3), nn.functional.mse_loss)
    if dist.get_rank() != 1:
        stepped(pipeline, rows_of(3), rows_of(3))


def test_a_hang_says_where_in_the_schedule_each_rank_is():
    with Ranks(3, timeout=2) as ranks:
        with pytest.raises(RankHang) as caught:
            ranks.run(asleep, quiet=True)
        said = str(caught.value)
        assert "for 1F1, place 1 of its row in the schedule" in said, said  # asleep
        assert "0B0" in said and "2F1, place 2 of its row" in said, said
        for wrong, waiting in ((left_out, "rank 2"), (not_there, "ranks 0, 2")):
            with pytest.raises(RankHang) as caught:
                ranks.run(wrong, quiet=True)
            assert waiting in str(caught.value) and "all_reduce" in str(caught.value), caught.value
        ranks.run(one_step, one_f_one_b(3, 3), quiet=True)
