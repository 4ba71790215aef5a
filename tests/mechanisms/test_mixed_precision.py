"""Mixed precision: against torch.autocast, torch.amp.GradScaler, ShardedGradScaler, FSDP2, and float32."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms import mixed_precision
from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.mixed_precision import (
    LossScaler,
    MasterWeights,
    autocast,
    average_gradients,
    check_precision,
)
from tests.mechanisms.refusals import refused

BF16, F16 = torch.bfloat16, torch.float16


class Net(nn.Module):
    """A weight used twice, a frozen layer, one that nobody uses; linear layers, a convolution, norm and softmax."""

    def __init__(self, seed=0):
        super().__init__()
        self.fc1, self.fc2, self.again = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.conv, self.frozen, self.unused = nn.Conv1d(1, 2, 3), nn.Linear(16, 16), nn.Linear(3, 3)
        self.out = nn.Linear(28, 5)
        numbers = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=numbers) / 3
        self.again.weight = self.fc2.weight
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.fc1(x))
        x = self.frozen(F.relu(self.again(torch.tanh(self.fc2(x)))))
        return self.out(self.conv(x[:, None]).flatten(1))


def batch(step, rows=24):
    numbers = torch.Generator().manual_seed(100 + step)
    return torch.randn(rows, 12, generator=numbers), torch.randint(0, 5, (rows,), generator=numbers)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- autocast -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_is_torchs(dtype):
    """Outputs, loss, input gradient and every parameter's, bit for bit: the same casts, the same kernels."""
    found = []
    for context in (partial(autocast, dtype), partial(torch.autocast, "cpu", dtype)):
        model, (x, y) = Net(), batch(0)
        x.requires_grad_(True)
        with context():
            scores = model(x)
            loss = F.cross_entropy(scores, y)
        (loss * 1024).backward()
        found.append([scores, loss, x.grad, *(p.grad for p in trained(model).values() if p.grad is not None)])
        assert scores.dtype == dtype and loss.dtype == torch.float32
        assert all(p.dtype == torch.float32 and p.grad is None or p.grad.dtype == torch.float32
                   for p in trained(model).values())  # fmt: skip
        assert model.unused.weight.grad is None
    assert len(found[0]) == len(found[1]) == 12
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_which_operations_compute_in_what():
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    low = {
        "@": lambda: a @ b, "matmul": lambda: torch.matmul(a, b), "mm": lambda: a.mm(b),
        "linear": lambda: F.linear(a, b),
        "einsum": lambda: torch.einsum("ij,jk->ik", a, b), "addmm": lambda: torch.addmm(a, a, b),
        "bmm": lambda: torch.bmm(a[None], b[None]), "conv1d": lambda: F.conv1d(a[None], torch.randn(2, 4, 1)),
        "attention": lambda: F.scaled_dot_product_attention(a[None], b[None], b[None]),
    }  # fmt: skip
    full = {
        "softmax": lambda h: h.softmax(1), "log_softmax": lambda h: F.log_softmax(h, 1), "sum": lambda h: h.sum(),
        "exp": lambda h: h.exp(), "layer_norm": lambda h: F.layer_norm(h, (4,)), "mse": lambda h: F.mse_loss(h, h + 1),
        "pow": lambda h: h**2, "norm": lambda h: h.norm(), "cross_entropy": lambda h: F.cross_entropy(h, a.argmax(1)),
    }  # fmt: skip
    for dtype in (BF16, F16):
        with autocast(dtype):
            assert {name: f().dtype for name, f in low.items()} == dict.fromkeys(low, dtype)
            half = (a @ b).to(dtype)
            assert {name: f(half).dtype for name, f in full.items()} == dict.fromkeys(full, torch.float32)
            assert (half + 1).dtype == F.relu(half).dtype == dtype and (half + a).dtype == torch.float32
            assert (a.double() @ b.double()).dtype == torch.float64  # left alone
            assert (torch.arange(4) @ torch.arange(4)).dtype == torch.int64
        assert (a @ b).dtype == torch.float32  # afterwards


