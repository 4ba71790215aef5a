"""conv2d cut along each of its dimensions, and `ParallelConv2d`: against one process, against DTensor, to the byte."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pardist_lib.lessons.worlds import in_world
from pardist_lib.measure.trace import record
from pardist_lib.mechanisms.group import split_sizes
from pardist_lib.mechanisms.tensor_parallel import split_conv
from pardist_lib.mechanisms.tensor_parallel.conv import ParallelConv2d
from pardist_lib.mechanisms.tensor_parallel.split_conv import (
    conv2d_by_batch,
    conv2d_by_height,
    conv2d_by_input_channels,
    conv2d_by_output_channels,
    halo_plan,
)
from tests.mechanisms.refusals import refused

CUTS = {  # the dimension of x, weight, bias and the result that is cut
    "out": (None, 0, 0, 1),
    "in": (1, 1, None, None),
    "batch": (0, None, None, 0),
    "height": (2, None, None, 2),
}
CLOSE = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 2e-6)}


def case_of(split, **changes):
    case = {
        "split": split, "batch": 4, "channels": (4, 4), "image": (12, 5), "kernel": (3, 3), "stride": 1, "padding": 1,
        "dilation": 1, "bias": True, "dtype": torch.float64, "gather": False, "seed": 0, "heights": None,
    }  # fmt: skip
    return case | changes


def inputs(case):
    """[x, weight, bias or None], whole."""
    (inside, outside), numbers = case["channels"], torch.Generator().manual_seed(case["seed"])
    shapes = (case["batch"], inside, *case["image"]), (outside, inside, *case["kernel"]), (outside,)
    if case["dtype"].is_floating_point:
        whole = [torch.randn(s, generator=numbers, dtype=torch.float64).to(case["dtype"]) for s in shapes]
    else:
        whole = [torch.randint(-9, 10, s, generator=numbers).to(case["dtype"]) for s in shapes]
    return whole if case["bias"] else [*whole[:2], None]


def hyper(case):
    return case["stride"], case["padding"], case["dilation"]


def lengths(case, n, which):
    """Every rank's part of x (0), weight (1), bias (2) or the result (3) along the dimension that is cut."""
    if which == 0 and case["heights"]:
        return case["heights"]
    inside, outside = case["channels"]
    if case["split"] == "height" and which == 3:
        x, weight, _ = inputs(case)
        return split_sizes(F.conv2d(x[:1], weight, None, *hyper(case)).shape[2], n)
    whole = {"out": outside, "in": inside, "batch": case["batch"], "height": case["image"][0]}[case["split"]]
    return split_sizes(whole, n)


def cut(case, tensor, which, rank, n):
    dim = CUTS[case["split"]][which]
    if tensor is None or dim is None:
        return tensor
    return tensor.split(lengths(case, n, which), dim)[rank]


def convolve(case, x, weight, bias, group=None):
    n, gather = dist.get_world_size(group), {"gather": case["gather"]}
    how = x, weight, bias, *hyper(case), group
    if case["split"] == "out":
        return conv2d_by_output_channels(*how, **gather, sizes=lengths(case, n, 3))
    if case["split"] == "in":
        return conv2d_by_input_channels(*how)
    if case["split"] == "batch":
        return conv2d_by_batch(*how, **gather, sizes=lengths(case, n, 3))
    return conv2d_by_height(*how, **gather, heights=lengths(case, n, 0))


def forward_and_backward(case):
    """[result, gradient of x, of weight, of bias] as this rank has them."""
    rank, n = dist.get_rank(), dist.get_world_size()
    parts = [cut(case, t, i, rank, n) for i, t in enumerate(inputs(case))]
    if not case["dtype"].is_floating_point:
        return [convolve(case, *parts)]
    leaves = [t if t is None else t.clone().requires_grad_() for t in parts]
    y = convolve(case, *leaves)
    y_grad = gradient_of(case)
    (y * (y_grad if case["gather"] else cut(case, y_grad, 3, rank, n))).sum().backward()
    return [y.detach(), *(t if t is None else t.grad for t in leaves)]


def gradient_of(case):
    x, weight, bias = inputs(case)
    shape = F.conv2d(x, weight, None, *hyper(case)).shape
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return (drawn / 10).to(case["dtype"])


def one_process(case):
    leaves = [t if t is None else t.clone().requires_grad_(t.is_floating_point()) for t in inputs(case)]
    y = F.conv2d(*leaves, *hyper(case))
    if not case["dtype"].is_floating_point:
        return [y]
    (y * gradient_of(case)).sum().backward()
    return [y.detach(), *(t if t is None else t.grad for t in leaves)]


def several(cases):
    return [forward_and_backward(case) for case in cases]


