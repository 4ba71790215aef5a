"""The loss scaler: against torch.amp.GradScaler, ShardedGradScaler, and float32."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from pardist_lib.lessons.worlds import group_of
from pardist_lib.mechanisms.mixed_precision import LossScaler, autocast, average_gradients
from tests.mechanisms.sixteen_bit_nets import Net, batch, state, trained

BF16, F16 = torch.bfloat16, torch.float16


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