def test_a_parameter_is_cast_once_and_not_kept():
    w = nn.Parameter(torch.randn(3, 3))
    context = autocast(BF16)
    with context:
        first = context._cast(w, BF16)
        assert context._cast(w, BF16) is first
        with torch.no_grad():
            quiet = torch.ones(1, 3) @ w
        loud = torch.ones(1, 3) @ w
        assert not quiet.requires_grad and loud.requires_grad
    assert not context._casts
    with torch.no_grad():
        w.mul_(2)
    with context:  # a changed weight is cast anew
        assert torch.equal(context._cast(w, BF16), w.to(BF16)) and not torch.equal(first, w.to(BF16))


# ---- the scale ------------------------------------------------------------------------------------------------


def overflows(step):
    return step in (0, 1, 6, 7, 8, 14, 31, 50)


@pytest.mark.parametrize(
    "rules", [(65536.0, 2.0, 0.5, 2000), (8.0, 2.0, 0.5, 4), (3.3, 1.7, 0.3, 3), (2.0**125, 2.0, 0.5, 1)]
)
def test_scale_and_skipped_steps_are_gradscalers(rules):
    """One process, the same gradients: infinities and NaN in some steps, also in one of two optimizers only."""
    names = ("init_scale", "growth_factor", "backoff_factor", "growth_interval")
    found = []
    for scaler in (
        LossScaler(**dict(zip(names, rules, strict=True)), agree=False),
        torch.amp.GradScaler("cpu", **dict(zip(names, rules, strict=True))),
    ):
        layers = [nn.Linear(2, 2, bias=False) for _ in range(2)]
        for layer in layers:
            nn.init.ones_(layer.weight)
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9) for layer in layers]
        seen = []
        for step in range(60):
            for i, layer in enumerate(layers):
                small = layer(torch.ones(1, 2)).mean() * 1e-3  # 2**127 · 1e-3 does not overflow
                layer.weight.grad = None
                scaler.scale(small).backward()
                if overflows(step) and i == 0:
                    layer.weight.grad[0, 0] = math.nan if step % 2 else -math.inf
            if step % 3 == 0:
                scaler.unscale_(optimizers[1])
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            seen.append((scaler.get_scale(), [layer.weight.detach().clone() for layer in layers]))
        found.append(seen)
    assert [scale for scale, _ in found[0]] == [scale for scale, _ in found[1]]
    assert all(torch.equal(a, b) for (_, ours), (_, torchs) in zip(*found, strict=True)
               for a, b in zip(ours, torchs, strict=True))  # fmt: skip
    assert len({scale for scale, _ in found[0]}) > 2


def spoilt(step):
    """{rank: whether its gradient is infinite or NaN} in this step: nobody's, one rank's, all."""
    return {1: [2], 2: [0], 5: [1, 3], 9: [0, 1, 2, 3], 13: [3]}.get(step, [])