def check(ranks, n, cases):
    results = ranks.run(in_world, n, several, cases, quiet=True)
    for i, case in enumerate(cases):
        for which, want in zip((3, 0, 1, 2), one_process(case), strict=False):
            for rank in range(n) if want is not None else ():
                got = results[rank][i][(which + 1) % 4]
                mine = want if which == 3 and case["gather"] else cut(case, want, which, rank, n)
                close = CLOSE.get(case["dtype"], (0, 0))
                what = f"{('x', 'weight', 'bias', 'result')[which]} on rank {rank} of {n}, {case}"
                torch.testing.assert_close(got, mine, rtol=close[0], atol=close[1],
                                           msg=lambda text: f"{what}: {text}")  # noqa: B023 # fmt: skip


WAYS = [  # kernel, stride, padding, dilation
    ((3, 3), 1, 1, 1), ((1, 1), 1, 0, 1), ((5, 3), 1, (2, 1), 1), ((2, 2), 2, 0, 1), ((3, 2), 2, 1, 1),
    ((3, 3), 1, 2, 2), ((3, 3), (3, 2), (0, 2), (2, 1)), ((4, 3), 1, "same", 1), ((3, 3), 1, "valid", 1),
    ((7, 1), 1, 3, 1), ((1, 3), 4, (3, 1), 1),
]  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("split", CUTS)
def test_every_cut_equals_one_process(ranks_of, split, n):
    cases = [
        case_of(split, kernel=kernel, stride=stride, padding=padding, dilation=dilation, gather=gather, seed=i,
                bias=i % 3 != 1, **({} if i % 2 else {"batch": 5, "channels": (5, 7), "image": (11, 6)}))
        for i, (kernel, stride, padding, dilation) in enumerate(WAYS)
        for gather in ((False, True) if split != "in" else (False,))
    ]  # fmt: skip
    check(ranks_of(4), n, cases)


@pytest.mark.parametrize("split", CUTS)
def test_float32_and_integers(ranks_of, split):
    check(ranks_of(4), 4, [case_of(split, dtype=dtype, channels=(5, 6)) for dtype in (torch.float32, torch.int64)])


def test_heights_of_any_kind(ranks_of):
    """Shards shorter than the halo, without a row of x, without a row of the result; filters that reach far."""
    cases = [
        case_of("height", image=(sum(heights), 4), heights=heights, kernel=(kernel, 3), stride=stride,
                padding=(padding, 1), dilation=(dilation, 1), gather=gather, seed=i)
        for i, (heights, kernel, stride, padding, dilation) in enumerate([
            ([3, 3, 3, 3], 3, 1, 1, 1), ([1, 1, 1, 1], 3, 1, 1, 1), ([1, 1, 1, 1], 3, 1, 0, 1),
            ([4, 1, 1, 2], 7, 1, 3, 1), ([0, 6, 0, 2], 3, 1, 1, 1), ([8, 1, 1, 1], 5, 2, 2, 2),
            ([2, 2, 2, 1], 1, 3, 0, 1), ([1, 0, 0, 0], 1, 1, 4, 1), ([2, 0, 1, 2], 2, 1, 5, 1),
        ])
        for gather in (False, True)
    ]  # fmt: skip
    check(ranks_of(4), 4, cases)


@st.composite
def any_case(draw):
    n, split = draw(st.integers(1, 4)), draw(st.sampled_from(list(CUTS)))
    kernel, dilation = (draw(st.integers(1, 4)), draw(st.integers(1, 3))), draw(st.integers(1, 2))
    padding, reach = draw(st.integers(0, 3)), dilation
    image = tuple(max(draw(st.integers(1, 12)), reach * (k - 1) + 1 - 2 * padding) for k in kernel)
    heights = None
    if split == "height":
        heights = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
        heights[0] += max(0, reach * (kernel[0] - 1) + 1 - 2 * padding - sum(heights), 1 - sum(heights))
        image = sum(heights), image[1]
    return n, case_of(
        split, kernel=kernel, dilation=dilation, padding=padding, image=image, heights=heights,
        stride=draw(st.integers(1, 3)), channels=(draw(st.integers(n, 6)), draw(st.integers(n, 6))),
        batch=draw(st.integers(1, 5)), bias=draw(st.booleans()), gather=draw(st.booleans()) and split != "in",
        dtype=draw(st.sampled_from([torch.float64, torch.int64])), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=any_case())
def test_any_shape_dtype_and_world(ranks_of, case):
    check(ranks_of(4), case[0], [case[1]])


def test_halo_plan_of_an_example():
    plan = halo_plan([3, 3, 3, 3], kernel=3, padding=1)
    assert [(r.result.start, r.result.stop) for r in plan] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert [(r.reach.start, r.reach.stop) for r in plan] == [(0, 4), (2, 7), (5, 10), (8, 12)]
    assert [(r.above, r.below) for r in plan] == [(1, 0), (0, 0), (0, 0), (0, 1)]


# ---- against DTensor ------------------------------------------------------------------------------------------


