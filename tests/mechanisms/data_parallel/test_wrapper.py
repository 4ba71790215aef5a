"""DataParallel: against one process with the whole batch, against DistributedDataParallel, and to the byte."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.collectives import ring_all_reduce
from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.sharded.optimizer import ShardedOptimizer
from tests.mechanisms.data_parallel.nets import (
    TINY,
    WORLDS,
    Net,
    batch,
    gradients,
    on_all,
    one_step,
    optimizer_of,
    same,
    state,
    train,
    train_alone,
    trainable_bytes,
    within,
)
from tests.versions import since


@pytest.mark.parametrize("n", WORLDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_step_equals_one_process_and_ddp(ranks_of, n, dtype):
    alone = Net(dtype=dtype)
    x, y = batch(0, dtype=dtype)
    x.requires_grad_()
    output = alone(x)
    loss = cross_entropy(output, y)
    loss.backward()
    cases = [(DistributedDataParallel, {}), (DataParallel, {"bucket_mb": 0.0005, "first_bucket_mb": TINY})]
    cases += [(DataParallel, {"overlap": False}), (DataParallel, {"find_unused_parameters": True})]
    for kind, option in cases:
        outputs, losses, inputs, grads = zip(
            *ranks_of(4).run(within, n, one_step, kind, dtype, quiet=True, **option)[:n], strict=True
        )
        got = {"output": torch.cat(outputs), "loss": sum(losses) / n, "input": torch.cat(inputs) / n}
        same(got, {"output": output.detach(), "loss": loss.detach(), "input": x.grad}, dtype, str(option))
        for one in grads:
            same(one, gradients(alone), dtype, str(option))


@pytest.mark.parametrize("n", WORLDS)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_twenty_steps_equal_one_process_and_ddp(ranks_of, n, name):
    ranks = ranks_of(4)
    cases = [{}, {"rows": 11, "norm": True}, {"rows": 5, "clip": 0.1}]  # uneven: DDP's plain mean is wrong there
    for case in cases:
        got = ranks.run(within, n, train, DataParallel, name, quiet=True, bucket_mb=0.0005, **case)
        same(on_all(got, n), train_alone(name, **case), what=str(case))
    ddp = ranks.run(within, n, train, DistributedDataParallel, name, quiet=True)
    same(on_all(ddp, n), train_alone(name), what="DDP")


# ---- frozen, tied, unused -------------------------------------------------------------------------------------


def unused_on_some(extra_on, accumulate=False, **options):
    rank, n = dist.get_rank(), dist.get_world_size()
    model = DataParallel(Net(seed=rank), find_unused_parameters=True, bucket_mb=TINY, **options)
    x, y = (t.chunk(n)[rank] for t in batch(0))
    if accumulate:
        with model.no_sync():
            cross_entropy(model(x, extra=rank in extra_on), y).backward()
        cross_entropy(model(x, extra=False), y).backward()
    else:
        cross_entropy(model(x, extra=rank in extra_on), y).backward()
    return gradients(model)


@pytest.mark.parametrize("extra_on", [[1, 2], [0], [], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_unused_parameters(ranks_of, extra_on, accumulate):
    alone, (x, y) = Net(), batch(0)
    for rank in range(4):
        for extra in [rank in extra_on] + [False] * accumulate:
            (cross_entropy(alone(x.chunk(4)[rank], extra=extra), y.chunk(4)[rank]) / 4).backward()
    got = ranks_of(4).run(unused_on_some, extra_on, accumulate, quiet=True)
    for one in got:
        same(one, gradients(alone))
    assert (got[0]["extra.weight"] is None) == (not extra_on), "unused on all ranks: None"
    assert got[0]["frozen.weight"] is None


# ---- accumulation ---------------------------------------------------------------------------------------------


def accumulate(set_to_none=True, micro=3):
    rank, n = dist.get_rank(), dist.get_world_size()
    model = DataParallel(Net(seed=rank), bucket_mb=TINY)
    optimizer = optimizer_of("adamw", model)
    for step in range(4):
        optimizer.zero_grad(set_to_none)
        parts = [[t.chunk(micro)[i] for t in (t.chunk(n)[rank] for t in batch(step, 24))] for i in range(micro)]
        with model.no_sync():
            for x, y in parts[:-1]:
                (cross_entropy(model(x), y) / micro).backward()
        x, y = parts[-1]
        (cross_entropy(model(x), y) / micro).backward()
        optimizer.step()
    return state(model)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_equals_one_process_and_sends_once(ranks_of, set_to_none):
    ranks = ranks_of(4)
    trace = ranks.trace(accumulate, set_to_none)
    same(on_all(trace.results, 4), train_alone("adamw", rows=24, steps=4))
    assert trace.bytes("all_reduce", 0) == 4 * trainable_bytes(Net())


def backward_twice():
    """Without zero_grad: what is there already is averaged, another mean is added, as DDP does."""
    rank, n = dist.get_rank(), dist.get_world_size()
    model = DataParallel(Net(seed=rank))
    for step in range(2):
        x, y = (t.chunk(n)[rank] for t in batch(step))
        cross_entropy(model(x), y).backward()
    return gradients(model)


def test_two_backwards_add_up(ranks_of):
    alone = Net()
    for step in range(2):
        x, y = batch(step)
        cross_entropy(alone(x), y).backward()
    same(on_all(ranks_of(4).run(backward_twice, quiet=True), 4), gradients(alone))


# ---- buckets and bytes ----------------------------------------------------------------------------------------


def step_in_world(n, dtype=torch.float32, comm_hook=None, **options):
    options |= {"comm_hook": comm_hook} if comm_hook else {}
    return in_world(n, lambda: one_step(DataParallel, dtype, **options))


def by_ring(bucket, group):
    ring_all_reduce(bucket.flat, group=group)
    return lambda: None


@pytest.mark.parametrize("n", WORLDS)
def test_bytes_of_a_step(ranks_of, n):
    """S per rank to all_reduce; as a ring 2·(n − 1)/n·S are sent, exactly where n divides each bucket."""
    ranks, model = ranks_of(4), Net(dtype=torch.float32)
    size = trainable_bytes(model)
    trace = ranks.trace(step_in_world, n)
    assert [trace.bytes("all_reduce", rank) for rank in range(n)] == [size] * n
    trace = ranks.trace(step_in_world, n, find_unused_parameters=True)
    assert trace.bytes("all_reduce", 0) == size + sum(p.requires_grad for p in model.parameters())
    trace = ranks.trace(step_in_world, n, comm_hook=by_ring)
    elements = size // 4
    sizes = [elements // n + (i < elements % n) for i in range(n)]
    expected = [4 * (2 * elements - sizes[r] - sizes[(r + 1) % n]) if n > 1 else 0 for r in range(n)]
    assert [trace.bytes("send", rank) for rank in range(n)] == expected
    if elements % n == 0:
        assert expected == [2 * (n - 1) * size / n] * n


def look_at_buckets():
    model = DataParallel(Net(), bucket_mb=0.0005, first_bucket_mb=TINY)  # 524 and 105 bytes
    names = [[model.names[p] for p in bucket.parameters] for bucket in model.buckets]
    cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    inside = all(p.grad is view and view.data_ptr() >= b.flat.data_ptr() for b in model.buckets
                 for p, view in zip(b.parameters, b.views, strict=True))  # fmt: skip
    return names, inside


def test_buckets_go_backwards_the_first_one_small_and_gradients_live_in_them(ranks_of):
    for names, inside in ranks_of(4).run(look_at_buckets, quiet=True):
        assert inside
        assert names == [
            ["out.bias", "out.weight"], ["extra.bias", "extra.weight"],
            ["again.bias", "fc2.bias", "fc2.weight"], ["fc1.bias", "fc1.weight"],
        ]  # fmt: skip


def test_several_dtypes_and_a_bucket_for_each(ranks_of):
    for got, expected in ranks_of(4).run(mixed_dtypes, quiet=True):
        same(got, expected, torch.float32)


def mixed_dtypes():
    rank = dist.get_rank()
    torch.manual_seed(rank)
    layers = nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 4), nn.Linear(4, 4).double())
    model, x = DataParallel(layers), torch.randn(3, 4, dtype=torch.float64)
    assert len(model.buckets) == 2

    def forward():
        return layers[2](layers[1](layers[0](x).float()).double()).square().mean()

    forward().backward()
    got = {name: g.double() for name, g in gradients(layers).items()}
    expected = dict.fromkeys(got, 0)
    grads = torch.autograd.grad(forward(), list(layers.parameters()))
    for name, g in zip(got, grads, strict=True):
        dist.all_reduce(g)
        expected[name] = g.double() / 4
    return {n: g.float() for n, g in got.items()}, {n: g.float() for n, g in expected.items()}


def order_of_starts(overlap):
    """Gradients arrive in another order on odd ranks."""
    rank, started = dist.get_rank(), []

    def hook(bucket, group):
        started.append(bucket.index)
        return dist.all_reduce(bucket.flat, group=group, async_op=True).wait

    layers = nn.ModuleList([nn.Linear(4, 4, dtype=torch.float64) for _ in range(4)])
    model = DataParallel(layers, bucket_mb=TINY, first_bucket_mb=TINY, overlap=overlap, comm_hook=hook)
    x = torch.randn(3, 4, dtype=torch.float64)
    for i in [0, 1, 2, 3] if rank % 2 else [3, 1, 0, 2]:
        x = layers[i](x)
    x.square().mean().backward()
    return started, len(model.buckets)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_order_of_buckets_does_not_depend_on_who_is_ready_first(ranks_of, overlap):
    for started, count in ranks_of(4).run(order_of_starts, overlap, quiet=True):
        assert started == list(range(count)) and count > 3


def started_during_backward(overlap):
    """Buckets under way when the first layer's gradient, the last one, is computed; and when backward is over."""
    started, seen = [], []

    def hook(bucket, group):
        started.append(bucket.index)
        return dist.all_reduce(bucket.flat, group=group, async_op=True).wait

    model = DataParallel(Net(), bucket_mb=TINY, first_bucket_mb=TINY, overlap=overlap, comm_hook=hook)
    model.module.fc1.weight.register_hook(lambda gradient: seen.append(len(started)))
    cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    return seen[0], len(started), len(model.buckets)