def scaled_training(kind, where, steps=20, dtype=F16):
    """Scale, whether a step was made, and parameters, after each step. where: "reduced" gradients are looked at after
    the all-reduce; "own": before it, so that each rank sees others; "shards": each rank has parameters of its own."""
    rank, n = dist.get_rank(), dist.get_world_size()
    rules = {"init_scale": 1024.0, "growth_interval": 4}
    if kind == "ours":
        scaler = LossScaler(**rules, agree=where != "reduced")
    elif where == "reduced":
        scaler = torch.amp.GradScaler("cpu", **rules)
    else:
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        scaler = ShardedGradScaler("cpu", **rules)
    model = Net(0 if where != "shards" else rank)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.02, momentum=0.9)
    seen = []
    for step in range(steps):
        x, y = (t[rank::n] for t in batch(step))
        with autocast(dtype):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if rank in spoilt(step):
            model.fc2.weight.grad[0, 0] = math.inf if step % 2 else math.nan
        if where == "reduced":
            average_gradients(model.parameters())
        before = state(model)
        scaler.unscale_(optimizer)
        if where == "own":
            average_gradients(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        made = any(not torch.equal(before[name], p) for name, p in model.named_parameters())
        seen.append((scaler.get_scale(), made, state(model)))
    return seen


@pytest.mark.parametrize("where", ["reduced", "own", "shards"])
def test_infinities_on_one_rank_only(ranks_of, where):
    """Scale, skipped steps and parameters against torch's scalers, on the same gradients; ranks equal at every step."""
    ours = ranks_of(4).run(scaled_training, "ours", where, quiet=True)
    torchs = ranks_of(4).run(scaled_training, "torchs", where, quiet=True)
    for mine, theirs in zip(ours, torchs, strict=True):
        assert [m[0] for m in mine] == [t[0] for t in theirs]  # the scale
        assert [m[1] for m in mine] == [t[1] for t in theirs] == [not spoilt(s) for s in range(20)]  # steps made
        assert all(torch.equal(m[2][k], t[2][k]) for m, t in zip(mine, theirs, strict=True) for k in m[2])
    assert [m[:2] for m in ours[0]] == [m[:2] for m in ours[3]] and len({m[0] for m in ours[0]}) >= 4
    if where != "shards":
        assert all(torch.equal(m[2][k], one[2][k]) for mine in ours for m, one in zip(mine, ours[0], strict=True)
                   for k in one[2])  # fmt: skip


def test_without_agreement_ranks_part_ways(ranks_of):
    def alone():
        rank = dist.get_rank()
        layer, scaler = nn.Linear(2, 1, bias=False), LossScaler(8.0, agree=False)
        nn.init.ones_(layer.weight)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaler.scale(layer(torch.ones(1, 2)).sum()).backward()
        if rank == 2:
            layer.weight.grad.fill_(math.inf)
        overflowed = scaler.unscale_(optimizer)
        made = scaler.step(optimizer)
        scaler.update()
        return overflowed, made, scaler.get_scale(), layer.weight.tolist()

    got = ranks_of(4).run(alone, quiet=True)
    assert got[2] == (True, False, 4.0, [[1.0, 1.0]])
    assert all(g[:3] == (False, True, 8.0) and g[3] != got[2][3] for r, g in enumerate(got) if r != 2)


def test_groups_agree_by_themselves_and_traffic(ranks_of):
    def pairs():
        rank = dist.get_rank()
        group = [group_of([0, 2]), group_of([1, 3])][rank % 2]
        layer, scaler = nn.Linear(2, 1), LossScaler(group=group)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer.weight.grad = torch.full((1, 2), math.nan if rank == 3 else 1.0)  # and no gradient for the bias
        made = scaler.step(optimizer)
        scaler.update()
        return made, scaler.get_scale()

    trace = ranks_of(4).trace(pairs, quiet=True)
    assert trace.results == [(True, 65536.0), (False, 32768.0)] * 2
    assert {trace.bytes("all_reduce", r) for r in range(4)} == {4} and len(trace.collectives) == 4


def test_clipping_after_unscaling_is_one_processs(ranks_of):
    def clipped(scaler, n=1, rank=0):
        model, (x, y) = Net(), batch(0)
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
        loss = F.cross_entropy(model(x[rank::n]), y[rank::n])
        (scaler.scale(loss) if scaler else loss).backward()
        if n > 1:
            average_gradients(model.parameters())
        if scaler:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer) if scaler else optimizer.step()
        return state(model)

    want = clipped(None)
    for got in ranks_of(4).run(lambda: clipped(LossScaler(), 4, dist.get_rank()), quiet=True):
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)


# ---- training -------------------------------------------------------------------------------------------------


def train(dtype, travel=None, steps=20, wrapper=False, n=None):
    """Losses and parameters of float32 weights under autocast; all rows of the batch in one process where n is None."""
    rank = dist.get_rank() if n else 0
    model = Net(rank if wrapper else 0)
    net = DataParallel(model, find_unused_parameters=True) if wrapper else model
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.003)
    scaler = LossScaler(256.0, growth_interval=50, agree=False)  # no step is skipped, or it would be another training
    losses, weights = [], []
    for step in range(steps):
        x, y = (t[rank :: n or 1] for t in batch(step))
        if dtype is None:
            loss = F.cross_entropy(net(x), y)
        else:
            with autocast(dtype):
                loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if n and not wrapper:
            average_gradients(model.parameters(), travel)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        weights.append(state(model))
    return losses, weights


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_losses_within_the_precisions_error_of_float32(ranks_of, n):
    """20 steps of AdamW: reduced in full and low precision; equal on all ranks at every step."""
    exact, reference = train(None)
    for dtype, travel, bound in ((BF16, None, 2**-7), (BF16, BF16, 2**-7), (F16, None, 2**-10), (F16, F16, 2**-10),
                                 (None, None, 2**-20)):  # fmt: skip
        got = ranks_of(4).run(in_world, n, train, dtype, travel, 20, False, n, quiet=True)[:n]
        for step in range(20):
            loss = sum(losses[step] for losses, _ in got) / n
            assert abs(loss / exact[step] - 1) < 2 * bound, (dtype, travel, step)
            assert all(torch.equal(w[step][k], got[0][1][step][k]) for _, w in got for k in w[step])
        if dtype is None:
            for name, p in reference[-1].items():
                torch.testing.assert_close(got[0][1][-1][name], p, rtol=1e-4, atol=1e-5)


