"""Compressed gradients: against the arithmetic of one process, against torch's own hooks, and to the byte."""

import io
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.compression import PowerSGD, TopK, half_precision
from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.data_parallel.buckets import fill_buckets

SHAPES = [(6, 4), (5,), (8, 2, 3), (2, 2)]


def gradients(rank, step, dtype=torch.float64):
    numbers = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype) for shape in SHAPES]


def within(n, fn, *args):
    return in_world(n, lambda: fn(*args))


def hooked(make, steps, dtype=torch.float64):
    """The bucket after each step's hook, as DataParallel would call it."""
    rank, n, hook = dist.get_rank(), dist.get_world_size(), make()
    [bucket] = fill_buckets([nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES])
    after = []
    for step in range(steps):
        for view, g in zip(bucket.views, gradients(rank, step, dtype), strict=True):
            view.copy_(g / n)
        hook(bucket, None)()
        after.append([view.clone() for view in bucket.views])
    return after


def run(ranks_of, n, *args):
    """Each step's gradients, which have to be equal on all ranks to the bit."""
    results = ranks_of(4).run(within, n, hooked, *args, quiet=True)[:n]
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    return results[0]


def close(got, want, tolerance=1e-10):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- half precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype, digits", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_half_precision(ranks_of, n, dtype, digits):
    [got] = run(ranks_of, n, lambda: half_precision(dtype), 1, torch.float32)
    exact = [sum(gs) / n for gs in zip(*(gradients(rank, 0) for rank in range(n)), strict=True)]
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.float32 and (a == a.to(dtype).float()).all()
        torch.testing.assert_close(a.double(), b, rtol=digits, atol=digits)


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def backward(model, step):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))
    model.zero_grad()
    model(x.to(next(model.parameters()).dtype)).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def beside_torchs_half():
    theirs = DistributedDataParallel(Net())
    theirs.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return backward(DataParallel(Net(), comm_hook=half_precision()), 0), backward(theirs, 0)


def test_half_precision_equals_torchs(ranks_of):
    for ours, theirs in ranks_of(4).run(beside_torchs_half, quiet=True):
        close(ours, theirs, 1e-3)


# ---- the largest ones -----------------------------------------------------------------------------------------


def top_k(ratio, n, steps, feedback=True):
    """The same in one process that has all ranks' gradients."""
    left, after = [0] * n, []
    for step in range(steps):
        total = 0
        for rank in range(n):
            flat = torch.cat([g.flatten() for g in gradients(rank, step)]) / n + left[rank]
            k = max(1, int(ratio * len(flat)))
            sent = torch.where(flat.abs() >= flat.abs().sort()[0][-k], flat, 0)
            left[rank] = (flat - sent) if feedback else 0
            total = total + sent
        parts = total.split([torch.Size(shape).numel() for shape in SHAPES])
        after.append([part.view(shape) for part, shape in zip(parts, SHAPES, strict=True)])
    return after


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("ratio, feedback", [(0.1, True), (0.1, False), (0.001, True), (1, True)])
def test_top_k(ranks_of, n, ratio, feedback):
    got = run(ranks_of, n, lambda: TopK(ratio, feedback), 4)
    for a, b in zip(got, top_k(ratio, n, 4, feedback), strict=True):
        close(a, b)


def test_what_top_k_leaves_out_comes_later(ranks_of):
    """Gradients that stay the same: with error feedback the mean over time becomes right, without it never does."""

    def constant(feedback):
        rank, hook = dist.get_rank(), TopK(0.1, feedback)
        [bucket] = fill_buckets([nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES])
        total = 0
        for _ in range(200):
            for view, g in zip(bucket.views, gradients(rank, 0), strict=True):
                view.copy_(g / 4)
            hook(bucket, None)()
            total = total + bucket.flat
        return total / 200

    exact = sum(torch.cat([g.flatten() for g in gradients(rank, 0)]) for rank in range(4)) / 4
    gaps = [(ranks_of(4).run(constant, feedback, quiet=True)[0] - exact).abs().max() for feedback in (True, False)]
    assert gaps[0] < 0.05 < 0.3 < gaps[1]


# ---- low rank -------------------------------------------------------------------------------------------------


