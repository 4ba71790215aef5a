"""DataParallel: against one process with the whole batch, against DistributedDataParallel, and to the byte."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pardist_lib import RankError
from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.collectives import ring_all_reduce
from pardist_lib.mechanisms.data_parallel import DataParallel, naive_average
from pardist_lib.mechanisms.data_parallel.sync_batch_norm import SyncBatchNorm
from pardist_lib.mechanisms.sharded.optimizer import ShardedOptimizer
from tests.mechanisms.refusals import refused

WORLDS = [1, 2, 3, 4]
TINY = 1e-4  # MB, about 100 bytes: many buckets


class Net(nn.Module):
    """A weight used twice, a frozen layer, BatchNorm where asked for, and layers that are used when told to."""

    def __init__(self, seed=0, dtype=torch.float64, norm=False):
        super().__init__()
        self.fc1, self.fc2, self.again = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.frozen, self.extra, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        numbers = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=numbers, dtype=torch.float64) / 2
        self.again.weight = self.fc2.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("shift", torch.full((8,), float(seed)))
        self.to(dtype)

    def forward(self, x, extra=True):
        x = self.norm(torch.tanh(self.fc1(x)))  # a bias before it would have no gradient
        x = self.frozen(torch.tanh(self.again(torch.tanh(self.fc2(x))))) + 0.01 * self.shift
        return self.out(self.extra(x) if extra else x)


def batch(step, rows=12, dtype=torch.float64):
    numbers = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(rows, 6, generator=numbers, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 5, (rows,), generator=numbers)


def optimizer_of(name, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(parameters, lr=0.01)


def state(model):
    return {name.removeprefix("module."): t.detach().clone() for name, t in model.state_dict().items()}


def gradients(model):
    return {name.removeprefix("module."): p.grad if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()}  # fmt: skip


def same(got, want, dtype=torch.float64, what=""):
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    assert got.keys() == want.keys()
    for name in want:
        if want[name] is None or got[name] is None:
            assert got[name] is None and want[name] is None, f"{what} {name}"
        else:
            torch.testing.assert_close(got[name], want[name], **tolerance, msg=lambda t, n=name: f"{what} {n}: {t}")


def within(n, fn, *args, **kwargs):
    return in_world(n, lambda: fn(*args, **kwargs))


def on_all(results, n):
    """The results of the n ranks of a smaller world, which all have to be equal."""
    for result in results[1:n]:
        same(result, results[0])
    return results[0]


# ---- one step: outputs, loss, every gradient ------------------------------------------------------------------


def one_step(kind, dtype, **options):
    model = Net(seed=dist.get_rank(), dtype=dtype)  # the ranks begin differently
    model = kind(model, **options)
    x, y = batch(0, dtype=dtype)
    x, y = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in (x, y))
    x.requires_grad_()
    output = model(x)
    loss = cross_entropy(output, y)
    loss.backward()
    return output.detach(), loss.detach(), x.grad, gradients(model)


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


# ---- twenty steps ---------------------------------------------------------------------------------------------


def train(kind, name, norm=False, rows=12, clip=None, steps=20, **options):
    model = kind(Net(seed=dist.get_rank(), norm=norm), **options)
    optimizer, (rank, n) = optimizer_of(name, model), (dist.get_rank(), dist.get_world_size())
    for step in range(steps):
        x, y = (t.tensor_split(n)[rank] for t in batch(step, rows))
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        if rows % n:
            loss = loss * model.weight(len(x))
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return state(model)


def train_alone(name, norm=False, rows=12, clip=None, steps=20):
    model = Net(norm=norm)
    optimizer = optimizer_of(name, model)
    for step in range(steps):
        x, y = batch(step, rows)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return state(model)


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


def test_plain_batch_norm_is_another_function(ranks_of):
    """So that the test above is seen to need SyncBatchNorm."""
    whole = train_alone("sgd", norm=True)["fc1.weight"]
    apart = ranks_of(4).run(train, DataParallel, "sgd", norm=True, sync_batch_norm=False, quiet=True)[0]["fc1.weight"]
    assert (whole - apart).abs().max() > 1e-3


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


def test_unused_parameters_are_named(ranks_of):
    with pytest.raises(RankError, match="extra.* and 1 more got no gradient on rank .*find_unused_parameters=True"):
        ranks_of(4).run(forgets_that_some_are_unused, quiet=True)


def forgets_that_some_are_unused():
    model = DataParallel(Net())
    model(batch(0)[0], extra=False).sum().backward()


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


def trainable_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


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


def test_a_hook_that_returns_nothing_is_named(ranks_of):
    def step():
        model = DataParallel(Net(), comm_hook=lambda bucket, group: None)
        with pytest.raises(TypeError, match="comm_hook returned None: a function that waits"):
            cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()

    ranks_of(1).run(step, quiet=True)


# ---- the start, groups, the naive version ---------------------------------------------------------------------


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


# ---- uneven: weights, and ranks that run out ------------------------------------------------------------------


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


# ---- BatchNorm ------------------------------------------------------------------------------------------------

NORMS = [
    (nn.BatchNorm1d, (3,), {}), (nn.BatchNorm1d, (3, 4), {"affine": False}), (nn.BatchNorm2d, (3, 2, 2), {}),
    (nn.BatchNorm2d, (3, 2, 2), {"momentum": None}), (nn.BatchNorm3d, (3, 2, 1, 2), {"track_running_stats": False}),
]  # fmt: skip


def normalised(norm, x, upstream):
    """(output, x's gradient, parameters' gradients, buffers) after two batches of training, and an output in
    evaluation."""
    torch.manual_seed(0)
    for p in norm.parameters():
        p.data = torch.randn_like(p)
    for part, up in zip(x, upstream, strict=True):
        part.requires_grad_()
        output = norm(part)
        (output * up).sum().backward()
    trained = output.detach(), x[-1].grad, *[p.grad for p in norm.parameters()], *norm.buffers()
    return trained, norm.eval()(x[0].detach()) if norm.track_running_stats else None


def sync_normalised(kind, options, x, upstream, sizes):
    rank, norm = dist.get_rank(), SyncBatchNorm.convert(kind(3, dtype=torch.float64, **options))
    mine = [[t.split(sizes)[rank].clone() for t in part] for part in (x, upstream)]
    return normalised(norm, *mine)


@pytest.mark.parametrize("n, sizes", [(1, [5]), (2, [3, 4]), (3, [2, 0, 3]), (4, [1, 1, 1, 1]), (4, [4, 1, 0, 2])])
def test_sync_batch_norm_equals_one_process(ranks_of, n, sizes):
    for kind, shape, options in NORMS:
        numbers = torch.Generator().manual_seed(1)
        x = [100 + torch.randn(sum(sizes), *shape, generator=numbers, dtype=torch.float64) for _ in range(2)]
        upstream = [torch.randn(sum(sizes), *shape, generator=numbers, dtype=torch.float64) for _ in range(2)]
        got = ranks_of(4).run(within, n, sync_normalised, kind, options, x, upstream, sizes, quiet=True)[:n]
        want, evaluated = normalised(kind(3, dtype=torch.float64, **options), x, upstream)
        trained = [one for one, _ in got]
        output, dx = (torch.cat(parts) for parts in zip(*(t[:2] for t in trained), strict=True))
        parameters = 0 if options.get("affine") is False else 2
        sums = [sum(parts) for parts in zip(*(t[2 : 2 + parameters] for t in trained), strict=True)]
        for one in trained:
            for a, b in zip([output, dx, *sums, *one[2 + parameters :]], want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        if evaluated is not None:
            torch.testing.assert_close(torch.cat([e for _, e in got]), evaluated, rtol=1e-9, atol=1e-10)


def norm_of_one_row():
    SyncBatchNorm(3)(torch.randn(1 if dist.get_rank() == 0 else 0, 3))


def test_sync_batch_norm_of_one_value(ranks_of):
    with pytest.raises(RankError, match="two values for each channel over all ranks, there is 1"):
        ranks_of(4).run(norm_of_one_row, quiet=True)


def norm_bytes():
    norm = SyncBatchNorm(3, dtype=torch.float64)
    norm(torch.randn(5, 3, 2, 2, dtype=torch.float64)).square().sum().backward()


def test_bytes_of_sync_batch_norm(ranks_of):
    trace = ranks_of(4).trace(norm_bytes)
    assert [trace.bytes("all_gather", r) for r in range(4)] == [7 * 8] * 4
    assert [trace.bytes("all_reduce", r) for r in range(4)] == [6 * 8] * 4


def norm_of_halves(dtype):
    """(output, running variance, the weight's gradient) of 70,000 rows on each rank, and the same of torch's."""
    rank, found = dist.get_rank(), []
    x = (5 + torch.randn(280_000, 2, generator=torch.Generator().manual_seed(0))).to(dtype)
    for norm, part in ((nn.BatchNorm1d(2), x), (SyncBatchNorm(2), x.chunk(4)[rank])):
        y = norm(part)
        y.float().square().mean().backward()
        found.append((y.detach()[:5] if part is x else y.detach(), norm.running_var, norm.weight.grad))
    y = torch.stack([found[1][0][:5] if r == rank else torch.zeros(5, 2, dtype=dtype) for r in range(4)])[0]
    return (y if rank == 0 else found[0][0]), *found[1][1:], *found[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sync_batch_norm_of_16_bits(ranks_of, dtype):
    """A count of 70,000 is none in float16, and a sum of so many squares neither."""
    results = ranks_of(4).run(norm_of_halves, dtype, quiet=True)
    for y, var, _, want, want_var, _ in results:
        assert y.dtype == want.dtype == dtype
        torch.testing.assert_close(y, want, rtol=0.01, atol=0.01)
        torch.testing.assert_close(var, want_var, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sum(r[2] for r in results) / 4, results[0][5], rtol=0.01, atol=0.01)


class Shares(nn.Module):
    """One BatchNorm in three places, one without weight or bias before an operation in place, one without bias."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.bare = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False)
        self.again = self.norm
        self.rest = nn.Sequential(self.norm, nn.Tanh(), self.bare, nn.ReLU(inplace=True), nn.BatchNorm1d(6, bias=False))

    def forward(self, x):
        return self.rest(self.again(self.norm(self.fc(x)).tanh()))


def one_in_several_places():
    torch.manual_seed(0)
    alone = Shares().double()
    model, (x, _) = DataParallel(copy.deepcopy(alone)), batch(0)
    model(x.chunk(4)[dist.get_rank()]).pow(3).mean().backward()
    alone(x).pow(3).mean().backward()
    same(gradients(model), gradients(alone))
    same(state(model), state(alone))


def test_batch_norm_in_several_places_and_in_place(ranks_of):
    ranks_of(4).run(one_in_several_places, quiet=True)


def norm_between_layers_that_some_use():
    rank = dist.get_rank()
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 6)]).double()
    model, x = DataParallel(layers, find_unused_parameters=True, bucket_mb=TINY, first_bucket_mb=TINY), batch(0)[0]
    y = layers[1](layers[0](x.chunk(4)[rank]))
    if rank % 2:
        y = layers[3](y)
    layers[2](y).square().mean().backward()
    return gradients(model)


