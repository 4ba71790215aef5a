"""ExpertParallel beside one process: outputs, every gradient, training, experts in groups smaller than data's."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.expert_parallel import (
    ExpertParallel,
    average_gradients,
    clip_grad_norm_,
    update_expert_bias,
)
from pardist_lib.mechanisms.tensor_parallel import full_gradients, full_state_dict, parallelize
from tests.mechanisms.expert_parallel.nets import (
    ROWS,
    Net,
    crowd,
    gradients,
    groups_of,
    layer,
    step_on_ranks,
    tokens,
)
from tests.mechanisms.nets import same

KINDS = {  # what the layer is, and which experts every token chooses
    "random": ({}, None),
    "one expert for all": ({"top_k": 1, "normalize": False}, [3]),
    "all on the first rank": ({}, [0, 1]),
    "first and last rank": ({"experts": 6}, [5, 0]),
    "dropping": ({"capacity_factor": 0.7}, None),
    "dropping nearly all": ({"capacity_factor": 0.2}, [1, 4]),
    "sigmoid, shared, gated": (
        {"score_function": "sigmoid", "shared_experts": 2, "gated": True, "bias": False, "scaling_factor": 2.5},
        None,
    ),
    "as many experts as four ranks, all chosen": ({"experts": 4, "top_k": 4}, None),
}


def made(kind, seed=0, dtype=torch.float64):
    options, favourites = KINDS[kind]
    moe = layer(seed=seed, dtype=dtype, **options)
    return moe if favourites is None else crowd(moe, favourites)


def weighted(y):
    """Something whose gradient is another one at each place."""
    return (y * y.sin()).sum()


def on_ranks(kind, rows, needs_gradient, dtype):
    rank, n = dist.get_rank(), dist.get_world_size()
    moe = made(kind, seed=0 if rank == 0 else 9, dtype=dtype)  # the first rank's values count
    split = ExpertParallel.from_module(moe)
    x = tokens(rows, dtype=dtype)[rank].clone().requires_grad_(needs_gradient)
    y = split(x.view(1, -1, x.size(1)))[0]
    (n * weighted(y)).backward()
    average_gradients(split)
    assert all(p.grad is None for p in moe.parameters())
    return y.detach(), x.grad / n if needs_gradient else None, gradients(split)


def alone(kind, rows, dtype=torch.float64):
    moe, x = made(kind, dtype=dtype), torch.cat(tokens(rows, dtype=dtype)).requires_grad_()
    y = moe(x, senders=rows)
    weighted(y).backward()
    return y.detach(), x.grad, gradients(moe)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_every_gradient_equal_one_process(ranks_of, kind, n):
    rows = ROWS[:n]
    y, x_grad, wanted = alone(kind, rows)
    for needs_gradient in (True, False):
        got = ranks_of(4).run(in_world, n, on_ranks, kind, rows, needs_gradient, torch.float64, quiet=True)[:n]
        outputs, inputs, grads = zip(*got, strict=True)
        same({"output": torch.cat(outputs)}, {"output": y})
        if needs_gradient:
            same({"input": torch.cat(inputs)}, {"input": x_grad})
        assert set().union(*grads) == set(wanted)
        for rank, one in enumerate(grads):
            same(one, {name: wanted[name] for name in one}, what=f"rank {rank}")
            own = {name for name in one if name.startswith("experts.")}
            others = {name for r, other in enumerate(grads) if r != rank for name in other}
            assert own and not own & others, "an expert is on one rank"


def test_experts_without_a_token_have_gradients_of_zeros():
    _, _, wanted = alone("all on the first rank", ROWS)
    assert wanted["experts.0.0.weight"].abs().max() > 0 and wanted["experts.3.0.weight"].abs().max() == 0


def test_in_single_precision(ranks_of):
    y, x_grad, wanted = alone("dropping", ROWS, torch.float32)
    got = ranks_of(4).run(on_ranks, "dropping", ROWS, True, torch.float32, quiet=True)
    same({"y": torch.cat([one[0] for one in got])}, {"y": y}, 1e-5, 1e-6)
    same({"x": torch.cat([one[1] for one in got])}, {"x": x_grad}, 1e-5, 1e-6)
    for one in got:
        same(one[2], {name: wanted[name] for name in one[2]}, 1e-5, 1e-6)


def on_unlike_ranks():
    """Only the first rank's input needs a gradient, and the last rank trains nothing here."""
    rank, n = dist.get_rank(), dist.get_world_size()
    split = ExpertParallel.from_module(layer())
    split.requires_grad_(rank < n - 1)
    x = tokens(ROWS)[rank].clone().requires_grad_(rank == 0)
    weighted(split(x)).backward()
    return x.grad, {name: g for name, g in gradients(split).items() if name.startswith("experts.")}


