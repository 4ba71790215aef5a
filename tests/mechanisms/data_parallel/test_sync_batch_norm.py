"""BatchNorm over the rows of all ranks: against one process with all of them, and to the byte."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib import RankError
from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.data_parallel.sync_batch_norm import SyncBatchNorm
from tests.mechanisms.data_parallel.nets import TINY, batch, gradients, on_all, same, state, train, train_alone, within
from tests.mechanisms.refusals import refused
from tests.versions import since


def test_plain_batch_norm_is_another_function(ranks_of):
    """So that test_twenty_steps_equal_one_process_and_ddp is seen to need SyncBatchNorm."""
    whole = train_alone("sgd", norm=True)["fc1.weight"]
    apart = ranks_of(4).run(train, DataParallel, "sgd", norm=True, sync_batch_norm=False, quiet=True)[0]["fc1.weight"]
    assert (whole - apart).abs().max() > 1e-3


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


@since("2.13", "a BatchNorm takes no bias=")
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


def another_batch_norm():
    class Rectified(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x).relu()

    DataParallel(nn.Sequential(nn.BatchNorm1d(6), Rectified(6)))


def other_channels():
    SyncBatchNorm(3, affine=False)(torch.ones(4, 5))


BAD = [
    (another_batch_norm, "Rectified is a BatchNorm with a forward of its own.*sync_batch_norm=False"),
    (other_channels, "expected 3 channels, got 5"),
]


@pytest.mark.parametrize("wrong, said", BAD, ids=[wrong.__name__ for wrong, _ in BAD])
def test_bad_input_is_named(ranks_of, wrong, said):
    with refused(said):
        ranks_of(4).run(wrong, quiet=True)