def power_sgd(rank_of_it, n, steps, first):
    """The same in one process that has all ranks' gradients: only the sums matter."""
    q, left, after = [m.clone() for m in first], 0, []
    for step in range(steps):
        total = [sum(gs) / n for gs in zip(*(gradients(rank, step) for rank in range(n)), strict=True)]
        flat = torch.cat([t.flatten() for t in total]) + left
        parts = [p.view(s) for p, s in zip(flat.split([t.numel() for t in total]), SHAPES, strict=True)]
        sent, i = [], 0
        for part in parts:
            rows, columns = (len(part), part.numel() // len(part)) if part.dim() > 1 else (1, 1)
            if rank_of_it * (rows + columns) < rows * columns:
                m = part.reshape(rows, columns)
                p = torch.linalg.qr(m @ torch.linalg.qr(q[i]).Q).Q
                q[i] = m.mT @ p
                part, i = (p @ q[i].mT).view(part.shape), i + 1
            sent.append(part)
        left = flat - torch.cat([s.flatten() for s in sent])
        after.append(sent)
    return after


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("rank_of_it", [1, 2])
def test_power_sgd(ranks_of, n, rank_of_it):
    hook = PowerSGD(rank_of_it)
    first = hook._first([torch.empty(4, 4 if i == 0 else 6, dtype=torch.float64)
                         for i, shape in enumerate([(6, 4), (8, 6)])])  # fmt: skip
    got = run(ranks_of, n, lambda: PowerSGD(rank_of_it), 4)
    for a, b in zip(got, power_sgd(rank_of_it, n, 4, first), strict=True):
        close(a, b, 1e-9)


def beside_torchs_power():
    theirs, hook = DistributedDataParallel(Net().double()), PowerSGD(1)
    state = powerSGD_hook.PowerSGDState(None, 1, start_powerSGD_iter=2, min_compression_rate=1)
    theirs.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    ours = DataParallel(Net().double(), comm_hook=hook)
    # torch's first random Q, and its order of the matrices
    torch.manual_seed(np.random.RandomState(0).randint(1_000_000_000))
    drawn = [torch.randn(shape, dtype=torch.float64) for shape in [(8, 1), (6, 1)]]
    hook._first = lambda matrices: [next(d for d in drawn if len(d) == m.shape[1]) for m in matrices]
    pairs = []
    for step in range(6):
        if step == 2:  # torch averages the first two steps exactly
            ours.comm_hook = hook
        elif step < 2:
            ours.comm_hook = lambda bucket, group: dist.all_reduce(bucket.flat, async_op=True).wait
        pairs.append((backward(ours, step), backward(theirs, step)))
    return pairs


def test_power_sgd_equals_torchs(ranks_of):
    for ours, theirs in ranks_of(4).run(beside_torchs_power, quiet=True)[0]:
        close(ours, theirs, 1e-9)


# ---- bytes, a whole training, bad input -----------------------------------------------------------------------


def test_bytes(ranks_of):
    elements = sum(torch.Size(shape).numel() for shape in SHAPES)
    makes = {
        "half": (lambda: half_precision(), "all_reduce", 2 * elements),
        "top": (lambda: TopK(0.1), "all_gather", int(0.1 * elements) * (4 + 4)),
        "power": (lambda: PowerSGD(1), "all_reduce", 4 * ((6 + 4) + (8 + 6) + 5 + 4)),
    }
    for make, op, size in makes.values():
        trace = ranks_of(4).trace(hooked, make, 3, torch.float32)
        assert [trace.bytes(rank=rank) for rank in range(4)] == [3 * size] * 4
        assert {e.name for e in trace.collectives} == {op}


def trained(make):
    torch.manual_seed(0)
    model = DataParallel(Net(), comm_hook=make(), bucket_mb=2e-4, first_bucket_mb=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(60):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(4 * (step % 4) + dist.get_rank()))
        loss = (model(x) - x[:, :4]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[:4]), sum(losses[-4:]), [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("make", [half_precision, lambda: TopK(0.2), lambda: PowerSGD(1)], ids=["half", "top", "power"])
def test_training_learns_and_the_ranks_stay_equal(ranks_of, make):
    results = ranks_of(4).run(trained, make, quiet=True)
    for first, last, parameters in results:
        assert last < 0.7 * first
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0][2], strict=True))


def steps_of(make, losses, model=None):
    """Whether each step's gradient is finite, and the gradients."""
    torch.manual_seed(0)
    model = DataParallel(model or Net(), comm_hook=make())
    found = []
    for step, factor in enumerate(losses):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model.zero_grad()
        (model(x).square().mean() * factor).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return [bool(g.isfinite().all()) for g in found], found


