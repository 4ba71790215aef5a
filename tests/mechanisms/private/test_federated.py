"""Federated averaging: against one process that imitates every client, against plain SGD, against torch's averaging."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.utils import average_parameters as torchs_average

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.private import coordinate_median, draw_clients, federated_round, train_locally, trimmed_mean
from tests.mechanisms.nets import Net, fails, same, state

ROWS = (1, 12, 3, 30, 7, 5, 2, 18, 9, 4)  # of ten clients


def data_of(client, dtype=torch.float64):
    """Unequal in number, and skewed: every client's rows lie around a place of its own."""
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(ROWS[client % len(ROWS)], 6, generator=generator, dtype=torch.float64) + client % 3
    return x.to(dtype), x.roll(1, 1).to(dtype)


def squares(got, want):
    return (got - want).square().sum(1).mean()


def local(epochs, batch, lr=0.02, seed=5):
    def train(model, x, y, client):
        generator = torch.Generator().manual_seed(100 * seed + client)
        train_locally(model, squares, x, y, epochs=epochs, batch=batch, lr=lr, generator=generator)

    return train


def federated(clients, rounds, share, train, dtype=torch.float64, aggregate=None, group=None, dealt=None):
    """On a rank: some rounds, from the same model on all ranks; every rank hosts its clients only."""
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    model = Net(0, dtype)
    mine = {c: data_of(c, dtype) for c in range(clients) if (dealt[c] if dealt else c % n) == rank}
    for r in range(rounds):
        federated_round(model, mine, draw_clients(clients, share, r), train, aggregate=aggregate, group=group)
    return state(model)


def imitated(clients, rounds, share, train, dtype=torch.float64, aggregate=None):
    """All clients in one process, each with a copy of the model."""
    model = Net(0, dtype)
    for r in range(rounds):
        chosen = draw_clients(clients, share, r)
        copies = {c: copy.deepcopy(model) for c in chosen}
        for c, one in copies.items():
            train(one, *data_of(c, dtype), c)
        total = sum(len(data_of(c)[0]) for c in chosen)
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            all_of_it = torch.stack([dict(one.named_parameters())[name].detach() for one in copies.values()])
            weights = torch.tensor([len(data_of(c)[0]) / total for c in chosen], dtype=dtype)
            before = p.detach().clone()
            mean = torch.einsum("c,c...->...", weights, all_of_it)
            p.data.copy_(mean if aggregate is None else before + aggregate(all_of_it - before))
    return state(model)


# ---- against one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("clients, share, epochs, batch", [(10, 0.5, 2, 4), (8, 1.0, 1, None), (9, 0.1, 3, 5)])
def test_rounds_equal_all_clients_in_one_process(ranks_of, n, clients, share, epochs, batch):
    train = local(epochs, batch)
    want = imitated(clients, 5, share, train)
    for rank, got in enumerate(ranks_of(4).run(in_world, n, federated, clients, 5, share, train, quiet=True)[:n]):
        same(got, want, what=f"rank {rank}")


def test_float32_groups_and_clients_on_one_rank_only(ranks_of):
    def several():
        yield federated(10, 4, 0.5, local(2, 4), torch.float32)
        yield federated(10, 4, 0.5, local(2, 4), group=[group_of([0, 2]), group_of([1, 3])][dist.get_rank() % 2])
        yield federated(10, 4, 0.5, local(2, 4), dealt=[2] * 10)

    for found in ranks_of(4).run(lambda: list(several()), quiet=True):
        same(found[0], imitated(10, 4, 0.5, local(2, 4), torch.float32), 1e-5, 1e-6)
        for got in found[1:]:
            same(got, imitated(10, 4, 0.5, local(2, 4)))


