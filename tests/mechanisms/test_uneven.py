"""Uneven ranks: any split equals one process; shares that follow the speed; backup workers."""

import math
import queue
import threading
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms import uneven
from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.uneven import Balancer, Race, average_by_rows, shares_of
from tests.mechanisms.refusals import refused

ROWS = 24


class Net(nn.Module):
    """A weight used twice, a frozen layer, one that nobody uses, one that some ranks use."""

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        numbers = torch.Generator().manual_seed(seed)
        for name in ("fc1", "fc2", "again", "frozen", "unused", "extra"):
            self.add_module(name, nn.Linear(6, 6))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=numbers, dtype=torch.float64) / 2
        self.to(dtype)
        self.again.weight = self.fc2.weight
        self.frozen.requires_grad_(False)

    def forward(self, x, extra=False):
        x = self.frozen(torch.tanh(self.again(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))))
        return self.extra(x) if extra else x


def rows_of(step, dtype=torch.float64, rows=ROWS):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def loss_of(net, x, extra=False, summed=False):
    each = net(x, extra).square().sum(1)
    return each.sum() if summed else each.mean()


def state(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def gradients(net):
    return {name: p.grad if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def same(got, want, what=""):
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value is None or got[name] is None:
            assert value is None and got[name] is None, f"{what} {name}"
            continue
        relative, absolute = (1e-10, 1e-10) if value.dtype == torch.float64 else (1e-5, 1e-6)
        gap = (got[name] - value).abs().max().item()
        assert torch.allclose(got[name], value, relative, absolute), f"{what} {name} is off by {gap:.2g}"


def part(x, split, rank):
    start = sum(split[:rank])
    return x[start : start + split[rank]]


# ---- shares ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, speeds, least, want",
    [
        (100, [3, 3, 3, 1], 0, [30, 30, 30, 10]),
        (8, [1, 1, 1, 1], 0, [2, 2, 2, 2]),
        (7, [1, 1], 0, [4, 3]),
        (10, [1, 1, 1], 0, [4, 3, 3]),
        (5, [1e6, 1, 1], 1, [3, 1, 1]),
        (5, [1e6, 1, 1], 0, [5, 0, 0]),
        (6, [0, 1, 2], 0, [0, 2, 4]),
        (3, [5], 0, [3]),
        (0, [1, 2], 0, [0, 0]),
    ],
)
def test_shares_by_hand(rows, speeds, least, want):
    assert shares_of(rows, speeds, least) == want


def all_splits(rows, n):
    if n == 1:
        yield [rows]
    else:
        for first in range(rows + 1):
            yield from ([first, *rest] for rest in all_splits(rows - first, n - 1))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 14), st.lists(st.floats(0.01, 100), min_size=1, max_size=4), st.integers(0, 2))
def test_no_split_ends_sooner(rows, speeds, least):
    if rows < least * len(speeds):
        with pytest.raises(ValueError, match="not enough"):
            shares_of(rows, speeds, least)
        return
    got = shares_of(rows, speeds, least)
    assert sum(got) == rows and min(got) >= least
    ends = [max(s / v for s, v in zip(split, speeds, strict=True))
            for split in all_splits(rows, len(speeds)) if min(split) >= least]  # fmt: skip
    assert max(s / v for s, v in zip(got, speeds, strict=True)) <= min(ends) * (1 + 1e-12)


def test_shares_refused():
    for speeds in ([], [0, 0], [1, -1], [1, math.nan], [1, math.inf]):
        with pytest.raises(ValueError, match="speeds are rows per second, 0 or more and not all 0"):
            shares_of(4, speeds)
    for rows, least in ((3, 2), (-1, 0), (2.5, 0)):
        with pytest.raises(ValueError, match="rows are not enough for 2 ranks"):
            shares_of(rows, [1, 1], least)
    with pytest.raises(ValueError, match="rank 1 has the speed 0"):
        shares_of(4, [1, 0], 1)


# ---- gradients by rows ----------------------------------------------------------------------------------------


def step_on(splits, dtype=torch.float64, extra_on=(), group=None, summed=False):
    """Gradients after each split of the batch, on a rank; a rank without rows has left-over gradients, or none."""
    rank, found = dist.get_rank(group), []
    for i, split in enumerate(splits):
        net, x = Net(dtype), part(rows_of(i, dtype, sum(split)), split, rank)
        if len(x):
            loss_of(net, x, rank in extra_on, summed).backward()
        elif i % 2:
            loss_of(net, rows_of(99, dtype)).mul(math.inf).backward()  # not to be counted
        total = average_by_rows(net.parameters(), len(x), group, summed=summed, total=sum(split) if i % 2 else None)
        assert total == sum(split)
        found.append(gradients(net))
    return found


