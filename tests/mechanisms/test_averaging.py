"""Averaging parameters, and local SGD: against one process, and against torch's own model averaging."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.averaging import LocalSGD, average_parameters
from tests.mechanisms.nets import OPTIMIZERS, STEPS, Net, fails, gradient_of, same, state

OUTER = {
    "Nesterov": lambda ps: torch.optim.SGD(ps, lr=0.7, momentum=0.9, nesterov=True),
    "plain": lambda ps: torch.optim.SGD(ps, lr=1.0),
}


def rows_of(rank, step, n, even=True):
    """This rank's part of one batch of 12 rows."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return batch.tensor_split(n)[rank] if even else batch.split(shares(n))[rank]


def shares(n):
    return {1: [12], 2: [9, 3], 3: [7, 4, 1], 4: [6, 3, 2, 1]}[n]


# ---- average_parameters ---------------------------------------------------------------------------------------


def averaged(weights=None, in_pairs=False, optimizer=None, dtype=torch.float64):
    """On a rank: a net of its own, after a step of its own; before, after, and the optimizer's state before, after."""
    rank = dist.get_rank()
    groups = [group_of([0, 2]), group_of([1, 3])] if in_pairs else [None]
    net = Net(rank, dtype)
    optimizer = OPTIMIZERS[optimizer](net.parameters()) if optimizer else None
    if optimizer:
        for step in range(rank + 1 if "AdamW" in str(optimizer) else 2):
            gradient_of(net, rows_of(rank, step, 4).to(dtype))
            optimizer.step()
    kept = state(net), held(net, optimizer)
    average_parameters(net, weights[rank] if isinstance(weights, tuple) else weights, groups[rank % len(groups)],
                       optimizer)  # fmt: skip
    return *kept, state(net), held(net, optimizer)


def held(net, optimizer):
    if optimizer is None:
        return {}
    return {f"{name} {key}": value.clone() for name, p in net.named_parameters()
            for key, value in optimizer.state.get(p, {}).items()}  # fmt: skip


TRAINED = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "again.weight", "again.bias", "unused.weight",
           "unused.bias", "extra.weight", "extra.bias")  # fmt: skip


def check_mean(results, weights, relative=1e-10, absolute=1e-10):
    total = sum(weights)
    for before, _, after, _ in results:
        for name in before:
            mean = sum(w / total * r[0][name] for w, r in zip(weights, results, strict=True))
            want = mean if name in TRAINED else before[name]
            assert torch.allclose(after[name], want, relative, absolute), name


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_mean_plain_and_weighted(ranks_of, n):
    ranks = ranks_of(4)
    check_mean(ranks.run(in_world, n, averaged, quiet=True)[:n], [1] * n)
    check_mean(ranks.run(in_world, n, averaged, shares(n), quiet=True)[:n], shares(n))  # a list, the same everywhere
    check_mean(ranks.run(in_world, n, averaged, tuple(shares(n)), quiet=True)[:n], shares(n))  # each its own number


def test_groups_and_float32(ranks_of):
    results = ranks_of(4).run(averaged, None, True, quiet=True)
    for pair in ([0, 2], [1, 3]):
        check_mean([results[r] for r in pair], [1, 1])
    check_mean(ranks_of(4).run(averaged, [3, 0, 1, 2], dtype=torch.float32, quiet=True), [3, 0, 1, 2], 1e-5, 1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_state_is_averaged_too(ranks_of, optimizer):
    weights = [1, 2, 3, 2]
    results = ranks_of(4).run(averaged, weights, optimizer=optimizer, quiet=True)
    check_mean(results, weights)
    for _, before, _, after in results:
        assert len(after) > 3 and any(value.numel() > 1 for value in after.values())
        for name, value in after.items():
            mean = sum(w / 8 * r[1][name] for w, r in zip(weights, results, strict=True))
            assert torch.allclose(value, before[name] if name.endswith("step") else mean, 1e-10, 1e-12), name


def test_payload(ranks_of):
    size = sum(p.numel() * 8 for p in Net(0).parameters() if p.requires_grad)
    momentum = sum(p.numel() * 8 for name, p in Net(0).named_parameters() if name.startswith(("fc", "again")))
    for call, more in [
        (partial(averaged), 0),
        (partial(averaged, [1, 2, 3, 4]), 0),
        (partial(averaged, (1, 2, 3, 4)), 8),
    ]:
        trace = ranks_of(4).trace(call, quiet=True)
        assert {trace.bytes("all_reduce", r) for r in range(4)} == {size + more}
        assert {e.name for e in trace.collectives} == {"all_reduce"}
    trace = ranks_of(4).trace(averaged, optimizer="SGD", quiet=True)
    assert {trace.bytes(None, r) for r in range(4)} == {size + momentum + 16}


def test_numpy_and_torch_numbers_are_weights(ranks_of):
    def mean(kind):
        net, rank = nn.Linear(1, 1, bias=False), dist.get_rank()
        net.weight.data.fill_(rank)
        average_parameters(net, {
            "NumPy's": np.int64(rank + 1), "torch's": torch.tensor(rank + 1), "an array": np.arange(1, 5),
        }[kind])  # fmt: skip
        return net.weight.item()

    for kind in ("NumPy's", "torch's", "an array"):
        assert ranks_of(4).run(mean, kind, quiet=True) == pytest.approx([2.0] * 4)  # (0 + 2 + 6 + 12) / 10


def test_a_rank_that_weighs_nothing_has_no_influence(ranks_of):
    """Not even where its training has come to nothing: 0 times NaN would be NaN on all ranks."""

    def diverged():
        net, rank = nn.Linear(1, 1, bias=False), dist.get_rank()
        net.weight.data.fill_(math.nan if rank == 1 else rank)
        average_parameters(net, 0 if rank == 1 else 2)
        return net.weight.item()

    assert ranks_of(4).run(diverged, quiet=True) == pytest.approx([5 / 3] * 4)


def test_dtypes_are_kept(ranks_of):
    def mixed():
        net = nn.Sequential(
            nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float64)
        )
        for p in net.parameters():
            p.data.fill_(dist.get_rank())
        average_parameters(net)
        return [(str(p.dtype), p.unique().tolist()) for p in net.parameters()]

    for found in ranks_of(4).run(mixed, quiet=True):
        assert found == [(f"torch.{d}", [1.5]) for d in ("bfloat16", "float32", "float64") for _ in range(2)]


