"""Mixed precision: against torch.autocast, torch.amp.GradScaler, ShardedGradScaler, FSDP2, and float32."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.mixed_precision import (
    LossScaler,
    MasterWeights,
    autocast,
    average_gradients,
    check_precision,
    checks,
)
from tests.mechanisms.refusals import refused
from tests.mechanisms.sixteen_bit_nets import Net, batch, state, trained

BF16, F16 = torch.bfloat16, torch.float16


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


class Checkpointed(Net):
    """Net with parts of it checkpointed: one in the other, with a norm and a softmax, whose precision ours chooses."""

    def __init__(self, reentrant):
        super().__init__()
        self.again_in_backward = partial(checkpoint, use_reentrant=reentrant)

    def forward(self, x):
        x = self.again_in_backward(lambda x: self.again_in_backward(self.within, torch.tanh(self.fc1(x))), x)
        return self.out(self.conv(F.layer_norm(x, (16,)).softmax(1)[:, None]).flatten(1))

    def within(self, x):
        return self.again(F.layer_norm(self.fc2(x), (16,)).softmax(1)) * x


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_computes_the_same_again(dtype, reentrant):
    found = []
    for how in (None, reentrant):
        model, (x, y) = Checkpointed(how), batch(0)
        if how is None:
            model.again_in_backward = lambda function, x: function(x)
        with autocast(dtype):
            loss = F.cross_entropy(model(x.requires_grad_(True)), y)
        (loss * 256).backward()
        found.append([loss, x.grad, *(p.grad for p in trained(model).values() if p.grad is not None)])
    assert len(found[0]) == 11 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_as_under_torchs_autocast(reentrant):
    found = []
    for context in (autocast(BF16), torch.autocast("cpu", BF16)):
        model, (x, y) = Net(), batch(0)
        with context:
            scores = checkpoint(model, x.requires_grad_(True), use_reentrant=reentrant)
            loss = F.cross_entropy(scores, y)
        loss.backward()
        found.append([loss, x.grad, *(p.grad for p in trained(model).values() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpoint_is_torchs_again_after_a_block_that_failed():
    before = checkpoints.CheckpointFunction, checkpoints._checkpoint_without_reentrant_generator
    with pytest.raises(RuntimeError, match="in the block"), autocast(BF16), autocast(F16):
        raise RuntimeError("in the block")
    assert before == (checkpoints.CheckpointFunction, checkpoints._checkpoint_without_reentrant_generator)
    w, x = nn.Parameter(torch.ones(2, 2)), torch.ones(1, 2, requires_grad=True)
    for reentrant in (False, True):
        w.grad = None
        checkpoint(lambda x: (x @ w * 1.001).sum(), x, use_reentrant=reentrant).backward()
        assert torch.equal(w.grad, torch.full((2, 2), 1.001))  # outside of any block: float32, left alone


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


# ---- precisions and devices -----------------------------------------------------------------------------------


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

    monkeypatch.setattr(checks, "_try", cannot)
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
