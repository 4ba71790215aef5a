"""DP-SGD: clipped sums against a loop over rows, the noise's scale, the accountant."""

import math

import pytest
import torch
import torch.distributed as dist
from scipy.stats import chi2
from torch import nn

from pardist_lib import RankError
from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.private import (
    clip_and_sum,
    epsilon,
    noise_generator,
    per_sample_gradients,
    poisson_rows,
    private_gradient,
)
from tests.mechanisms.nets import Net, fails, same, state


def rows(b, seed=0, dtype=torch.float64):
    x = torch.randn(b, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x, x.roll(1, 1)


def squares(got, want):
    return (got - want).square().sum(1).mean()


def one_by_one(model, loss, x, y, clip):
    """Row by row with autograd: ({name: sum of clipped gradients}, norms)."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total, norms = {name: torch.zeros_like(p) for name, p in trained.items()}, []
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), y[i : i + 1])
        found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, trained.values(), strict=True)]
        norms.append(math.sqrt(sum(g.square().sum().item() for g in found)))
        for name, g in zip(trained, found, strict=True):
            total[name] += g * min(1.0, clip / norms[-1])
    return total, torch.tensor(norms, dtype=x.dtype)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 3, 2).double(), nn.Linear(6, 6).double()
        self.norm = nn.GroupNorm(3, 3).double()
        generator = torch.Generator().manual_seed(3)
        for p in self.parameters():
            p.data.normal_(generator=generator)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x.view(-1, 1, 2, 3))).flatten(1))


# ---- gradients of single rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: Net(0), Convolution])  # Net: tied, frozen, unused, a buffer
@pytest.mark.parametrize("clip", [1e-3, 3.0, 1e6])
@pytest.mark.parametrize("b", [1, 7])
def test_the_clipped_sum_equals_a_loop_over_rows(make, clip, b):
    model, (x, y) = make(), rows(b)
    total, norms = clip_and_sum(per_sample_gradients(model, squares, x, y), clip)
    want, want_norms = one_by_one(model, squares, x, y, clip)
    same(total, want)
    assert torch.allclose(norms, want_norms, 1e-10, 1e-10)
    assert all(p.grad is None for p in model.parameters())


def test_each_rows_gradient_and_the_bound():
    model, (x, y) = Net(0), rows(9)
    each = per_sample_gradients(model, squares, x, y)
    for i in range(9):
        value = squares(model(x[i : i + 1]), y[i : i + 1])
        got = torch.autograd.grad(value, [model.fc1.weight, model.fc2.weight])
        assert torch.allclose(each["fc1.weight"][i], got[0], 1e-10, 1e-12)
        assert torch.allclose(each["fc2.weight"][i], got[1], 1e-10, 1e-12)  # used by two layers
    clip = 0.5
    for i in range(9):  # without row i the sum moves by at most clip
        rest = [j for j in range(9) if j != i]
        with_it, _ = clip_and_sum(each, clip)
        without, _ = clip_and_sum({name: g[rest] for name, g in each.items()}, clip)
        moved = math.sqrt(sum((with_it[n] - without[n]).square().sum().item() for n in with_it))
        assert moved <= clip * (1 + 1e-12)


def test_float32_no_rows_and_rows_without_gradient():
    model, (x, y) = Net(0, torch.float32), rows(5, dtype=torch.float32)
    total, _ = clip_and_sum(per_sample_gradients(model, squares, x, y), 2.0)
    same(total, one_by_one(model, squares, x, y, 2.0)[0], 1e-5, 1e-6)
    total, norms = clip_and_sum(per_sample_gradients(model, squares, x[:0], y[:0]), 2.0)
    assert norms.shape == (0,) and not any(t.any() for t in total.values())
    still = nn.Linear(6, 6, bias=False).double()
    x, y = rows(3)
    total, norms = clip_and_sum(per_sample_gradients(still, squares, x * 0, x * 0), 2.0)
    assert not norms.any() and not total["weight"].any()  # and no 0 / 0


# ---- on ranks -------------------------------------------------------------------------------------------------


def step(clip, sigma, b=11, seed=0, dtype=torch.float64, group=None):
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    model, (x, y) = Net(0, dtype), rows(b, dtype=dtype)
    mine = [t.tensor_split(n + 1)[rank] if rank else torch.cat([t.tensor_split(n + 1)[i] for i in (0, n)])
            for t in (x, y)]  # fmt: skip
    private_gradient(model, squares, *mine, clip=clip, sigma=sigma, expected=8.0,
                     generator=noise_generator(seed, group), group=group)  # fmt: skip
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, state(model)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_without_noise_to_speak_of_it_is_one_process(ranks_of, n):
    """sigma so small that the noise is below the tolerance; 11 rows or 2, unevenly dealt; some ranks have none."""
    for b in (11, 2):
        want = {k: t / 8 for k, t in one_by_one(Net(0), squares, *rows(b), 1.5)[0].items()}
        for got, after in ranks_of(4).run(in_world, n, step, 1.5, 1e-14, b, quiet=True)[:n]:
            same(got, want)
            same(after, state(Net(0)), 0, 0)  # the weights are the optimizer's to change


def test_groups_and_float32(ranks_of):
    def in_pairs():
        group = [group_of([0, 2]), group_of([1, 3])][dist.get_rank() % 2]
        return step(1.5, 1e-9, dtype=torch.float32, group=group)[0]

    want = {
        k: t / 8 for k, t in one_by_one(Net(0, torch.float32), squares, *rows(11, dtype=torch.float32), 1.5)[0].items()
    }
    for got in ranks_of(4).run(in_pairs, quiet=True):
        same(got, want, 1e-5, 1e-6)


class Wide(nn.Module):
    """Many parameters, so that one step says much about the noise."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 2000).double()

    def forward(self, x):
        return self.fc(x)


def noise(clip, sigma, seed):
    model, (x, _) = Wide(), rows(1)
    private_gradient(model, squares, x[:0], torch.zeros(0, 2000), clip=clip, sigma=sigma, expected=1.0,
                     generator=noise_generator(seed))  # fmt: skip
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("seed", [7, None])
def test_the_sum_has_the_stated_noise(ranks_of, n, seed):
    """Mean square against sigma · clip; outside these bounds with a probability of 2e-10 (chi-square)."""
    got = ranks_of(4).run(in_world, n, noise, 0.4, 3.0, seed, quiet=True)[:n]
    assert all(torch.equal(g, got[0]) for g in got)
    square = (got[0] / (0.4 * 3.0)).square().sum().item()
    assert chi2.isf(1 - 1e-10, got[0].numel()) < square < chi2.isf(1e-10, got[0].numel())
    assert not torch.equal(got[0], ranks_of(4).run(in_world, n, noise, 0.4, 3.0, seed and 8, quiet=True)[0])


def test_payload(ranks_of):
    size = sum(p.numel() * 8 for p in Net(0).parameters() if p.requires_grad)
    trace = ranks_of(4).trace(step, 1.0, 1.0, quiet=True)
    assert {trace.bytes(None, r) for r in range(4)} == {size} and len(trace.collectives) == 4


def test_twenty_steps_equal_one_process_with_the_same_dice(ranks_of):
    """Each rank draws among its own rows; without noise to speak of, one process on all that were drawn."""
    x, y = rows(40)
    mine = [list(range(40))[r::4] for r in range(4)]

    def several():
        rank, model = dist.get_rank(), Net(0)
        optimizer, dice = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), noise_generator(3)
        x, y = (t[mine[rank]] for t in rows(40))
        for _ in range(20):
            some = poisson_rows(len(x), 0.2, dice)
            private_gradient(model, squares, x[some], y[some], clip=1.0, sigma=1e-15, expected=8.0,
                             generator=torch.Generator())  # fmt: skip
            optimizer.step()
        return state(model)

    model = Net(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dice = [torch.Generator().manual_seed(3 * 4 + r) for r in range(4)]
    for _ in range(20):
        some = torch.cat([torch.tensor(mine[r])[poisson_rows(10, 0.2, dice[r])] for r in range(4)])
        total, _ = one_by_one(model, squares, x[some], y[some], 1.0)
        for name, p in model.named_parameters():
            p.grad = total[name] / 8 if name in total else None
        optimizer.step()
    for got in ranks_of(4).run(several, quiet=True):
        same(got, state(model), 1e-9, 1e-9)


def test_poisson_rows():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([len(poisson_rows(50, 0.1, generator)) for _ in range(2000)]).double()
    assert abs(sizes.mean() - 5) < 0.3 and abs(sizes.var() - 4.5) < 0.8  # binomial, not always the same number
    counts = torch.zeros(50)
    for _ in range(2000):
        counts[poisson_rows(50, 0.1, generator)] += 1
    assert counts.min() > 120 and counts.max() < 290  # 200 ± 13.4
    assert poisson_rows(5, 1.0).tolist() == [0, 1, 2, 3, 4]


# ---- the accountant -------------------------------------------------------------------------------------------


def test_epsilon_is_dp_accountings():
    import dp_accounting  # takes a second: not on the ranks, which import this file

    assert epsilon(150 / 60000, 1.3, 15 * 400, 1e-5) == pytest.approx(0.7242, abs=5e-5)  # RDP, today's conversion
    for rate, sigma, steps, delta in [(0.01, 4.0, 10_000, 1e-5), (0.1, 0.8, 100, 1e-4), (1.0, 5.0, 30, 1e-6)]:
        accountant = dp_accounting.rdp.RdpAccountant()
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, steps))
        assert epsilon(rate, sigma, steps, delta) == pytest.approx(accountant.get_epsilon(delta), rel=1e-12)
    assert epsilon(0.1, 1.0, 0, 1e-5) == 0
    assert epsilon(0.1, 1.0, 10, 1e-5) < epsilon(0.1, 1.0, 20, 1e-5) < epsilon(0.2, 1.0, 20, 1e-5)
    assert epsilon(0.1, 2.0, 10, 1e-5) < epsilon(0.1, 1.0, 10, 1e-5)


