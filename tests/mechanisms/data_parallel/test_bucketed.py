"""Averaging in few lines: against one process, against DistributedDataParallel, and to the byte."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from pardist_lib.lessons.worlds import group_of
from pardist_lib.mechanisms.data_parallel import BucketedDataParallel, naive_average
from tests.mechanisms.data_parallel.nets import (
    TINY,
    WORLDS,
    Net,
    batch,
    gradients,
    on_all,
    one_step,
    same,
    train,
    train_alone,
    trainable_bytes,
    within,
)
from tests.mechanisms.refusals import refused


def naive():
    rank, model = dist.get_rank(), Net()
    x, y = (t.chunk(4)[rank] for t in batch(0))
    cross_entropy(model(x), y).backward()
    naive_average(model)
    return gradients(model)


def test_the_naive_version(ranks_of):
    alone, (x, y) = Net(), batch(0)
    cross_entropy(alone(x), y).backward()
    same(on_all(ranks_of(4).run(naive, quiet=True), 4), gradients(alone))


@pytest.mark.parametrize("n", WORLDS)
@pytest.mark.parametrize("mb", [TINY, 25])
def test_a_step_equals_one_process_and_ddp(ranks_of, n, mb):
    alone, (x, y) = Net(), batch(0)
    x.requires_grad_()
    output = alone(x)
    loss = cross_entropy(output, y)
    loss.backward()
    for kind, options in ((BucketedDataParallel, {"bucket_mb": mb}), (DistributedDataParallel, {})):
        ran = ranks_of(4).run(within, n, one_step, kind, torch.float64, quiet=True, **options)[:n]
        outputs, losses, inputs, grads = zip(*ran, strict=True)
        got = {"output": torch.cat(outputs), "loss": sum(losses) / n, "input": torch.cat(inputs) / n}
        same(got, {"output": output.detach(), "loss": loss.detach(), "input": x.grad}, what=kind.__name__)
        for one in grads:
            same(one, gradients(alone), what=kind.__name__)


@pytest.mark.parametrize("n", WORLDS)
def test_twenty_steps_equal_one_process_and_ddp(ranks_of, n):
    for name in ("sgd", "adamw"):
        ours = on_all(ranks_of(4).run(within, n, train, BucketedDataParallel, name, bucket_mb=TINY, quiet=True), n)
        same(ours, train_alone(name))
        same(ours, on_all(ranks_of(4).run(within, n, train, DistributedDataParallel, name, quiet=True), n))


@pytest.mark.parametrize("n", WORLDS)
def test_bytes_and_calls_of_a_step(ranks_of, n):
    """S bytes on every rank; in one call for each bucket."""
    size = trainable_bytes(Net())
    for mb, calls in ((25, 1), (TINY, 5)):
        trace = ranks_of(4).trace(within, n, one_step, BucketedDataParallel, torch.float64, bucket_mb=mb)
        assert [trace.bytes("all_reduce", rank) for rank in range(n)] == [size] * n
        made = [sum(e.name == "all_reduce" and e.rank == rank for e in trace.collectives) for rank in range(4)]
        assert made == [calls] * n + [0] * (4 - n)


def starts(layers, order):
    """The buckets' numbers in the order in which they start; and how many had when the first layer was reached."""
    model, started, early = BucketedDataParallel(layers, bucket_mb=TINY), [], []

    def all_reduce(flat, real=dist.all_reduce, **options):
        started.append(next(b.index for b in model.buckets if b.flat is flat))
        return real(flat, **options)

    layers[order[0]].weight.register_hook(lambda gradient: early.append(len(started)))
    x = torch.randn(3, 4, dtype=torch.float64)
    for i in order:
        x = layers[i](x)
    with patch.object(dist, "all_reduce", all_reduce):
        x.square().mean().backward()
    assert started == list(range(len(model.buckets)))
    return early[0], len(started)


def in_their_own_order():
    layers = nn.ModuleList([nn.Linear(4, 4, dtype=torch.float64) for _ in range(4)])
    return starts(layers, [0, 1, 2, 3] if dist.get_rank() % 2 else [3, 1, 0, 2])


def in_one_order():
    return starts(nn.ModuleList([nn.Linear(4, 4, dtype=torch.float64) for _ in range(4)]), [0, 1, 2, 3])


def test_the_order_of_buckets_does_not_depend_on_who_is_ready_first(ranks_of):
    assert all(count > 3 for _, count in ranks_of(4).run(in_their_own_order, quiet=True))


def test_buckets_travel_while_backward_computes(ranks_of):
    assert all(early >= count - 1 > 2 for early, count in ranks_of(4).run(in_one_order, quiet=True))


def backward_twice():
    """In pairs, and without zero_grad."""
    rank, groups = dist.get_rank(), [group_of([0, 2]), group_of([1, 3])]
    model = BucketedDataParallel(Net(seed=rank), groups[rank % 2])
    for step in range(2):
        x, y = (t.chunk(4)[rank] for t in batch(step))
        cross_entropy(model(x), y).backward()
    assert all(p.grad is view for b in model.buckets for p, view in zip(b.parameters, b.views, strict=True))
    return gradients(model)


def test_two_backwards_add_up_in_a_group_of_some_ranks(ranks_of):
    got = ranks_of(4).run(backward_twice, quiet=True)
    for members in ([0, 2], [1, 3]):
        alone = Net(seed=members[0])
        for step in range(2):
            x, y = batch(step)
            for rank in members:
                (cross_entropy(alone(x.chunk(4)[rank]), y.chunk(4)[rank]) / 2).backward()
        for rank in members:
            same(got[rank], gradients(alone))


def unreached():
    BucketedDataParallel(Net(), bucket_mb=TINY)(batch(0)[0], extra=False).sum().backward()


def test_parameters_that_a_backward_does_not_reach(ranks_of):
    with refused("buckets lack a gradient in this backward: see DataParallel"):
        ranks_of(4).run(unreached, quiet=True)