def test_one_local_step_on_all_rows_is_one_process_on_all_data(ranks_of):
    """FedSGD, 20 rounds: plain SGD on the union of unequal, skewed clients' rows."""
    model = Net(0)
    x, y = (torch.cat(parts) for parts in zip(*map(data_of, range(10)), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        squares(model(x), y).backward()
        optimizer.step()
    for got in ranks_of(4).run(federated, 10, 20, 1.0, local(1, None, 0.01), quiet=True):
        same(got, state(model))


def test_equal_clients_one_a_rank_are_torchs_averaging(ranks_of):
    def both():
        rank, models = dist.get_rank(), [Net(0), Net(0)]
        mine = {rank: tuple(t[:5] for t in data_of(3 if rank else 1))}
        train = local(2, 2)
        for _ in range(5):
            federated_round(models[0], mine, range(4), train)
            train(models[1], *mine[rank], rank)
            torchs_average((p for p in models[1].parameters() if p.requires_grad), dist.group.WORLD)
        return [state(model) for model in models]

    for ours, theirs in ranks_of(4).run(both, quiet=True):
        same(ours, theirs)


def test_updates_come_back_and_buffers_stay(ranks_of):
    def one():
        model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).double()
        nn.init.eye_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        before = state(model)
        mine = {c: data_of(c) for c in (1, 3, 4, 7) if c % 4 == dist.get_rank()}
        updates = federated_round(model, mine, [1, 3, 4, 7], local(1, None))
        return before, updates, state(model)

    results = ranks_of(4).run(one, quiet=True)
    assert [sorted(r[1]) for r in results] == [[4], [1], [], [3, 7]]
    for before, updates, after in results:
        assert all(update.shape == (54,) and update.any() for update in updates.values())
        assert not torch.equal(before["0.weight"], after["0.weight"])
        assert all(torch.equal(before[name], after[name]) for name in before if "running" in name or "num" in name)


def test_payload(ranks_of):
    size = sum(p.numel() * 8 for p in Net(0).parameters() if p.requires_grad)
    trace = ranks_of(4).trace(federated, 10, 1, 0.5, local(1, None), quiet=True)
    assert {trace.bytes(None, r) for r in range(4)} == {size + 8 + 4 * 5}  # and who hosts whom
    trace = ranks_of(4).trace(federated, 10, 1, 0.5, local(1, None), aggregate=coordinate_median, quiet=True)
    assert {trace.bytes(None, r) for r in range(4)} == {5 * size + 4 * 5}
    assert {e.name for e in trace.collectives} == {"all_reduce"}


# ---- who takes part -------------------------------------------------------------------------------------------


def test_drawing_clients():
    for clients, share, many in [(10, 0.5, 5), (10, 0.01, 1), (10, 1.0, 10), (100, 0.29, 29), (3, 0.34, 1)]:
        for round in range(5):
            drawn = draw_clients(clients, share, round)
            assert len(drawn) == len(set(drawn)) == many and drawn == sorted(drawn) and drawn[-1] < clients
    assert draw_clients(50, 0.2, 3) == draw_clients(50, 0.2, 3) != draw_clients(50, 0.2, 4)
    assert draw_clients(50, 0.2, 3, seed=1) != draw_clients(50, 0.2, 3)
    counts = torch.zeros(10)
    for round in range(2000):
        counts[draw_clients(10, 0.3, round)] += 1
    assert counts.min() > 500 and counts.max() < 700  # 600 ± 20


# ---- robust means ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", [coordinate_median, lambda u: trimmed_mean(u, 2)])
def test_robust_rounds_equal_one_process(ranks_of, aggregate):
    train = local(2, 4)
    want = imitated(10, 3, 0.8, train, aggregate=aggregate)
    for got in ranks_of(4).run(federated, 10, 3, 0.8, train, aggregate=aggregate, quiet=True):
        same(got, want)


@pytest.mark.parametrize("k", [1, 2, 3, 8, 9])
def test_median_and_trimmed_mean(k):
    updates = torch.randn(k, 50, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    assert torch.allclose(coordinate_median(updates), updates.quantile(0.5, 0), 1e-12, 1e-12)
    assert torch.allclose(trimmed_mean(updates, 0), updates.mean(0), 1e-12, 1e-12)
    for trim in range(1, (k - 1) // 2 + 1):
        by_hand = torch.stack([column.sort()[0][trim : k - trim].mean() for column in updates.T])
        assert torch.allclose(trimmed_mean(updates, trim), by_hand, 1e-12, 1e-12)


def test_liars_cannot_leave_the_honest_values():
    generator = torch.Generator().manual_seed(0)
    honest = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    for lie in (1e9, -1e9, float("inf"), -float("inf")):
        lied = torch.cat([honest, torch.full((2, 40), lie, dtype=torch.float64)])
        for robust in (coordinate_median(lied), trimmed_mean(lied, 2)):
            assert (robust >= honest.amin(0)).all() and (robust <= honest.amax(0)).all()
        assert lied.mean(0).abs().min() > 1e8


# ---- bad input ------------------------------------------------------------------------------------------------


def test_bad_input_is_named(ranks_of):
    ranks, train = ranks_of(4), local(1, None)
    empty = (torch.zeros(0, 6, dtype=torch.float64),) * 2

    def hosting(where, chosen=(0, 1, 2, 3), bad=None):
        return lambda rank: federated_round(
            Net(0), {c: bad if bad and c == 2 else data_of(c) for c in where[rank]}, list(chosen), train
        )

    alone = [[0, 1, 2, 3]] * 4
    fails(ranks, "client 2 has no data", hosting(alone, bad=empty), n=1)
    fails(ranks, "client 2 has 1 rows and 12 labels", hosting(alone, bad=(data_of(0)[0], data_of(1)[1])), n=1)
    fails(ranks, "client 1 is on 2 ranks", hosting([[0], [1], [1, 2], [3]]))
    fails(ranks, "client 3 is on 0 ranks", hosting([[0], [1], [2], []]))
    fails(ranks, "different clients, at least one, not []", hosting(alone, []))
    fails(ranks, "different clients, at least one, not [1, 1]", hosting(alone, [1, 1]))
    with pytest.raises(ValueError, match="a client with no data cannot train"):
        train_locally(Net(0), squares, *empty)
    for share in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"above 0 and at most 1, not {share}"):
            draw_clients(4, share, 0)
    with pytest.raises(ValueError, match="there is nobody to draw"):
        draw_clients(0, 1, 0)
    for trim in (-1, 2, 5):
        with pytest.raises(ValueError, match=f"{trim} cut off at either end of 4"):
            trimmed_mean(torch.zeros(4, 2), trim)