def test_buckets_travel_while_backward_computes(ranks_of):
    for early, started, count in ranks_of(4).run(started_during_backward, True, quiet=True):
        assert started == count and early >= count - 2
    for early, started, count in ranks_of(4).run(started_during_backward, False, quiet=True):
        assert started == count and early == 0


# ---- the start, groups ----------------------------------------------------------------------------------------


def equal_start():
    model = DataParallel(Net(seed=10 + dist.get_rank()))
    return {name.removeprefix("module."): t for name, t in state(model).items()}


def test_every_rank_takes_over_the_first_ones_parameters_and_buffers(ranks_of):
    got = ranks_of(4).run(equal_start, quiet=True)
    for one in got:
        assert all(torch.equal(one[name], t) for name, t in Net(seed=10).state_dict().items())


def in_pairs():
    rank = dist.get_rank()
    groups = [group_of([0, 2]), group_of([1, 3])]
    model = DataParallel(Net(seed=rank), group=groups[rank % 2])
    x, y = (t.chunk(4)[rank] for t in batch(0))
    cross_entropy(model(x), y).backward()
    return gradients(model)


def test_a_group_of_some_ranks(ranks_of):
    got = ranks_of(4).run(in_pairs, quiet=True)
    for members in ([0, 2], [1, 3]):
        alone, (x, y) = Net(seed=members[0]), batch(0)
        for rank in members:
            (cross_entropy(alone(x.chunk(4)[rank]), y.chunk(4)[rank]) / 2).backward()
        for rank in members:
            same(got[rank], gradients(alone))