SPLITS = {1: [[24], [1]], 2: [[12, 12], [23, 1], [0, 5]], 3: [[8, 8, 8], [1, 20, 3], [7, 0, 1], [0, 0, 2]],
          4: [[6, 6, 6, 6], [10, 10, 3, 1], [1, 0, 22, 1], [0, 0, 0, 24], [1, 1, 0, 0], [2, 3, 5, 7]]}  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("summed", [False, True])
def test_any_split_equals_one_process(ranks_of, n, summed):
    for dtype in (torch.float64, torch.float32):
        got = ranks_of(4).run(in_world, n, step_on, SPLITS[n], dtype, (), None, summed, quiet=True)[:n]
        for i, split in enumerate(SPLITS[n]):
            alone = Net(dtype)
            loss_of(alone, rows_of(i, dtype, sum(split))).backward()
            want = gradients(alone)
            assert want["unused.weight"] is None and want["frozen.weight"] is None
            for rank, one in enumerate(got):
                same(one[i], want, f"rank {rank}, split {split}")
                assert all(g is None or torch.equal(g, got[0][i][k]) for k, g in one[i].items())


def test_layers_that_some_ranks_use_and_groups(ranks_of):
    def in_pairs():
        group = [group_of([0, 2]), group_of([1, 3])][dist.get_rank() % 2]
        return step_on([[5, 2], [1, 9]], group=group, extra_on=(1,))

    got = ranks_of(4).run(in_pairs, quiet=True)
    for i, split in enumerate([[5, 2], [1, 9]]):
        alone, x = Net(), rows_of(i, rows=sum(split))
        first, second = part(x, split, 0), part(x, split, 1)
        ((loss_of(alone, first, summed=True) + loss_of(alone, second, True, True)) / len(x)).backward()
        for one in got:
            same(one[i], gradients(alone))


def test_against_ddp_with_the_loss_weighted(ranks_of):
    """DDP's plain mean is wrong for unequal rows; with each loss times n·n_r/N it is right, as our DataParallel's."""
    split = [10, 10, 3, 1]

    def wrapped(kind):
        rank, net = dist.get_rank(), Net()
        net.unused.requires_grad_(False), net.extra.requires_grad_(False)
        model = DataParallel(net) if kind == "ours" else nn.parallel.DistributedDataParallel(net)
        x = part(rows_of(0), split, rank)
        weight = 4 * len(x) / ROWS if kind != "plain" else 1.0
        (model(x).square().sum(1).mean() * weight).backward()
        return gradients(net)

    want = ranks_of(4).run(step_on, [split], quiet=True)[0][0]
    for kind in ("ours", "torch's"):
        got = ranks_of(4).run(wrapped, kind, quiet=True)[0]
        same({k: got[k] for k in want}, want)
    plain = ranks_of(4).run(wrapped, "plain", quiet=True)[0]
    assert (plain["fc1.weight"] - want["fc1.weight"]).abs().max() > 1e-3


def test_accumulation_over_micro_batches_of_unequal_size(ranks_of):
    sizes = {0: [4, 4, 1], 1: [7], 2: [], 3: [2, 3, 2, 1]}  # 24 rows, unlike in number and size

    def accumulated():
        rank, net, at = dist.get_rank(), Net(), sum(sum(sizes[r]) for r in range(dist.get_rank()))
        x = rows_of(0)
        for size in sizes[rank]:
            loss_of(net, x[at : at + size], summed=True).backward()
            at += size
        total = average_by_rows(net.parameters(), sum(sizes[rank]), summed=True)
        return total, gradients(net)

    alone = Net()
    loss_of(alone, rows_of(0)).backward()
    for total, got in ranks_of(4).run(accumulated, quiet=True):
        assert total == 24
        same(got, gradients(alone))


def test_gradients_lie_in_memory_as_their_parameters(ranks_of):
    """An optimizer with fused=True counts on it."""

    def strides():
        conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        conv(torch.ones(1, 3, 3, 3)).sum().backward()
        average_by_rows(conv.parameters(), 1)
        return conv.weight.grad.stride() == conv.weight.stride()

    assert all(ranks_of(4).run(strides, quiet=True))