def beside_dtensor(dtype):
    """Largest differences from DTensor's convolution with images cut, the one split that it gets right on CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    n = dist.get_world_size()
    case, gaps = case_of("batch", batch=2 * n, dtype=dtype, bias=False), []
    whole, y_grad, mesh = inputs(case)[:2], gradient_of(case), init_device_mesh("cpu", (n,))
    x, weight = (distribute_tensor(t.clone(), mesh, [where]).requires_grad_()
                 for t, where in zip(whole, (Shard(0), Replicate()), strict=True))  # fmt: skip
    y = F.conv2d(x, weight, None, *hyper(case))
    (y * distribute_tensor(y_grad, mesh, [Shard(0)])).sum().full_tensor().backward()
    ours = forward_and_backward(case)
    theirs = [y.to_local(), x.grad.to_local(), weight.grad.full_tensor()]
    for a, b in zip(ours[:3], theirs, strict=True):
        gaps.append((a - b).abs().max().item())
    return gaps


@pytest.mark.parametrize("n", [2, 4])
def test_images_cut_as_dtensor_cuts_them(ranks_of, n):
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        for gaps in ranks_of(n).run(beside_dtensor, dtype, quiet=True):
            assert max(gaps) <= close, gaps


# ---- to the byte ----------------------------------------------------------------------------------------------


def test_what_each_cut_sends(ranks_of):
    ranks, n = ranks_of(4), 4
    for split in CUTS:
        for gather in (False, True) if split != "in" else (False,):
            case = case_of(split, channels=(5, 6), image=(11, 5), batch=5, gather=gather)
            x, weight, bias = (t.numel() * 8 for t in inputs(case))
            y = gradient_of(case)
            trace = ranks.trace(forward_and_backward, case)
            reduced = {"out": x, "in": y.nbytes, "batch": weight + bias, "height": weight + bias}[split]
            for rank in range(n):
                sent = y.nbytes - cut(case, y, 3, (rank + 1) % n, n).nbytes if gather else 0
                if split == "height":  # kernel 3, padding 1: one row to each neighbour, and its gradient back
                    sent += 2 * (1 + (0 < rank < n - 1)) * 5 * 5 * 5 * 8
                assert trace.bytes("all_reduce", rank) == reduced, (split, rank)
                assert trace.bytes("send", rank) == sent, (split, gather, rank)
                assert trace.bytes(rank=rank) - trace.bytes("recv", rank) == reduced + sent


# ---- the module -----------------------------------------------------------------------------------------------


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

x, w = torch.ones(1, 3, 4, 4), torch.ones(2, 3, 3, 3)


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda m: m.conv2d_by_batch(x, w[:, :2]), r"x .* has shape \(1, 3, 4, 4\), weight .* \(2, 2, 3, 3\)"),
        (lambda m: m.conv2d_by_batch(x[0], w), "four dimensions each"),
        (lambda m: m.conv2d_by_input_channels(x, w.double()), "x is torch.float32 on cpu, weight torch.float64"),
        (lambda m: m.conv2d_by_output_channels(x, w[:0]), "more ranks than channels"),
        (
            lambda m: m.conv2d_by_height(x, w, heights=[3, 4]),
            r"heights \[3, 4\] do not fit|sizes \[3, 4\] do not fit",
        ),
        (lambda m: m.conv2d_by_height(x, w, dilation=5), r"reaches over 11 rows is too tall for 8 rows and padding"),
        (lambda m: m.conv2d_by_height(x, w, stride=2, padding="same"), "goes with stride 1"),
        (lambda m: ParallelConv2d(3, 1, 3), "1 output channels of .* cannot be split over 2 ranks: at most 1"),
        (lambda m: ParallelConv2d(1, 3, 3, split="in"), "1 input channels of .* cannot be split over 2 ranks"),
        (lambda m: ParallelConv2d(3, 4, 3, split="rows"), "split is one of 'out', 'in', 'height', not 'rows'"),
        (lambda m: ParallelConv2d.from_module(nn.Conv2d(4, 4, 3, groups=2)), "with groups=1"),
        (lambda m: ParallelConv2d.from_module(nn.Linear(4, 4)), r"splits nn.Conv2d, not Linear\("),
        (lambda m: ParallelConv2d(4, 4, 3, group=3), "group is a int, but has to be a process group"),
        (lambda m: ParallelConv2d.from_module(ParallelConv2d(4, 4, 3)), "is split already: its to_module"),
        (lambda m: ParallelConv2d(4, 4, 3, split="in")(torch.ones(1, 4, 5, 5)), "x needs 2 channels here"),
        (lambda m: ParallelConv2d(4, 4, 3)(torch.ones(1, 2, 5, 5)), "x needs 4 channels here"),
    ],
)
def test_refused_with_a_reason(ranks_of, wrong, told):
    with refused(told) as caught:
        ranks_of(2).run(wrong, split_conv, quiet=True)
    assert caught.value.cause == "ValueError"