# ---- local SGD against one process ----------------------------------------------------------------------------


def local(steps, optimizer, every, even=True, outer=None, average_state=False):
    """On a rank: weights of its own at the start; returns what it has at the end."""
    rank, n = dist.get_rank(), dist.get_world_size()
    net = Net(rank)
    weights = None if even else shares(n)
    run = LocalSGD(net, OPTIMIZERS[optimizer](net.parameters()), every, weights, average_state=average_state,
                   outer=OUTER.get(outer))  # fmt: skip
    for step in range(steps):
        gradient_of(net, rows_of(rank, step, n, even))
        run.step()
    return state(net), run.averages


def alone(steps, optimizer):
    net = Net(0)
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    for step in range(steps):
        gradient_of(net, rows_of(0, step, 1))
        optimizer.step()
    return state(net)


def imitated(steps, optimizer, every, n, even=True, outer=None, average_state=False):
    """All ranks in one process."""
    nets = [Net(0) for _ in range(n)]
    optimizers = [OPTIMIZERS[optimizer](net.parameters()) for net in nets]
    weights = [1 / n] * n if even else [s / 12 for s in shares(n)]
    start = [p.detach().clone() for p in nets[0].parameters() if p.requires_grad]
    momentum = [torch.zeros_like(s) for s in start]
    for step in range(1, steps + 1):
        for rank, net in enumerate(nets):
            gradient_of(net, rows_of(rank, step - 1, n, even))
            optimizers[rank].step()
        if step % every:
            continue
        theirs = [[p for p in net.parameters() if p.requires_grad] for net in nets]
        for i, ps in enumerate(zip(*theirs, strict=True)):
            mean = sum(w * p.detach() for w, p in zip(weights, ps, strict=True))
            if outer == "Nesterov":  # Sutskever et al. 2013, as torch writes it
                gap = start[i] - mean
                momentum[i] = 0.9 * momentum[i] + gap
                mean = start[i] - 0.7 * (gap + 0.9 * momentum[i])
            start[i] = mean.clone()
            for p in ps:
                p.data.copy_(mean)
            if average_state:
                states = [o.state[p] for o, p in zip(optimizers, ps, strict=True)]
                for key in set(states[0]) - {"step"}:
                    value = sum(w * s[key] for w, s in zip(weights, states, strict=True))
                    for s in states:
                        s[key].copy_(value)
    return [state(net) for net in nets]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("even", [True, False])
def test_sgd_averaged_every_step_equals_one_process(ranks_of, n, even):
    """With momentum and weight decay, whose buffers nobody exchanges; uneven shards weighted by their rows."""
    want = alone(STEPS, "SGD")
    for got, averages in ranks_of(4).run(in_world, n, local, STEPS, "SGD", 1, even, quiet=True)[:n]:
        same(got, want)
        assert averages == STEPS


def test_adam_averaged_every_step_does_not_not_even_with_its_state(ranks_of):
    want = alone(STEPS, "AdamW")
    for average_state in (False, True):
        got, _ = ranks_of(4).run(local, STEPS, "AdamW", 1, average_state=average_state, quiet=True)[0]
        assert max((got[name] - want[name]).abs().max() for name in want) > 1e-3