def test_under_our_data_parallel(ranks_of):
    """Seeds differ per rank; buckets hold float32 gradients. Equal to plain averaging, and to DDP under autocast."""

    def ddp():
        model = Net(dist.get_rank())
        net = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.AdamW(trained(model).values(), lr=0.003)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=50)
        for step in range(20):
            x, y = (t[dist.get_rank() :: 4] for t in batch(step))
            with torch.autocast("cpu", F16):
                loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return state(model)

    ours = ranks_of(4).run(train, F16, None, 20, True, 4, quiet=True)
    plain = ranks_of(4).run(train, F16, None, 20, False, 4, quiet=True)
    torchs = ranks_of(4).run(ddp, quiet=True)
    for (_, weights), (_, others), theirs in zip(ours, plain, torchs, strict=True):
        for name, p in theirs.items():
            if not name.startswith("unused"):
                torch.testing.assert_close(weights[-1][name], p, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(weights[-1][name], others[-1][name], rtol=1e-4, atol=1e-5)


def test_what_is_sent(ranks_of):
    size = sum(p.numel() for name, p in trained(Net()).items() if not name.startswith("unused"))
    for travel, each in ((None, 4), (BF16, 2), (F16, 2)):
        trace = ranks_of(4).trace(train, BF16, travel, 1, False, 4, quiet=True)
        assert {trace.bytes("all_reduce", r) for r in range(4)} == {size * each}
        assert len(trace.collectives) == 4  # one message


def test_low_precision_averages_and_their_range(ranks_of):
    """The mean of 60,000 four times is 60,000 in float16, where the sum would be infinite."""

    def mean(value, dtype):
        p = nn.Parameter(torch.zeros(3))
        p.grad = torch.tensor([value, 1.0 + dist.get_rank(), 3e-6])
        average_gradients([p], dtype)
        return p.grad

    for got in ranks_of(4).run(mean, 60_000.0, F16, quiet=True):
        assert got.dtype == torch.float32 and got[:2].tolist() == [60_000.0, 2.5] and abs(got[2] - 3e-6) < 3e-7
    for got in ranks_of(4).run(mean, 60_000.0, BF16, quiet=True):
        assert abs(got[0] / 60_000 - 1) < 2**-7 and abs(got[2] / 3e-6 - 1) < 2**-7


# ---- a model of 16 bits ---------------------------------------------------------------------------------------


def masters(dtype, steps=20, n=1, rank=0):
    model = Net()
    held = MasterWeights(model, dtype)
    optimizer, scaler = torch.optim.AdamW(held.parameters(), lr=0.003), LossScaler(256.0, agree=False)
    losses = []
    for step in range(steps):
        x, y = batch(step)
        loss = F.cross_entropy(model(x[rank::n].to(dtype)).float(), y[rank::n])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        held.take_gradients()
        average_gradients(held.parameters())
        scaler.step(optimizer)
        scaler.update()
        held.give_back()
        losses.append(loss.item())
    return losses, state(model), [p.detach().clone() for p in held.parameters()]


def fsdp2(steps=20):
    """PyTorch's own: float32 shards, gathered and computed with as bfloat16, gradients reduced in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    rank, model = dist.get_rank(), Net()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.003)
    losses = []
    for step in range(steps):
        x, y = batch(step)
        loss = F.cross_entropy(model(x[rank::4]).float(), y[rank::4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def test_master_weights_against_fsdp2_and_float32(ranks_of):
    exact, _ = train(None)
    for dtype, bound in ((BF16, 2**-7), (F16, 2**-10)):
        got = ranks_of(4).run(lambda dtype=dtype: masters(dtype, n=4, rank=dist.get_rank()), quiet=True)
        for step in range(20):
            assert abs(sum(losses[step] for losses, *_ in got) / 4 / exact[step] - 1) < 4 * bound
        for _, low, full in got:
            assert all(torch.equal(low[k], got[0][1][k]) and low[k].dtype == dtype for k in low)
            assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(full, got[0][2], strict=True))
        if dtype == BF16:
            theirs = ranks_of(4).run(fsdp2, quiet=True)
            for (losses, *_), (torchs, _) in zip(got, theirs, strict=True):
                assert max(abs(a / b - 1) for a, b in zip(losses, torchs, strict=True)) < 2**-7
            names = [name for name in trained(Net())]
            for name, p in zip(names, got[0][2], strict=True):
                if not name.startswith("unused"):
                    torch.testing.assert_close(p, theirs[0][1][name], rtol=2**-6, atol=2**-8)


def test_why_masters_are_float32():
    """Two thousand steps of 0.0002 move a weight of 1 to 0.6 there, and not at all in float16."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    held = MasterWeights(layer, F16)
    optimizer = torch.optim.SGD(held.parameters(), lr=0.0002)
    alone = torch.ones((), dtype=F16)
    for _ in range(2000):
        optimizer.zero_grad()
        layer(torch.ones(1, 1, dtype=F16)).sum().backward()
        held.take_gradients()
        optimizer.step()
        held.give_back()
        alone -= 0.0002
    assert abs(layer.weight.item() - 0.6) < 1e-3 and alone == 1


def test_master_weights_of_tied_and_frozen_parameters_and_micro_batches():
    model = Net()
    held = MasterWeights(model, BF16)
    assert len(held.parameters()) == len(list(trained(Net()).values())) and model.again.weight is model.fc2.weight
    assert model.frozen.weight.dtype == BF16
    x, y = batch(0)
    for half in (slice(0, 12), slice(12, 24)):
        (F.cross_entropy(model(x[half].to(BF16)), y[half]) / 2).backward()
        held.take_gradients()
    assert all(p.grad is None for p in model.parameters())
    whole = Net()
    F.cross_entropy(whole(x), y).backward()
    for p, (name, other) in zip(held.parameters(), trained(whole).items(), strict=True):
        if other.grad is None:
            assert p.grad is None and name.startswith("unused")
        else:
            assert (p.grad - other.grad).norm() < 0.05 * other.grad.norm()


# ---- saving, and bad input ------------------------------------------------------------------------------------


def test_state_goes_to_and_from_gradscaler():
    torchs = torch.amp.GradScaler("cpu", init_scale=4.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=7)
    torchs.load_state_dict(torchs.state_dict() | {"scale": 12.0, "_growth_tracker": 5})
    ours = LossScaler(agree=False)
    ours.load_state_dict(torchs.state_dict())
    assert ours.get_scale() == 12.0 and ours.state_dict() == torchs.state_dict() and not ours.agree
    again = torch.amp.GradScaler("cpu")
    again.load_state_dict(ours.state_dict())
    assert again.state_dict() == ours.state_dict()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"init_scale": 0.0}, "init_scale .* above 0 and finite, not 0.0"),
        ({"init_scale": -1.0}, "init_scale"),
        ({"init_scale": math.inf}, "init_scale"),
        ({"init_scale": math.nan}, "init_scale"),
        ({"init_scale": 1e300}, "init_scale"),
        ({"growth_factor": 1.0}, "growth_factor is above 1"),
        ({"growth_factor": math.nan}, "growth_factor is above 1"),
        ({"backoff_factor": 1.0}, "backoff_factor is between 0 and 1"),
        ({"backoff_factor": 0.0}, "backoff_factor"),
        ({"growth_interval": 0}, "growth_interval is a number of good steps"),
        ({"growth_interval": 2.5}, "growth_interval"),
    ],
)
def test_bad_scales_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        LossScaler(**wrong, agree=False)