# ---- bad input ------------------------------------------------------------------------------------------------


def test_bad_input_is_named(ranks_of):
    ranks = ranks_of(4)
    for bad in (0, -1.0, float("inf"), float("nan")):
        fails(ranks, f"above 0, not {bad}", lambda r, bad=bad: step(bad, 1.0))
        fails(ranks, f"sigma is the noise's standard deviation in units of clip, above 0, not {bad}",
              lambda r, bad=bad: step(1.0, bad))  # fmt: skip
        with pytest.raises(ValueError, match="sigma"):
            epsilon(0.1, bad, 10, 1e-5)
    for delta in (0, 1, -1e-5, 2.0, float("nan")):
        with pytest.raises(ValueError, match="delta is a probability between 0 and 1"):
            epsilon(0.1, 1.0, 10, delta)
    for rate in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="rate is the probability"):
            epsilon(rate, 1.0, 10, 1e-5)
        with pytest.raises(ValueError, match="rate is the probability"):
            poisson_rows(5, rate)
    for steps in (-1, 2.5):
        with pytest.raises(ValueError, match="steps is a whole number"):
            epsilon(0.1, 1.0, steps, 1e-5)
    fails(ranks, "expected is how many rows take part", lambda r: private_gradient(
        Net(0), squares, *rows(2), clip=1.0, sigma=1.0, expected=0, generator=torch.Generator()))  # fmt: skip
    with pytest.raises(RankError, match="infinite or not a number"):
        ranks.run(lambda: private_gradient(Net(0), squares, rows(2)[0] / 0, rows(2)[1], clip=1.0, sigma=1.0, expected=1,
                                           generator=torch.Generator()), quiet=True)  # fmt: skip


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_what_mixes_rows_is_refused_by_name(rows):
    x, y = torch.randn(rows, 3), torch.randn(rows, 2)
    for norm in (nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False).eval()):
        model = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2))
        with pytest.raises(ValueError, match="1 is a BatchNorm1d: it mixes the rows of a batch"):
            per_sample_gradients(model, nn.functional.mse_loss, x, y)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        per_sample_gradients(nn.Sequential(model[0]), nn.functional.mse_loss, x, y)


def test_a_parameter_without_dimensions_and_rows_beyond_float32s_squares():
    gradients = {"temperature": torch.tensor([3.0, 0.0, 1e-25]), "weight": torch.tensor([[4.0], [1e25], [0.0]])}
    total, norms = clip_and_sum(gradients, 1e-10)
    assert torch.allclose(norms, torch.tensor([5.0, 1e25, 1e-25]), rtol=1e-6, atol=0)
    assert torch.allclose(total["temperature"], torch.tensor(0.6e-10), rtol=1e-6, atol=0)
    assert torch.allclose(total["weight"], torch.tensor([1.8e-10]), rtol=1e-6, atol=0)
    short = clip_and_sum({name: g[2:] for name, g in gradients.items()}, 1e-26)[0]["temperature"]
    assert torch.allclose(short, torch.tensor(1e-26), rtol=1e-6, atol=0)
    assert clip_and_sum({"temperature": torch.zeros(0)}, 1.0)[0]["temperature"] == 0