def test_ranks_that_need_different_gradients_still_meet_in_backward(ranks_of):
    _, x_grad, wanted = alone("random", ROWS)
    got = ranks_of(4).run(on_unlike_ranks, quiet=True)
    same({"x": got[0][0]}, {"x": x_grad[: ROWS[0]]})
    for x, grads in got[1:]:
        assert x is None
        same(grads, {name: wanted[name] for name in grads})
    assert len(got[0][1]) == 8 and not got[3][1]


def checkpointed():
    moe, x = layer(), tokens((4, 2))[dist.get_rank()].clone().requires_grad_()
    split = ExpertParallel.from_module(moe)
    y = checkpoint(split, x, use_reentrant=False)
    (2 * weighted(y)).backward()
    average_gradients(split)
    return y.detach(), gradients(split)


def test_under_activation_checkpointing(ranks_of):
    y, _, wanted = alone("random", (4, 2))
    got = ranks_of(2).run(checkpointed, quiet=True)
    same({"y": torch.cat([one[0] for one in got])}, {"y": y})
    for _, grads in got:
        same(grads, {name: wanted[name] for name in grads})


def no_tokens_at_all():
    split = ExpertParallel.from_module(layer())
    x = tokens((0,))[0].clone().requires_grad_()
    split(x).sum().backward()
    return x.grad.shape, {name: g.abs().sum().item() for name, g in gradients(split).items()}


def test_no_rank_has_a_token(ranks_of):
    for shape, sums in ranks_of(2).run(no_tokens_at_all, quiet=True):
        assert shape == (0, 6) and len(sums) > 4 and set(sums.values()) == {0.0}


# ---- training -------------------------------------------------------------------------------------------------

STEPS = 20
TRAINED = {
    "dropless": {},
    "capacity and bias": {"capacity_factor": 1.0, "bias_update_rate": 0.01, "score_function": "sigmoid"},
}


def steps(net, rows, step, group=None):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    outputs = []
    for seed in range(STEPS):
        optimizer.zero_grad()
        outputs.append(step(tokens(rows, seed)))
        optimizer.step()
        if net.layers[0].router.expert_bias is not None:
            update_expert_bias(net, group)
    return outputs


def trained_on_ranks(name, rows, ep):
    torch.manual_seed(0)
    net, groups, rank = Net(**TRAINED[name]), groups_of(ep), dist.get_rank()
    net = net.over(groups[0])
    outputs = steps(net, rows, lambda x: step_on_ranks(net, x[rank], sum(rows), groups))
    return outputs, {name: t.detach().clone() for name, t in net.state_dict().items()}


def trained_alone(name, rows):
    torch.manual_seed(0)
    net = Net(**TRAINED[name])

    def step(x):
        y = net(torch.cat(x), senders=rows)
        (y.square().sum() / sum(rows) + net.balance()).backward()
        return y.detach()

    return steps(net, rows, step), net.state_dict()