def unwrapped():
    net = Net()
    model = DataParallel(net)
    assert model.unwrap() is net
    with torch.no_grad():
        net.out.bias += dist.get_rank()
    DataParallel(net)  # gone at once: another one may take over
    again = DataParallel(net)
    cross_entropy(again(batch(0)[0]), batch(0)[1]).backward()
    return state(again)


def test_unwrap_lets_a_module_be_wrapped_anew(ranks_of):
    on_all(ranks_of(4).run(unwrapped, quiet=True), 4)


def broadcasts_buffers():
    model = DataParallel(Net(), broadcast_buffers=True)
    model.module.shift.fill_(dist.get_rank() + 5)
    model.eval()
    model(batch(0)[0])  # in evaluation nothing is sent: one rank may do it alone
    before = model.module.shift.clone()
    model.train()
    model(batch(0)[0])
    return before[0].item(), model.module.shift[0].item()


def test_buffers_again_each_forward_where_asked_for(ranks_of):
    trace = ranks_of(4).trace(broadcasts_buffers)
    assert trace.results == [(rank + 5, 5) for rank in range(4)]


class Drifts(nn.Module):
    """A buffer that backward needs, and that each forward replaces by another one, on each rank."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("factor", torch.ones(4))

    def forward(self, x):
        y = self.linear(x) * self.factor
        self.factor = self.factor + dist.get_rank() + 1
        return y


def called_twice(kind, net):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4).train(net != "statistics that stand still")
    made = Drifts() if net == "drifts" else nn.Sequential(nn.Linear(4, 4), norm)
    own = {"sync_batch_norm": False} if kind is DataParallel else {}
    model = kind(made.double(), broadcast_buffers=True, **own)
    x = torch.randn(6, 4, dtype=torch.float64) + dist.get_rank()
    (model(x).square().mean() + model(x + 1).square().mean()).backward()  # as a GAN's discriminator is called
    return {**gradients(model.module), **dict(model.module.named_buffers())}


@since("2.13", "torch's own DDP cannot do it")
@pytest.mark.parametrize("net", ["norm", "statistics that stand still", "drifts"])
def test_buffers_come_anew_between_two_forwards_of_one_backward(ranks_of, net):
    theirs = ranks_of(4).run(called_twice, DistributedDataParallel, net, quiet=True)
    for got, expected in zip(ranks_of(4).run(called_twice, DataParallel, net, quiet=True), theirs, strict=True):
        same(got, expected, torch.float64, net)


# ---- what models and training loops do besides ----------------------------------------------------------------


def after_a_failed_backward():
    """A backward that raises half way leaves nothing behind (on a world of one: nobody waits)."""
    model = DataParallel(Net())
    x, y = batch(0)
    output = model(x)
    handle = model.module.fc1.weight.register_hook(lambda g: 1 / 0)
    try:
        cross_entropy(output, y).backward()
    except ZeroDivisionError:
        pass
    handle.remove()
    model.zero_grad()
    cross_entropy(model(x), y).backward()
    return gradients(model)


def test_a_backward_after_one_that_failed(ranks_of):
    alone, (x, y) = Net(), batch(0)
    cross_entropy(alone(x), y).backward()
    same(ranks_of(4).run(in_world, 1, after_a_failed_backward, quiet=True)[0], gradients(alone))


def regression():
    """Images through convolutions, channels-last memory, a 2-d BatchNorm: layouts that differ from the bucket's."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).double()
    x, y = torch.randn(8, 3, 4, 4, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    alone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).double()
    alone.load_state_dict(net.state_dict())
    mse_loss(alone(x), y).backward()
    model = DataParallel(net.to(memory_format=torch.channels_last))
    mine = x.chunk(4)[rank].contiguous(memory_format=torch.channels_last)
    mse_loss(model(mine), y.chunk(4)[rank]).backward()
    return gradients(model), gradients(alone)


