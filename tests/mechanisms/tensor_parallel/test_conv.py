"""`ParallelConv2d`: trained beside one process, to the byte, weights in and out."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import in_world
from pardist_lib.measure.trace import record
from pardist_lib.mechanisms.group import split_sizes
from pardist_lib.mechanisms.tensor_parallel.conv import ParallelConv2d
from tests.mechanisms.refusals import refused

CLOSE = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 2e-6)}


def make_net(dtype, seed=0, padding=1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=padding, dtype=dtype), nn.Tanh(), nn.Conv2d(7, 5, 3, 2, padding, dtype=dtype)
    )


def split_net(net, how, group=None):
    """out then in: one all-reduce forward, one backward; or every rank its rows of the images."""
    first, act, second = net
    if how == "channels":
        a = ParallelConv2d.from_module(first, group, "out")
        b = ParallelConv2d.from_module(second, group, "in")
    elif how == "gathered":
        a = ParallelConv2d.from_module(first, group, "out", gather_output=True)
        b = ParallelConv2d.from_module(second, group, "in", input_is_parallel=False)
    else:
        a, b = (ParallelConv2d.from_module(conv, group, "height") for conv in (first, second))
    return nn.Sequential(a, act, b)


def train(how, dtype, steps=20, distributed=True):
    """The loss of every step, the input's gradient in the first, and the whole weights at the end."""
    net = make_net(dtype)
    if how == "frozen":
        net[0].bias.requires_grad_(False)
    x, y = (torch.randn(s, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
            for s in ((2, 3, 11, 6), (2, 5, 6, 3)))  # fmt: skip
    height = distributed and how == "height"
    if distributed:
        net = split_net(net, "channels" if how == "frozen" else how)
        torch.manual_seed(dist.get_rank())
    if height:
        rank, n = dist.get_rank(), dist.get_world_size()
        heights = split_sizes(11, n)
        x, y = x.tensor_split(n, 2)[rank], y.tensor_split(n, 2)[rank]
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(parameters, 0.2, momentum=0.9, weight_decay=0.01), []
    for step in range(steps):
        x = x.detach().requires_grad_(step == 0)
        optimizer.zero_grad()
        middle = net[0](x, heights) if height else net[0](x)
        out = net[2](net[1](middle), heights) if height else net[2](net[1](middle))
        loss = (out - y).square().sum() / (2 * 5 * 6 * 3)
        loss.backward()
        if step == 0:
            x_grad = x.grad
        optimizer.step()
        losses.append(loss.item())
    whole = [m.to_module() if distributed and isinstance(m, ParallelConv2d) else m for m in net]
    return losses, x_grad, nn.Sequential(*whole).state_dict()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("how", ["channels", "gathered", "height", "frozen"])
def test_a_net_trains_as_in_one_process(ranks_of, how, n):
    for dtype, (relative, absolute) in CLOSE.items():
        losses, x_grad, weights = train(how, dtype, distributed=False)
        results = ranks_of(4).run(in_world, n, train, how, dtype, quiet=True)[:n]
        for rank, (got_losses, got_grad, got) in enumerate(results):
            if how != "height":
                torch.testing.assert_close(torch.tensor(got_losses), torch.tensor(losses), rtol=relative, atol=absolute)
                torch.testing.assert_close(got_grad, x_grad, rtol=relative, atol=absolute)
            else:
                torch.testing.assert_close(got_grad, x_grad.tensor_split(n, 2)[rank], rtol=relative, atol=absolute)
            assert got.keys() == weights.keys()
            for name, want in weights.items():
                torch.testing.assert_close(got[name], want, rtol=relative, atol=absolute)


def step_of(how):
    net = split_net(make_net(torch.float32), how)
    _, (_, _, _, messages, _) = record(lambda: net(torch.ones(2, 3, 11, 6, requires_grad=True)).sum().backward())
    return [(name, size) for name, _, _, size, *_ in messages]


def test_out_then_in_is_one_all_reduce_each_way(ranks_of):
    for calls in ranks_of(4).run(step_of, "channels", quiet=True):
        assert calls == [("all_reduce", 2 * 5 * 6 * 3 * 4), ("all_reduce", 2 * 3 * 11 * 6 * 4)]


def there_and_back(dtype):
    """The ordinary module made of a split one; another split made of that; and what it sent."""
    torch.manual_seed(0)
    conv, equal = nn.Conv2d(6, 5, (3, 2), 2, 1, bias=dtype == torch.float32, dtype=dtype).eval(), []
    conv.weight.requires_grad_(False)
    stream = torch.get_rng_state()
    for split in ("out", "in", "height"):
        back = ParallelConv2d.from_module(conv, split=split).to_module()
        again = ParallelConv2d.from_module(back, split="in").to_module()
        for one in (back, again):
            pairs = zip(conv.state_dict().items(), one.state_dict().items(), strict=True)
            equal.append(all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs))
            equal.append(str(one) == str(conv) and not one.training and not one.weight.requires_grad)
    assert torch.equal(stream, torch.get_rng_state()), "taking weights out and in draws no random numbers"
    return equal