@pytest.mark.parametrize("make", [half_precision, lambda: TopK(0.2), lambda: PowerSGD(1)], ids=["half", "top", "power"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_seen_and_forgotten(ranks_of, make, bad):
    def overflow():
        return steps_of(make, [1, bad if dist.get_rank() == 2 else 1, 1, 1])[0]

    assert ranks_of(4).run(overflow, quiet=True) == [[True, False, True, True]] * 4


def test_power_sgd_begins_again_after_a_step_without_gradient(ranks_of):
    """Where the first row and column are always 0 as well, a Q of zeros would be led nowhere for good."""

    def dead_corner():
        bucket, hook, sums = fill_buckets([nn.Parameter(torch.zeros(6, 6))])[0], PowerSGD(1), []
        for step in range(3):
            bucket.flat.zero_()
            bucket.views[0][1:, 1:] = step
            hook(bucket, None)()
            sums.append(bucket.flat.sum().item())
        return sums

    for sums in ranks_of(4).run(dead_corner, quiet=True):
        assert sums == pytest.approx([0, 100, 200], rel=1e-4)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.scalar, self.empty = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.empty(0, dtype=torch.float64))
        self.line, self.fc = nn.Parameter(torch.ones(6)), nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(x * self.line) * self.scalar + self.empty.sum()


@pytest.mark.parametrize("make", [lambda: TopK(1), lambda: TopK(1e-9), lambda: PowerSGD(9)], ids=["all", "1", "power"])
def test_a_bucket_for_each_of_very_small_parameters(ranks_of, make):
    def small(exactly):
        torch.manual_seed(0)
        exact, ours = Small(), DataParallel(Small(), comm_hook=make(), bucket_mb=1e-7, first_bucket_mb=1e-7)
        exact.load_state_dict(ours.module.state_dict())
        sizes = [bucket.flat.numel() for bucket in ours.buckets]
        whole = [torch.randn(5, 6, generator=torch.Generator().manual_seed(r)) for r in range(4)]
        sum(exact(x).square().mean() / 4 for x in whole).backward()
        ours(whole[dist.get_rank()]).square().mean().backward()
        if exactly:
            close([p.grad for p in ours.parameters()], [p.grad for p in exact.parameters()], 1e-5)
        return sizes

    assert 0 in ranks_of(4).run(small, make().__dict__.get("ratio") != 1e-9, quiet=True)[0]


def test_power_sgd_does_not_depend_on_the_order_in_memory(ranks_of):
    def convolution(layout):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 8, 3).to(memory_format=layout)
        model, total = DataParallel(conv, comm_hook=PowerSGD(2)), 0
        for step in range(3):
            model.zero_grad()
            x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(4 * step + dist.get_rank()))
            model(x).square().mean().backward()
            total = total + (step + 1) * conv.weight.grad
        return total.contiguous()

    plain, other = (ranks_of(4).run(convolution, layout, quiet=True)[0]
                    for layout in (torch.contiguous_format, torch.channels_last))  # fmt: skip
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


def test_what_is_remembered_can_be_saved(ranks_of):
    def resumed(make):
        bucket, hook = fill_buckets([nn.Parameter(torch.zeros(shape)) for shape in SHAPES])[0], make()

        def step(i, hook):
            for view, g in zip(bucket.views, gradients(dist.get_rank(), i), strict=True):
                view.copy_(g / 4)
            hook(bucket, None)()
            return bucket.flat.clone()

        step(0, hook), step(1, hook)
        file = io.BytesIO()
        torch.save(hook, file)
        file.seek(0)
        return torch.equal(step(2, hook), step(2, torch.load(file, weights_only=False)))

    for make in (lambda: TopK(0.2), lambda: PowerSGD(1)):
        assert all(ranks_of(4).run(resumed, make, quiet=True))


def test_dtypes_that_would_lose_something_are_refused(ranks_of):
    def refuses(make, dtype, said):
        [bucket] = fill_buckets([nn.Parameter(torch.zeros(4, 4, dtype=dtype))])
        with pytest.raises(TypeError, match=said):
            make()(bucket, None)

    ranks = ranks_of(1)
    ranks.run(refuses, half_precision, torch.complex64, "no place for the imaginary part .* use TopK", quiet=True)
    for dtype in (torch.complex64, torch.bfloat16):
        ranks.run(refuses, PowerSGD, dtype, f"not {dtype}: use TopK", quiet=True)
    with pytest.raises(ValueError, match="torch.float16 or torch.bfloat16, not torch.int8"):
        half_precision(torch.int8)


def test_bad_input():
    for ratio in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"above 0 and at most 1, not {ratio}"):
            TopK(ratio)
    for rank in (0, 1.5):
        with pytest.raises(ValueError, match="a whole number from 1, not"):
            PowerSGD(rank)


def test_power_sgd_of_nothing_and_what_it_compresses(ranks_of):
    assert PowerSGD(1).compresses(torch.Size((6, 4))) and not PowerSGD(3).compresses(torch.Size((6, 4)))
    assert not PowerSGD(1).compresses(torch.Size((6,)))
    for after in ranks_of(4).run(zeros, quiet=True):
        assert not after.any()


def zeros():
    hook = PowerSGD(2)
    [bucket] = fill_buckets([nn.Parameter(torch.zeros(shape)) for shape in SHAPES])
    for _ in range(3):
        hook(bucket, None)()
    return bucket.flat