@pytest.mark.parametrize("n, ep", [(1, 1), (2, 2), (3, 3), (4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("name", TRAINED)
def test_twenty_steps_of_adamw_and_balancing_equal_one_process(ranks_of, name, n, ep):
    """Expert groups as large as the data-parallel one, half of it (twice the same experts), and of one rank."""
    rows = ROWS[:n]
    outputs, wanted = trained_alone(name, rows)
    got = ranks_of(4).run(in_world, n, trained_on_ranks, name, rows, ep, quiet=True)[:n]
    for i, y in enumerate(outputs):
        same({"y": torch.cat([one[0][i] for one in got])}, {"y": y}, what=f"step {i}")
    for rank, (_, state) in enumerate(got):
        same(state, {key: wanted[key] for key in state}, what=f"rank {rank}")
    assert set().union(*(state for _, state in got)) == set(wanted)
    if "bias" in name:
        assert wanted["layers.0.router.expert_bias"].abs().max() > 0


def averaged_by_half(ep):
    """The mean over ranks with the same experts, as if these alone were data-parallel."""
    group, replicas = groups_of(ep)
    split = ExpertParallel.from_module(layer(), group)
    weighted(split(tokens((3,) * 4)[dist.get_rank()])).backward()
    mean = {}
    for name, p in split.named_parameters():
        if name.startswith("experts."):
            mean[name] = p.grad.clone()
            if replicas is not None:
                dist.all_reduce(mean[name], group=replicas)
                mean[name] /= dist.get_world_size(replicas)
    average_gradients(split, None, replicas)
    return mean, {name: p.grad for name, p in split.named_parameters() if name in mean}


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_the_mean_over_ranks_with_the_same_experts_is_n_times_too_large(ranks_of, ep):
    for mean, right in ranks_of(4).run(averaged_by_half, ep, quiet=True):
        same(mean, {name: ep * g for name, g in right.items()})


def clipped(ep, norm_type):
    torch.manual_seed(0)
    groups = groups_of(ep)
    net = Net().over(groups[0])
    rank = dist.get_rank()
    step_on_ranks(net, tokens(ROWS)[rank], sum(ROWS), groups)
    if ep > 1:
        with pytest.raises(RuntimeError, match=r"call expert_parallel.clip_grad_norm_\(model"):
            nn.utils.clip_grad_norm_(net.parameters(), 1e9)
    norm = clip_grad_norm_(net, 0.05, norm_type)
    return norm, gradients(net)


@pytest.mark.parametrize("ep, norm_type", [(4, 2.0), (2, 2.0), (2, 1.0), (4, float("inf")), (1, 2.0)])
def test_gradients_are_clipped_by_the_whole_models_norm(ranks_of, ep, norm_type):
    torch.manual_seed(0)
    net = Net()
    (net(torch.cat(tokens(ROWS)), senders=ROWS).square().sum() / sum(ROWS) + net.balance()).backward()
    wanted = nn.utils.clip_grad_norm_(net.parameters(), 0.05, norm_type)
    for norm, grads in ranks_of(4).run(clipped, ep, norm_type, quiet=True):
        same({"norm": norm} | grads, {"norm": wanted} | {name: gradients(net)[name] for name in grads})


# ---- the module itself ----------------------------------------------------------------------------------------


def whole_again():
    moe = layer(seed=dist.get_rank(), bias_update_rate=0.1, shared_experts=1, gated=True)
    with torch.no_grad():
        moe.router.expert_bias.copy_(torch.arange(5.0) * (1 + dist.get_rank()))
    split = ExpertParallel.from_module(moe.eval())
    assert not split.training and not split.to_module().training
    split(tokens((4,))[0])
    copied = copy.deepcopy(split)
    assert copied.routing is None and torch.equal(copied.traffic().visits, split.traffic().visits)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(copied.parameters(), split.parameters(), strict=True))
    again = ExpertParallel.from_module(split.to_module())
    return split.to_module().state_dict(), again.to_module().state_dict()


@pytest.mark.parametrize("n", [2, 3])
def test_the_whole_module_comes_back_exactly_as_the_first_rank_had_it(ranks_of, n):
    first = layer(seed=0, bias_update_rate=0.1, shared_experts=1, gated=True)
    wanted = first.state_dict() | {"router.expert_bias": torch.arange(5.0)}
    for states in ranks_of(n).run(whole_again, quiet=True):
        for state in states:
            assert list(state) == list(wanted)
            assert all(torch.equal(state[name], t) for name, t in wanted.items())


def in_sixteen_bits():
    moe = layer(dtype=torch.float32, bias_update_rate=0.001)
    split = ExpertParallel.from_module(moe.bfloat16())
    y = split(tokens((4,), dtype=torch.bfloat16)[0])
    y.float().square().sum().backward()
    update_expert_bias(split)
    wanted = moe(tokens((4,), dtype=torch.bfloat16)[0])
    with torch.autocast("cpu", torch.bfloat16):
        wide = ExpertParallel.from_module(layer(dtype=torch.float32))
        z = wide(tokens((4,), dtype=torch.float32)[0])
        z.sum().backward()
    traffic = wide.traffic()
    return y, wanted, split.router.expert_bias, z, gradients(wide)["router.weight"].dtype, traffic


def test_sixteen_bits_and_autocast(ranks_of):
    with torch.autocast("cpu", torch.bfloat16):
        z_alone = layer(dtype=torch.float32)(tokens((4,), dtype=torch.float32)[0])
    for y, wanted, bias, z, dtype, traffic in ranks_of(2).run(in_sixteen_bits, quiet=True):
        assert y.dtype == torch.bfloat16 and torch.equal(y, wanted)
        assert bias.dtype == torch.float32 and set(bias.abs().tolist()) <= {0.0, torch.tensor(0.001).item()}
        assert bias.abs().max() > 0
        assert z.dtype == z_alone.dtype == torch.float32 and dtype == torch.float32
        torch.testing.assert_close(z, z_alone)
        assert (traffic.token_bytes, traffic.output_bytes) == (4 * 6, 2 * 6)


# ---- with tensor parallelism, and by a plan -------------------------------------------------------------------


def split_both_ways(favourites):
    """Two ranks have the two halves of every expert, two such pairs share the experts out."""
    rank = dist.get_rank()
    pair, across = ([group_of(m) for m in members] for members in (((0, 1), (2, 3)), ((0, 2), (1, 3))))
    pair, across = pair[rank // 2], across[rank % 2]
    moe = crowd(layer(shared_experts=1), favourites)
    parallelize(moe, {"experts.?": "mlp", "shared": "mlp"}, pair)
    split = ExpertParallel.from_module(moe, across)
    x = tokens((4, 1))[rank // 2].clone().requires_grad_()
    y = split(x)
    (2 * weighted(y)).backward()
    average_gradients(split, across)
    with pytest.raises(ValueError, match="split by tensor parallelism"):
        clip_grad_norm_(split, 1.0)
    assert split.experts["0" if rank < 2 else "3"][0].weight.size(0) == (4, 3)[rank % 2]
    return y.detach(), x.grad / 2, full_gradients(split), full_state_dict(split)


@pytest.mark.parametrize("favourites", [[], [4, 3]])
def test_experts_that_tensor_parallelism_has_split(ranks_of, favourites):
    """Also where whole experts, and all of a rank, have no token."""
    moe, x = crowd(layer(shared_experts=1), favourites), torch.cat(tokens((4, 1))).requires_grad_()
    y = moe(x)
    weighted(y).backward()
    got = ranks_of(4).run(split_both_ways, favourites, quiet=True)
    for pair in (got[::2], got[1::2]):
        same({"y": torch.cat([one[0] for one in pair])}, {"y": y})
        same({"x": torch.cat([one[1] for one in pair])}, {"x": x.grad})
    for _, _, grads, state in got:
        same(grads, gradients(moe))
        assert all(torch.equal(state[name], t) for name, t in moe.state_dict().items()) and len(state) == len(grads)


def by_a_plan():
    torch.manual_seed(dist.get_rank())
    net = parallelize(Net(), {"layers.?": ExpertParallel.from_module})
    state = full_state_dict(net)
    plain = Net()
    plain.load_state_dict(state)
    x = tokens((3, 4, 2))
    y = net(x[dist.get_rank()])
    y.square().sum().backward()
    average_gradients(net)
    return y.detach(), plain(torch.cat(x)).detach(), full_gradients(net), gradients_of_mean(plain, x)


def gradients_of_mean(plain, x):
    plain.zero_grad()
    (plain(torch.cat(x)).square().sum() / dist.get_world_size()).backward()
    return gradients(plain)


def test_a_plan_of_parallelize_takes_it_as_a_style(ranks_of):
    got = ranks_of(3).run(by_a_plan, quiet=True)
    same({"y": torch.cat([one[0] for one in got])}, {"y": got[0][1]})
    for _, _, grads, wanted in got:
        same(grads, wanted)