def test_convolutions_in_channels_last(ranks_of):
    for got, want in ranks_of(4).run(regression, quiet=True):
        same(got, want)


def failing_on_all_ranks():
    """The first layers' gradients raise while the last ones' are under way; the next step must not see them."""
    rank, bad = dist.get_rank(), 0
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(6, 200), nn.Linear(200, 200), nn.Linear(200, 6)).double()
    model, (x, _) = DataParallel(copy.deepcopy(alone), bucket_mb=TINY, first_bucket_mb=TINY), batch(0)
    alone(x).square().mean().backward()
    for _ in range(20):
        handle = model.module[0].weight.register_hook(lambda g: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(100 * x.chunk(4)[rank]).square().mean().backward()
        handle.remove()
        model.zero_grad()
        model(x.chunk(4)[rank]).square().mean().backward()
        bad += any((p.grad - q.grad).abs().max() > 1e-9
                   for p, q in zip(model.parameters(), alone.parameters(), strict=True))  # fmt: skip
        model.zero_grad()
    return bad


def test_what_a_failed_backward_had_sent_does_not_reach_the_next(ranks_of):
    assert ranks_of(4).run(failing_on_all_ranks, quiet=True) == [0] * 4


def copies():
    """A deep copy, and one that was saved and loaded, average their own gradients, not the first model's."""
    model, (x, y) = DataParallel(Net(), bucket_mb=TINY), batch(0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found = []
    for one in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        cross_entropy(one(x.chunk(4)[dist.get_rank()]), y.chunk(4)[dist.get_rank()]).backward()
        assert all(p.grad is None for p in model.parameters())
        found.append(gradients(one))
    return found


def test_copies_average_too(ranks_of):
    alone, (x, y) = Net(), batch(0)
    cross_entropy(alone(x), y).backward()
    for found in ranks_of(4).run(copies, quiet=True):
        for one in found:
            same(one, gradients(alone))


def odd_buffers():
    module = nn.Linear(2, 2)
    for dtype in (torch.int16, torch.uint16, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.bfloat16):
        module.register_buffer(f"a {str(dtype)[6:]}", torch.full((3,), 1 - dist.get_rank() // 2).to(dtype))
    module.register_buffer("nothing", torch.empty(0))
    return all(b.to(torch.complex64).real.eq(1).all() for b in DataParallel(module).module.buffers())


def test_buffers_of_every_dtype_are_taken_over(ranks_of):
    assert all(ranks_of(4).run(odd_buffers, quiet=True))


class Odd(nn.Module):
    """Parameters that are complex, without dimensions, empty, transposed; one whose function gives it no gradient."""

    def __init__(self):
        super().__init__()
        self.complex = nn.Parameter(torch.randn(6, 4, dtype=torch.complex128))
        self.empty, self.turned = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.randn(6, 4).t())
        self.scalar, self.none = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(2))

    def forward(self, x):
        y = (x.to(torch.complex128) @ self.complex).abs() + x @ self.turned.t().double()
        return GivesNone.apply(y * self.scalar + self.empty.sum(), self.none)


class GivesNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, None


def odd_parameters():
    torch.manual_seed(0)
    alone, (x, _) = Odd(), batch(0)
    model = DataParallel(copy.deepcopy(alone), find_unused_parameters=True)
    model(x.chunk(4)[dist.get_rank()]).square().mean().backward()
    alone(x).square().mean().backward()
    got, want = gradients(model), gradients(alone)
    same({"complex": got.pop("complex")}, {"complex": want.pop("complex")})
    same(got, want, torch.float32)


def test_odd_parameters(ranks_of):
    ranks_of(4).run(odd_parameters, quiet=True)


def fused(kind):
    """An optimizer that goes through weight and gradient in the order of their memory."""
    torch.manual_seed(0)
    model = kind(nn.Conv2d(3, 4, 3, dtype=torch.float64).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for step in range(3):
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(model)


def test_fused_optimizers_and_channels_last(ranks_of):
    want = fused(lambda module: module)
    for got in ranks_of(4).run(fused, DataParallel, quiet=True):
        same(got, want)


def with_sharded_state():
    model = DataParallel(Net(seed=dist.get_rank()))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = ShardedOptimizer(trained, torch.optim.AdamW, lr=0.01, reduce_gradients=False)
    for step in range(20):
        x, y = (t.chunk(4)[dist.get_rank()] for t in batch(step))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return state(model)


def test_with_an_optimizer_whose_state_is_sharded(ranks_of):
    same(on_all(ranks_of(4).run(with_sharded_state, quiet=True), 4), train_alone("adamw"))


def frozen_between_steps(on):
    model, (x, y) = DataParallel(Net(), bucket_mb=TINY, find_unused_parameters=True), batch(0)
    model.module.extra.requires_grad_(dist.get_rank() not in on)
    cross_entropy(model(x.chunk(4)[dist.get_rank()]), y.chunk(4)[dist.get_rank()]).backward()
    return gradients(model)


def test_what_is_frozen_later_counts_as_unused(ranks_of):
    alone, (x, y) = Net(), batch(0)
    alone.extra.requires_grad_(False)
    cross_entropy(alone(x), y).backward()
    same(on_all(ranks_of(4).run(frozen_between_steps, range(4), quiet=True), 4), gradients(alone))
    on_some = on_all(ranks_of(4).run(frozen_between_steps, [1], quiet=True), 4)
    assert on_some["extra.weight"].any(), "the ranks stay equal even so"