def test_the_order_of_calls_is_watched():
    layer = nn.Linear(2, 1)
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.1), LossScaler(agree=False)
    with pytest.raises(RuntimeError, match="no gradients were looked at"):
        scaler.update()
    scaler.scale(layer(torch.ones(1, 2)).sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="are unscaled already"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="has stepped already"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="are stepped already|stepped"):
        scaler.unscale_(optimizer)
    scaler.update()
    with pytest.raises(ValueError, match="the loss is torch.int64"):
        scaler.scale(torch.tensor(3))
    half = nn.Linear(2, 1, dtype=F16)
    half(torch.ones(1, 2, dtype=F16)).sum().backward()
    with pytest.raises(ValueError, match="these gradients are float16.*MasterWeights"):
        scaler.unscale_(torch.optim.SGD(half.parameters(), lr=0.1))


def test_a_16_bit_loss_is_scaled_as_float32():
    scaled = LossScaler(agree=False).scale(torch.tensor(2.0, dtype=F16, requires_grad=True))
    assert scaled.dtype == torch.float32 and scaled.item() == 131072


def test_precisions_and_devices_that_cannot(monkeypatch, ranks_of):
    for dtype in (torch.float32, torch.float64, torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"{dtype} is not a precision for this"):
            check_precision(dtype)
    check_precision(F16), check_precision(BF16)
    with torch.no_grad(), autocast(BF16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == BF16
    with torch.inference_mode():
        autocast(F16)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda cannot compute in torch.float16 .*: use bfloat16"):
            autocast(F16, "cuda")

    def cannot(dtype, device):
        if dtype == F16:
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'\nand more")

    monkeypatch.setattr(mixed_precision, "_try", cannot)
    for make in (lambda: autocast(F16), lambda: MasterWeights(nn.Linear(2, 2), F16)):
        with pytest.raises(ValueError, match="cpu cannot compute in torch.float16 .*'Half'.*bfloat16, which needs no"):
            make()
    autocast(BF16)
    with refused("is not in this group"):
        ranks_of(4).run(lambda: LossScaler(group=group_of([0, 1])) and None, quiet=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_on_a_gpu_it_is_torchs(dtype):
    found = []
    for context in (partial(autocast, dtype, "cuda"), partial(torch.autocast, "cuda", dtype)):
        model, (x, y) = Net().cuda(), (t.cuda() for t in batch(0))
        scaler = LossScaler(agree=False) if context.func is autocast else torch.amp.GradScaler("cuda")
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
        with context():
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append((loss, scaler.get_scale(), state(model)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert all(torch.allclose(found[0][2][k], p, 1e-3, 1e-5) for k, p in found[1][2].items())


@pytest.mark.parametrize("make", [
    lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval(),
    lambda: nn.PReLU(),
], ids=["attention", "attention, eval", "PReLU"])  # fmt: skip
def test_ready_made_modules_after_a_layer(make):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), make()), torch.randn(2, 3, 8)
    with autocast(torch.bfloat16):
        y = net(x)
    y.float().square().mean().backward()
    assert torch.allclose(y.float(), net(x), atol=0.1)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def fsdp2_scales(scaler):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net, scales = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), []
    fully_shard(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(2, 8)).square().mean()).backward()
        if step == 2 and dist.get_rank() == 1:
            net[0].weight.grad.to_local()[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, net[0].weight.full_tensor()


def test_fsdp2s_shards_are_scaled_as_gradscaler_does(ranks_of):
    def both():
        torchs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        return fsdp2_scales(LossScaler(1024.0, growth_interval=3)), fsdp2_scales(torchs)

    for ours, torchs in ranks_of(4).run(both, quiet=True):
        assert ours[0] == torchs[0] == [1024, 1024, 512, 512, 512, 1024] and torch.equal(ours[1], torchs[1])


def test_a_rank_that_holds_nothing_agrees_with_the_others(ranks_of):
    def step():
        rank = dist.get_rank()
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.full((3,), math.inf if rank == 0 else 1.0)
        optimizer = torch.optim.SGD([{"params": [] if rank == 2 else [p]}], lr=0.1)
        return LossScaler(4.0).step(optimizer)

    assert ranks_of(4).run(step, quiet=True) == [False] * 4


def test_a_scale_that_has_fallen_to_nothing_is_told():
    p, scaler = nn.Parameter(torch.ones(1)), LossScaler(2.0**-149, agree=False)
    optimizer = torch.optim.SGD([p], lr=0.1)
    p.grad = torch.full((1,), math.nan)
    scaler.step(optimizer)
    scaler.update()
    with pytest.raises(RuntimeError, match="the scale has fallen to 0: the gradients were infinite or NaN at any"):
        scaler.step(optimizer)