def test_what_is_sent(ranks_of):
    used = sum(p.numel() * 8 for p in [*Net().fc1.parameters(), *Net().fc2.parameters(), Net().again.bias])
    trained = sum(p.requires_grad for p in Net().parameters())
    for known, extra in ((None, 8), (ROWS, 0)):

        def once(known=known):
            net = Net()
            loss_of(net, part(rows_of(0), [10, 10, 3, 1], dist.get_rank())).backward()
            average_by_rows(net.parameters(), [10, 10, 3, 1][dist.get_rank()], total=known)

        trace = ranks_of(4).trace(once, quiet=True)
        assert {trace.bytes("all_reduce", r) for r in range(4)} == {used + trained + extra}
        assert trace.bytes() == 4 * (used + trained + extra)


def test_bad_rows_are_named(ranks_of):
    for rows, said in ((-1, "0 or more, not -1"), (2.5, "0 or more, not 2.5"), (0, "no rank has any rows")):
        with refused(said):
            ranks_of(4).run(lambda rows=rows: average_by_rows(Net().parameters(), rows), quiet=True)
    with refused("a gradient is sparse.*sparse=False"):

        def sparse():
            table = nn.Embedding(4, 2, sparse=True)
            table(torch.tensor([1])).sum().backward()
            average_by_rows(table.parameters(), 1)

        ranks_of(4).run(sparse, quiet=True)
    with refused("no parameter that requires a gradient"):
        ranks_of(4).run(lambda: average_by_rows([], 1), quiet=True)


# ---- shares that follow the speed -----------------------------------------------------------------------------


def balanced(steps, costs, batch=ROWS, dtype=torch.float64, micro=None, **how):
    """Train on a rank that `costs[step][rank]` seconds a row; nothing sleeps: the clock is turned forward."""
    rank, net = dist.get_rank(), Net(dtype)
    balancer, clock = Balancer(batch, **how), [0.0]
    balancer._now = lambda: clock[0]
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    seen = []
    for step in range(steps):
        seen.append(list(balancer.shares))
        x = rows_of(step, dtype, batch)
        optimizer.zero_grad()
        with balancer.timed():
            mine = x[balancer.mine]
            for some in mine.split(micro or len(mine)):
                loss_of(net, some, summed=bool(micro)).backward()
            clock[0] += len(mine) * costs[step][rank]
        balancer.finish(net.parameters(), summed=bool(micro))
        optimizer.step()
    return seen, state(net)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [None, 3])