def test_layers_that_some_use_beside_batch_norm(ranks_of):
    """All calls have to come in one order: a bucket that waits for an unused layer would come after the norm's call."""
    on_all(ranks_of(4).run(norm_between_layers_that_some_use, quiet=True), 4)


# ---- bad input ------------------------------------------------------------------------------------------------


def wrap_twice():
    DataParallel(nn.Sequential(DataParallel(Net()), nn.ReLU()))


def wrap_the_same_module_twice():
    net = Net()
    first = DataParallel(net)
    DataParallel(net)
    return first


def wrap_ddp():
    DataParallel(DistributedDataParallel(Net()))


def different_shape():
    DataParallel(nn.Linear(4, 5 if dist.get_rank() == 2 else 4))


def different_dtype():
    DataParallel(nn.Linear(4, 4, dtype=torch.float64 if dist.get_rank() else torch.float32))


def different_count():
    DataParallel(nn.Sequential(*[nn.Linear(4, 4) for _ in range(1 + dist.get_rank() // 3)]))


def frozen_on_one():
    DataParallel(nn.Linear(4, 4).requires_grad_(dist.get_rank() != 1))


def nothing_to_train():
    DataParallel(nn.Linear(4, 4).requires_grad_(False))


def no_bucket(mb=0):
    DataParallel(Net(), bucket_mb=mb)


def batch_smaller_than_the_world():
    model = DataParallel(Net())
    x, _ = batch(0, 3)
    return model(x.tensor_split(4)[dist.get_rank()])


def no_batch_at_all():
    model = DataParallel(Net())
    return list(model.join(list(batch(0, 3)[0].split(1))[dist.get_rank() :][:1]))


def no_tensors():
    return list(DataParallel(Net()).join([3, 4]))


def sparse():
    model = DataParallel(nn.Embedding(5, 4, sparse=True))
    model(torch.tensor([1, 2])).sum().backward()


def rows_by_name_missing():
    DataParallel(nn.Linear(6, 6))(input=batch(0, 3)[0].float().tensor_split(4)[dist.get_rank()])


def unfrozen_later():
    model = DataParallel(Net())
    model.module.frozen.requires_grad_(True)
    model(batch(0)[0])


def added_later():
    model = DataParallel(nn.Sequential(nn.Linear(6, 6)))
    model.module.append(nn.Linear(6, 2))
    model(batch(0)[0].float())


def reentrant(**options):
    layers = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
    model = DataParallel(layers, **options)
    x = checkpoint(layers[1], layers[0](batch(0)[0].float()), use_reentrant=True)
    layers[2](x).sum().backward()
    return model


def reentrant_and_unused():
    reentrant(find_unused_parameters=True)


def frozen_later():
    model = DataParallel(Net())
    model.module.extra.requires_grad_(False)
    model(batch(0)[0]).sum().backward()


def averaged_twice():
    model = DataParallel(Net())
    optimizer = ShardedOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    model(batch(0)[0]).sum().backward()
    return optimizer


def stepped_in_backward():
    model = DataParallel(Net())
    model.module.out.bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    model(batch(0)[0]).sum().backward()


def negative_rows():
    DataParallel(Net()).weight(-1)


def differentiable_mean():
    model = DataParallel(Net())
    model(batch(0)[0]).square().sum().backward(create_graph=True)


def kept_by_nobody():
    DataParallel(Net())(batch(0)[0]).sum().backward()


def rows_of_bounded_length():
    DataParallel(nn.Embedding(5, 4, max_norm=1.0))


def another_order_in_memory():
    layout = torch.channels_last if dist.get_rank() == 2 else torch.contiguous_format
    DataParallel(nn.Conv2d(3, 4, 3).to(memory_format=layout))


def another_batch_norm():
    class Rectified(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x).relu()

    DataParallel(nn.Sequential(nn.BatchNorm1d(6), Rectified(6)))


def other_channels():
    SyncBatchNorm(3, affine=False)(torch.ones(4, 5))


def outside_the_group():
    DataParallel(Net(), group=group_of([0, 1]))


BAD = [
    (wrap_twice, "0 is a DataParallel already"),
    (wrap_the_same_module_twice, "another DataParallel averages these parameters already: .* unwrap"),
    (wrap_ddp, "the module is a DistributedDataParallel already"),
    (different_shape, r"where rank 0 has parameter weight, .*\[4, 4\], rank 2 has parameter weight, .*\[5, 4\]\."),
    (different_dtype, r"where rank 0 has parameter weight, float32 .*, rank 1 has parameter weight, float64"),
    (different_count, r"where rank 0 has nothing more, rank 3 has parameter 1\.weight, .*\. Build the same"),
    (frozen_on_one, r"where rank 0 has parameter weight, float32 \[4, 4\], rank 1 has parameter weight, .*, frozen\."),
    (nothing_to_train, "Linear has no trainable parameters"),
    (no_bucket, "bucket_mb is a size above 0, not 0"),
    (batch_smaller_than_the_world, r"rank 3 has no rows: this batch is smaller than the 4 ranks.*model\.join"),
    (no_batch_at_all, "1 of 4 ranks have no batch at all"),
    (no_tensors, "join needs batches with tensors in them, not int"),
    (sparse, "the gradient of weight is sparse"),
    (outside_the_group, "rank [23] is not in this group"),
    (rows_by_name_missing, "rank 3 has no rows"),
    (unfrozen_later, "frozen.weight is to be trained, but was not when the module was wrapped"),
    (added_later, "1.weight is to be trained, but was not when .* DataParallel"),
    (reentrant, "checkpoint.*use_reentrant=False"),
    (reentrant_and_unused, "checkpoint.*use_reentrant=False"),
    (negative_rows, "rows is how many rows this rank has, 0 or more, not -1"),
    (differentiable_mean, r"create_graph=True.*torch\.autograd\.grad"),
    (frozen_later, "extra.weight and 1 more got no gradient .* before wrapping, or pass find_unused_parameters=True"),
    (averaged_twice, "a hook has taken or replaced the gradient of .*ShardedOptimizer.*reduce_gradients=False"),
    (stepped_in_backward, "a hook has taken or replaced the gradient of out.bias before it was averaged"),
    (kept_by_nobody, "the DataParallel .* is gone: keep it, or unwrap"),
    (rows_of_bounded_length, "the module has max_norm=1.0: .* max_norm=None"),
    (another_order_in_memory, r"rank 2 has parameter weight, float32 \[4, 3, 3, 3\] with strides \[27, 1, 9, 3\]"),
    (another_batch_norm, "Rectified is a BatchNorm with a forward of its own.*sync_batch_norm=False"),
    (other_channels, "expected 3 channels, got 5"),
]


@pytest.mark.parametrize("wrong, said", BAD, ids=[wrong.__name__ for wrong, _ in BAD])
def test_bad_input_is_named(ranks_of, wrong, said):
    with refused(said):
        ranks_of(4).run(wrong, quiet=True)


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


# ---- what models and training loops do besides ----------------------------------------------------------------


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
