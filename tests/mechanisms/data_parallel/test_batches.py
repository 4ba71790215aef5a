"""Batches of unequal length: weights, and ranks that run out, against one process with all rows."""

from collections import namedtuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.data_parallel.batches import rows_of, tensors_with_rows, without_rows
from tests.mechanisms.data_parallel.nets import WORLDS, Net, batch, on_all, optimizer_of, same, state, within
from tests.mechanisms.refusals import refused


def train_joined(name, norm, sizes_of_rank, **options):
    """Step t takes sizes_of_rank[rank][t] rows on each rank, as far as there are any."""
    rank = dist.get_rank()
    model = DataParallel(Net(seed=rank, norm=norm), **options)
    optimizer = optimizer_of(name, model)
    batches = [{"x": x, "y": [y]} for x, y in shards(sizes_of_rank)[rank]]
    for part, weight in model.join(batches):
        optimizer.zero_grad()
        (weight * cross_entropy(model(part["x"]), part["y"][0])).backward()
        optimizer.step()
    return state(model)


def shards(sizes_of_rank):
    """[rank][step] of (x, y): the rows of one batch a step, dealt out."""
    shards = [[] for _ in sizes_of_rank]
    for step in range(max(map(len, sizes_of_rank))):
        sizes = [sizes[step] if step < len(sizes) else 0 for sizes in sizes_of_rank]
        x, y = batch(step, sum(sizes))
        for rank, part in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
            if step < len(sizes_of_rank[rank]):
                shards[rank].append(part)
    return shards


@pytest.mark.parametrize("n", WORLDS)
@pytest.mark.parametrize("norm", [False, True])
def test_ranks_that_run_out_of_data(ranks_of, n, norm):
    sizes = [[3] * 5 + [2], [3] * 5, [2] * 2, [3] * 4 + [1]][:n]
    for name in ("sgd", "adamw"):
        alone = Net(norm=norm)
        optimizer = optimizer_of(name, alone)
        by_rank = shards(sizes)
        for step in range(max(map(len, sizes))):
            parts = [rank[step] for rank in by_rank if step < len(rank)]
            x, y = (torch.cat(t) for t in zip(*parts, strict=True))
            optimizer.zero_grad()
            cross_entropy(alone(x), y).backward()
            optimizer.step()
        got = ranks_of(4).run(within, n, train_joined, name, norm, sizes, quiet=True)
        same(on_all(got, n), state(alone))


def weights():
    rank, model = dist.get_rank(), DataParallel(Net())
    return model.weight([4, 4, 4, 1][rank]), model.weight(7), model.weight(0), model.weight(torch.tensor(0.5 + rank))


def test_weights(ranks_of):
    trace = ranks_of(4).trace(weights)
    assert trace.results == [(4 * rows / 13, 1.0, 0.0, 0.5 * (i + 0.5)) for i, rows in enumerate((4, 4, 4, 1))]
    assert trace.bytes("all_reduce", 0) == 4 * 8


def no_batch_at_all():
    model = DataParallel(Net())
    return list(model.join(list(batch(0, 3)[0].split(1))[dist.get_rank() :][:1]))


def no_tensors():
    return list(DataParallel(Net()).join([3, 4]))


def negative_rows():
    DataParallel(Net()).weight(-1)


def with_other_things():
    """Batches with a number in them; and in evaluation a rank may have no rows."""
    rank, model = dist.get_rank(), DataParallel(nn.Linear(6, 2))
    batches = [{"epoch": torch.tensor(3), "x": torch.ones(2, 6)}] * (1 + rank % 2)
    seen = [(part["epoch"].item(), len(part["x"]), weight) for part, weight in model.join(batches)]
    with torch.no_grad():
        return seen, len(model(torch.ones(3, 6).tensor_split(4)[rank]))


def test_batches_with_other_things_in_them(ranks_of):
    for rank, (seen, rows) in enumerate(ranks_of(4).run(with_other_things, quiet=True)):
        assert seen == [(3, 2, 1.0), (3, 2, 2.0) if rank % 2 else (3, 0, 0.0)] and rows == (rank < 3)


BAD = [
    (no_batch_at_all, "1 of 4 ranks have no batch at all"),
    (no_tensors, "join needs batches with tensors in them, not int"),
    (negative_rows, "rows is how many rows this rank has, 0 or more, not -1"),
]


@pytest.mark.parametrize("wrong, said", BAD, ids=[wrong.__name__ for wrong, _ in BAD])
def test_bad_input_is_named(ranks_of, wrong, said):
    with refused(said):
        ranks_of(4).run(wrong, quiet=True)


Pair = namedtuple("Pair", "x y")


def test_rows_of_a_batch():
    """The first dimension of the first tensor that has one; without rows, the rest of the batch stays as it is."""
    x, y, number = torch.ones(3, 6), torch.zeros(3), torch.tensor(7)
    for whole in (x, [x, y], (number, x), {"n": 5, "x": [x]}, Pair(x, {"y": y})):
        assert rows_of(whole) == 3 and tensors_with_rows(whole)[0] is x
        empty = without_rows(whole)
        assert type(empty) is type(whole) and rows_of(empty) == 0
        assert [t.shape[1:] for t in tensors_with_rows(empty)] == [t.shape[1:] for t in tensors_with_rows(whole)]
    assert without_rows((number, "a"))[0] is number and tensors_with_rows([number, "a"]) == []
    assert not without_rows(x).untyped_storage().nbytes(), "the batch's memory is not kept for it"