def test_rebalanced_training_equals_one_process(ranks_of, n, micro):
    """20 steps while speeds change; with micro-batches of 3 rows and what is left."""
    costs = [[1 + (r * 7 + step // 5 * 3) % 5 for r in range(4)] for step in range(20)]
    for dtype in (torch.float64, torch.float32):
        alone = Net(dtype)
        optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
        for step in range(20):
            optimizer.zero_grad()
            loss_of(alone, rows_of(step, dtype)).backward()
            optimizer.step()
        got = ranks_of(4).run(in_world, n, balanced, 20, costs, ROWS, dtype, micro, quiet=True)[:n]
        assert all(shares == got[0][0] for shares, _ in got) and all(sum(s) == ROWS for s in got[0][0])
        assert n == 1 or len(set(map(tuple, got[0][0]))) > 1
        for _, after in got:
            same(after, state(alone))
            assert all(torch.equal(after[k], got[0][1][k]) for k in after)


def test_shares_find_the_speeds_and_follow_them(ranks_of):
    slow_then_fast = [[1, 1, 1, 3]] * 6 + [[2, 1, 1, 1]] * 14
    shares, _ = ranks_of(4).run(balanced, 20, slow_then_fast, 100, memory=0.3, quiet=True)[0]
    assert shares[0] == [25] * 4 and shares[1] == shares[5] == [30, 30, 30, 10]
    assert shares[19] == shares_of(100, [1 / 2, 1, 1, 1], 1)
    at_once, _ = ranks_of(4).run(balanced, 8, slow_then_fast, 100, memory=0.0, quiet=True)[0]
    assert at_once[7] == shares_of(100, [1 / 2, 1, 1, 1], 1)
    stopped = [[1, 1, 1, 1000]] * 3 + [[1, 1, 1, 1]] * 3  # nearly stands still, and comes back
    shares, _ = ranks_of(4).run(balanced, 6, stopped, 40, memory=0.0, quiet=True)[0]
    assert shares[1:4] == [[13, 13, 13, 1]] * 3 and shares[4] == [10] * 4


def test_a_fixed_cost_each_step_is_balanced_too(ranks_of):
    def with_start():
        balancer, clock = Balancer(200, memory=0.2), [0.0]
        balancer._now = lambda: clock[0]
        for _ in range(30):
            with balancer.timed():
                rows = balancer.shares[balancer.rank]
                clock[0] += rows * [1, 1, 1, 3][balancer.rank] + [0, 30, 0, 0][balancer.rank]
            balancer.rebalance()
        return balancer.shares

    shares = ranks_of(4).run(with_start, quiet=True)[0]
    took = [s * c + a for s, c, a in zip(shares, [1, 1, 1, 3], [0, 30, 0, 0], strict=True)]
    assert max(took) - min(took) <= 4  # all end within a row or two of each other


def emulated(steps, cost, balance, batch=100):
    """Rows per second of all ranks together: rank 3 is three times slower. A row takes `cost` seconds, 3 · cost there,
    most of them asleep, so that it does not matter how many ranks share a core."""
    rank, net = dist.get_rank(), Net()
    balancer = Balancer(batch)
    dist.barrier()
    for step in range(steps):
        if step == 3:
            start = time.perf_counter()
        with balancer.timed():
            done = time.perf_counter() + balancer.shares[rank] * cost * (3 if rank == 3 else 1)
            loss_of(net, rows_of(step, rows=batch)[balancer.mine]).backward()
            time.sleep(max(0, done - time.perf_counter()))
        if balance:
            balancer.finish(net.parameters())
        else:
            average_by_rows(net.parameters(), balancer.shares[rank])
    return batch * (steps - 3) / (time.perf_counter() - start), balancer.shares


def test_throughput_with_one_rank_three_times_slower(ranks_of):
    """Best possible: Σ speeds. Equal shares get 0.4 of it at most, balanced ones at least 0.9."""
    for cost in (0.008, 0.016, 0.032):  # a machine that others use too: more time for each row, less to the overhead
        best = (3 + 1 / 3) / cost
        equal, _ = ranks_of(4).run(emulated, 6, cost, False, quiet=True)[0]
        balanced, shares = ranks_of(4).run(emulated, 8, cost, True, quiet=True)[0]
        print(f"equal {equal / best:.3f}, balanced {balanced / best:.3f}, shares {shares}")
        if balanced >= 0.9 * best:
            break
    assert equal <= 0.402 * best and balanced >= 0.9 * best, (equal / best, balanced / best)


def test_real_work_is_balanced_too(ranks_of):
    """Rank 3 computes every row three times; four ranks share what cores there are, so only the direction is sure."""

    def working():
        rank, net, balancer = dist.get_rank(), Net(), Balancer(120, memory=0.5)
        a = torch.randn(160, 160)
        for step in range(6):
            with balancer.timed():
                mine = rows_of(step, rows=120)[balancer.mine]
                for _ in range(len(mine) * (3 if rank == 3 else 1)):
                    a @ a  # noqa: B018
                loss_of(net, mine).backward()
            balancer.finish(net.parameters())
        return balancer.shares

    shares = ranks_of(4).run(working, quiet=True)[0]
    assert sum(shares) == 120 and shares[3] < 0.75 * sum(shares[:3]) / 3, shares


def test_bad_balancers_are_named(ranks_of):
    ranks = ranks_of(4)
    for wrong, said in (({"memory": 1.0}, "memory is the part of the old estimate"), ({"memory": -0.1}, "memory"),
                        ({"least": 0}, "least is 1 or more, not 0"), ({"batch": 3}, "3 rows are not enough"),
                        ({"least": 7}, "24 rows are not enough for 4 ranks with 7 rows each")):  # fmt: skip
        with refused(said):
            ranks.run(lambda wrong=wrong: Balancer(**({"batch": ROWS} | wrong)), quiet=True)
    with refused("has measured no time"):
        ranks.run(lambda: Balancer(ROWS).rebalance(), quiet=True)


# ---- backup workers -------------------------------------------------------------------------------------------


def raced(drop, late, steps=3, n=4, group=None):
    """Micro-batches of 2 rows, three a rank; ranks in late[step] take their time. What was counted, and gradients."""
    rank, net, race, seen = dist.get_rank(group), Net(), Race(drop, group), []
    for step in range(steps):
        for p in net.parameters():
            p.grad = None
        mine = rows_of(step, rows=6 * n)[6 * rank : 6 * rank + 6]
        done = 0
        for x in race.run(mine.split(2)):
            if rank in late[step]:
                time.sleep(0.15 * (1 + late[step].index(rank)))
            loss_of(net, x, summed=True).backward()
            done += len(x)
        rows, dropped = race.finish(net.parameters(), done)
        seen.append((rows, dropped, done, gradients(net)))
    return seen


@pytest.mark.parametrize("drop, late", [(1, [[3], [0], [2]]), (2, [[1, 3], [0, 2], [2, 1]]), (3, [[0, 1, 3]] * 3)])
def test_the_slowest_are_dropped_and_the_mean_is_of_the_others(ranks_of, drop, late):
    got = ranks_of(4).run(raced, drop, late, quiet=True)
    for step in range(3):
        alone, x = Net(), rows_of(step)
        kept = [r for r in range(4) if r not in late[step]]
        loss_of(alone, torch.cat([x[6 * r : 6 * r + 6] for r in kept])).backward()
        for rank, one in enumerate(got):
            rows, dropped, done, found = one[step]
            assert rows == 6 * len(kept) and dropped == sorted(late[step])
            assert done == 6 if rank in kept else done <= 4  # stopped within a micro-batch
            same(found, gradients(alone), f"step {step}, rank {rank}")


def test_nobody_is_dropped_where_drop_is_0_and_groups_race_by_themselves(ranks_of):
    for got in ranks_of(4).run(raced, 0, [[1], [], [3]], quiet=True):
        assert [(rows, dropped) for rows, dropped, *_ in got] == [(24, [])] * 3

    def in_pairs():
        group = [group_of([0, 2]), group_of([1, 3])][dist.get_rank() % 2]
        return raced(1, [[0], [1], [0]], n=2, group=group)

    for got in ranks_of(4).run(in_pairs, quiet=True):
        assert [(rows, dropped) for rows, dropped, *_ in got] == [(6, [0]), (6, [1]), (6, [0])]


def test_a_race_does_not_wait_for_the_slowest(ranks_of):
    """Rank 3 would sleep 20 × 50 ms; the others are through at once."""

    def run():
        rank, net, race = dist.get_rank(), Net(), Race(1)
        dist.barrier()
        start = time.perf_counter()
        for _ in race.run(range(20)):
            time.sleep(0.05 if rank == 3 else 0)
        loss_of(net, rows_of(0), summed=True).backward()
        race.finish(net.parameters(), ROWS)
        return time.perf_counter() - start

    assert max(ranks_of(4).run(run, quiet=True)) < 0.5


class Device(threading.Thread):
    """A stand-in for a GPU: it does in order what it is told, and whoever tells it goes on at once."""

    def __init__(self):
        super().__init__(daemon=True)
        self.orders = queue.Queue()
        self.start()

    def run(self):
        while True:
            time.sleep(self.orders.get())
            self.orders.task_done()


@pytest.mark.parametrize("late", [0, 3])
def test_a_race_on_a_device_that_works_asynchronously(ranks_of, late):
    """Each micro-batch is ordered in no time, and takes the late rank's device eight times as long as the others'."""

    def run():
        rank, net, race, device, seen = dist.get_rank(), Net(), Race(1), Device(), []
        before, uneven.wait_for_device = uneven.wait_for_device, device.orders.join
        loss_of(net, rows_of(0), summed=True).backward()
        try:
            for _ in range(3):
                dist.barrier()
                start = time.perf_counter()
                for _ in race.run(range(5)):
                    device.orders.put(0.16 if rank == late else 0.02)
                device.orders.join()
                seen.append((race.finish(net.parameters(), ROWS)[1], time.perf_counter() - start))
        finally:
            uneven.wait_for_device = before
        return seen

    for rank in ranks_of(4).run(run, quiet=True):
        assert [dropped for dropped, _ in rank] == [[late]] * 3
        assert max(seconds for _, seconds in rank) < 0.6  # the late rank's five would take 0.8


def test_balancer_and_race_wait_for_a_gpu_only_where_one_is_in_use(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    for there, used, want in ((False, False, []), (True, False, []), (True, True, [1])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        uneven.wait_for_device()
        assert waited == want


def test_bad_races_are_named(ranks_of):
    for drop in (4, -1, 0.5):
        with refused(f"drop is how many of 4 ranks may be late, 0 to 3, not {drop}"):
            ranks_of(4).run(lambda drop=drop: Race(drop), quiet=True)