def test_weights_come_back_bit_for_bit(ranks_of):
    for dtype in (torch.float32, torch.bfloat16):
        assert ranks_of(3).run(there_and_back, dtype, quiet=True) == [[True] * 12] * 3


def made_directly(seeds):
    """What layers start with, made directly and from each rank's own module; and what rank 0's nn.Conv2d does."""
    wholes = {}
    for split in ("out", "in", "height"):
        torch.manual_seed(seeds[dist.get_rank()])
        wholes[split] = ParallelConv2d(4, 5, 3, split=split).to_module().state_dict()
        torch.manual_seed(seeds[dist.get_rank()])
        wholes[split, "from"] = ParallelConv2d.from_module(nn.Conv2d(4, 5, 3), split=split).to_module().state_dict()
    torch.manual_seed(seeds[0])
    return wholes, nn.Conv2d(4, 5, 3).state_dict()


def test_made_directly(ranks_of):
    for seeds in ([7] * 4, [1, 2, 3, 4]):
        results = ranks_of(4).run(made_directly, seeds, quiet=True)
        for wholes, torchs in results:
            for split, whole in wholes.items():
                assert all(torch.equal(whole[name], torchs[name]) for name in torchs), split


def in_halves():
    groups = {members: dist.new_group(members) for members in ((1, 3), (0, 2))}
    mine = (1, 3) if dist.get_rank() % 2 else (0, 2)
    net, x = make_net(torch.float64, mine[0]), torch.ones(1, 3, 8, 8, dtype=torch.float64)
    return bool(torch.allclose(split_net(net, "channels", groups[mine])(x), net(x), rtol=1e-10))


def test_two_groups_at_once(ranks_of):
    assert ranks_of(4).run(in_halves, quiet=True) == [True] * 4


# ---- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda: ParallelConv2d(3, 1, 3), "1 output channels of .* cannot be split over 2 ranks: at most 1"),
        (lambda: ParallelConv2d(1, 3, 3, split="in"), "1 input channels of .* cannot be split over 2 ranks"),
        (lambda: ParallelConv2d(3, 4, 3, split="rows"), "split is one of 'out', 'in', 'height', not 'rows'"),
        (lambda: ParallelConv2d.from_module(nn.Conv2d(4, 4, 3, groups=2)), "with groups=1"),
        (lambda: ParallelConv2d.from_module(nn.Linear(4, 4)), r"splits nn.Conv2d, not Linear\("),
        (lambda: ParallelConv2d(4, 4, 3, group=3), "group is a int, but has to be a process group"),
        (lambda: ParallelConv2d.from_module(ParallelConv2d(4, 4, 3)), "is split already: its to_module"),
        (lambda: ParallelConv2d(4, 4, 3, split="in")(torch.ones(1, 4, 5, 5)), "x needs 2 channels here"),
        (lambda: ParallelConv2d(4, 4, 3)(torch.ones(1, 2, 5, 5)), "x needs 4 channels here"),
    ],
)
def test_refused_with_a_reason(ranks_of, wrong, told):
    with refused(told) as caught:
        ranks_of(2).run(wrong, quiet=True)
    assert caught.value.cause == "ValueError"