CASES = [
    ("SGD", 4, True, None, False), ("AdamW", 4, False, None, False), ("AdamW", 3, True, None, True),
    ("SGD", 5, False, "Nesterov", False), ("AdamW", 5, True, "Nesterov", False), ("SGD", 3, True, "plain", True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("n", [2, 4])
def test_local_sgd_equals_all_ranks_in_one_process(ranks_of, n, case):
    results = ranks_of(4).run(in_world, n, local, STEPS, *case[:2], *case[2:4], case[4], quiet=True)[:n]
    for rank, (want, (got, averages)) in enumerate(zip(imitated(STEPS, *case[:2], n, *case[2:]), results, strict=True)):
        same(got, want, what=f"rank {rank}")
        assert averages == STEPS // case[1]


def test_one_shot_average(ranks_of):
    def once():
        net = Net(0)
        run = LocalSGD(net, OPTIMIZERS["SGD"](net.parameters()), every=None)
        for step in range(6):
            run.zero_grad()
            gradient_of(net, rows_of(dist.get_rank(), step, 4))
            run.step()
        run.average()
        return state(net), run.averages

    want = imitated(6, "SGD", 6, 4)[0]
    for got, averages in ranks_of(4).run(once, quiet=True):
        same(got, want)
        assert averages == 1


def test_training_goes_on_from_a_checkpoint(ranks_of):
    """Parameters, momentum, and the outer optimizer's momentum: the same as without a stop."""

    def steps(net, inner, first, last, load=None):
        run = LocalSGD(net, inner, 5, outer=OUTER["Nesterov"])
        if load:
            run.outer.load_state_dict(load)
        for step in range(first, last):
            gradient_of(net, rows_of(dist.get_rank(), step, 4))
            run.step()
        return run

    def stops(at):
        net = Net(0)
        inner = OPTIMIZERS["SGD"](net.parameters())
        run = steps(net, inner, 0, at)
        kept = [copy.deepcopy(one.state_dict()) for one in (net, inner, run.outer)]
        net = Net(7)
        net.load_state_dict(kept[0])
        inner = OPTIMIZERS["SGD"](net.parameters())
        inner.load_state_dict(kept[1])
        steps(net, inner, at, STEPS, kept[2])
        return state(net)

    for got, want in zip(ranks_of(4).run(stops, 10, quiet=True), imitated(STEPS, "SGD", 5, 4, outer="Nesterov"),
                         strict=True):  # fmt: skip
        same(got, want)


# ---- against torch's own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("every", [1, 4])
def test_local_sgd_equals_torchs_model_averaging(ranks_of, optimizer, every):
    def both():
        rank, nets = dist.get_rank(), [Net(0), Net(0)]
        mine = LocalSGD(nets[0], OPTIMIZERS[optimizer](nets[0].parameters()), every)
        # torch's averages after steps 0, every, 2·every, …: warmup_steps moves that to ours
        averager = PeriodicModelAverager(period=every, warmup_steps=every - 1)
        theirs = PostLocalSGDOptimizer(OPTIMIZERS[optimizer](nets[1].parameters()), averager)
        for step in range(STEPS):
            for net, stepper in zip(nets, (mine, theirs), strict=True):
                gradient_of(net, rows_of(rank, step, 4))
                stepper.step()
        return [state(net) for net in nets]

    for mine, theirs in ranks_of(4).run(both, quiet=True):
        same(mine, theirs)


# ---- bad input ------------------------------------------------------------------------------------------------


def test_bad_input_is_named(ranks_of):
    ranks = ranks_of(4)
    fails(ranks, "3 weights for 4 ranks", lambda r: average_parameters(Net(0), [1, 2, 3]))
    fails(ranks, "0 or more and finite, not [1.0, 2.0, 3.0, -2.0]", lambda r: average_parameters(Net(0), [1, 2, 3, -2]))
    for wrong in (math.nan, math.inf, -1):  # on one rank: all of them say so
        fails(ranks, "a weight is a number of rows", lambda r, w=wrong: average_parameters(Net(0), w if r == 2 else 1))
    fails(ranks, "0 or more and finite, not 1e+308", lambda r: average_parameters(Net(0), 1e308))
    fails(ranks, "0 or more and finite, not [1e+308", lambda r: average_parameters(Net(0), [1e308] * 4))
    fails(ranks, "parameters are not the module's",
          lambda r: average_parameters(Net(0), optimizer=torch.optim.SGD(Net(1).parameters())))  # fmt: skip
    fails(ranks, "all weights are 0", lambda r: average_parameters(Net(0), 0))
    fails(ranks, "all weights are 0", lambda r: average_parameters(Net(0), [0, 0, 0, 0]))
    fails(ranks, "1 or more, or None, not 0", lambda r: LocalSGD(Net(0), None, 0))
    fails(ranks, "nothing to train", lambda r: LocalSGD(Net(0).requires_grad_(False), None, 1))
    fails(ranks, "parameters are not the module's", lambda r: LocalSGD(Net(0), torch.optim.SGD(Net(1).parameters()), 1))

    def some_have_stepped(rank):
        net = Net(0)
        optimizer = OPTIMIZERS["SGD"](net.parameters())
        if rank:
            gradient_of(net, rows_of(rank, 0, 4))
            optimizer.step()
        average_parameters(net, optimizer=optimizer)

    fails(ranks, "the optimizer's state differs in kind between ranks", some_have_stepped)
