"""The load-balancing loss and the bias: by their formulas, and over ranks beside one process."""

import pytest
import torch
import torch.distributed as dist

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.expert_parallel import Router, load_balancing_loss, update_expert_bias
from tests.mechanisms.expert_parallel.nets import ROWS, Net, crowd, layer, tokens
from tests.mechanisms.nets import same

EVEN = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]])


def test_the_loss_is_alpha_where_all_are_equal_and_alpha_times_experts_at_worst():
    probabilities = torch.full((4, 4), 0.25)
    assert load_balancing_loss(probabilities, EVEN, alpha=0.01).item() == pytest.approx(0.01)
    certain, all_to_one = torch.eye(4)[[2] * 5], torch.full((5, 1), 2)
    assert load_balancing_loss(certain, all_to_one).item() == pytest.approx(4)
    assert load_balancing_loss(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64)).item() == 0


def test_the_loss_by_its_formula_and_its_gradient():
    """Switch Transformers, equations 4 to 6, with f over all k choices; the gradient of a probability is α·E·f/T."""
    probabilities = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    chosen = probabilities.detach().topk(2).indices
    f = torch.tensor([(chosen == e).sum().item() / 12 for e in range(4)], dtype=torch.float64)
    loss = load_balancing_loss(probabilities, chosen, alpha=0.3)
    loss.backward()
    torch.testing.assert_close(loss, 0.3 * 4 * (f * probabilities.mean(0)).sum())
    torch.testing.assert_close(probabilities.grad, (0.3 * 4 * f / 6).expand(6, 4))


def shares(rows, grouped):
    rank, n = dist.get_rank(), dist.get_world_size()
    moe, x = layer(), tokens(rows)[rank]
    moe(x)
    loss = load_balancing_loss(*moe.routing[:2], dist.group.WORLD if grouped else None)
    loss.backward()
    gradient = moe.router.weight.grad / n
    dist.all_reduce(gradient)
    return loss.detach(), gradient


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_over_a_group_the_loss_and_the_mean_gradient_are_one_processs(ranks_of, n):
    rows, moe = ROWS[:n], layer()
    moe(torch.cat(tokens(rows)))
    loss = load_balancing_loss(*moe.routing[:2])
    loss.backward()
    for got, gradient in ranks_of(4).run(in_world, n, shares, rows, True, quiet=True)[:n]:
        same({"loss": got, "gradient": gradient}, {"loss": loss.detach(), "gradient": moe.router.weight.grad})


def test_the_mean_of_local_losses_is_another_number(ranks_of):
    rows, moe = (4, 4, 4), layer()
    moe(torch.cat(tokens(rows)))
    together = load_balancing_loss(*moe.routing[:2]).item()
    local = [loss.item() for loss, _ in ranks_of(3).run(shares, rows, False, quiet=True)]
    for x, loss in zip(tokens(rows), local, strict=True):
        moe(x)
        assert loss == pytest.approx(load_balancing_loss(*moe.routing[:2]).item(), rel=1e-12)
    assert abs(sum(local) / 3 - together) > 0.01 * together


# ---- the bias -------------------------------------------------------------------------------------------------


def test_the_bias_steps_towards_those_who_have_less_than_the_mean():
    moe = crowd(layer(experts=4, bias_update_rate=0.001), [1, 3])
    for _ in range(2):  # two micro-batches are one step
        moe(tokens((3,))[0])
    update_expert_bias(moe)
    assert torch.equal(moe.router.expert_bias, torch.tensor([0.001, -0.001, 0.001, -0.001]))
    with torch.no_grad():
        moe(tokens((3,))[0])
    moe.eval()(tokens((3,))[0])
    update_expert_bias(moe)  # nothing was chosen in training meanwhile: every load is the mean
    assert torch.equal(moe.router.expert_bias, torch.tensor([0.001, -0.001, 0.001, -0.001]))
    even = layer(experts=4, top_k=4, bias_update_rate=0.5)
    even(tokens((3,))[0])
    update_expert_bias(even)
    assert torch.equal(even.router.expert_bias, torch.zeros(4))


def test_the_bias_evens_the_loads_out():
    torch.manual_seed(0)
    router, spread = Router(6, 4, 2, score_function="sigmoid", bias_update_rate=0.001), []
    x = torch.cat(tokens((400,), dtype=torch.float32))
    with torch.no_grad():
        router.weight[2, 0] += 0.5
    for _ in range(150):
        loads = router(x).chosen.flatten().bincount(minlength=4)
        spread.append((loads.max() - loads.min()).item())
        update_expert_bias(router)
    assert spread[0] > 100 and max(spread[-20:]) < 20


def biased(rows):
    torch.manual_seed(0)
    rank, net = dist.get_rank(), Net(bias_update_rate=0.01)
    for seed in range(4):
        for micro in range(2):
            net(tokens(rows, 10 * seed + micro)[rank])
        update_expert_bias(net)
    return [m.router.expert_bias for m in net.layers]


def test_loads_are_those_of_all_data_parallel_ranks(ranks_of):
    torch.manual_seed(0)
    net = Net(bias_update_rate=0.01)
    for seed in range(4):
        for micro in range(2):
            net(torch.cat(tokens(ROWS, 10 * seed + micro)))
        update_expert_bias(net)
    wanted = [m.router.expert_bias for m in net.layers]
    assert all(b.abs().max() > 0 for b in wanted)
    for got in ranks_of(4).run(biased, ROWS, quiet=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def two_groups():
    halves = [group_of((0, 1)), group_of((2, 3))]
    moe = crowd(layer(bias_update_rate=0.5), [dist.get_rank()])
    moe(tokens((2,))[0])
    update_expert_bias(moe, halves[dist.get_rank() // 2])
    return moe.router.expert_bias


def test_a_group_counts_its_own_ranks_only(ranks_of):
    a, b, c, d = ranks_of(4).run(two_groups, quiet=True)
    assert torch.equal(a, b) and torch.equal(c, d) and not torch.equal(a, c)


# ---- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda: load_balancing_loss(torch.ones(3, 4), EVEN), r"probabilities \[3, 4\], chosen \[4, 2\]"),
        (lambda: load_balancing_loss(torch.ones(4), EVEN), r"\(tokens, experts\) and \(tokens, k\) are asked for"),
        (
            lambda: load_balancing_loss(torch.ones(4, 4), EVEN.int()),
            "chosen int64 .*, not torch.float32 and torch.int32",
        ),
        (lambda: load_balancing_loss(torch.ones(4, 3), EVEN), "chosen has expert 3, or one below 0, of 3"),
        (lambda: load_balancing_loss(EVEN, EVEN), "probabilities are floating point"),
        (lambda: update_expert_bias(layer()), "MoE has no router with a bias: give its layers bias_update_rate"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        wrong()
