"""conv2d cut along each of its dimensions: against one process, against DTensor, to the byte."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.group import split_sizes
from pardist_lib.mechanisms.tensor_parallel import split_conv
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
    ],
)
def test_refused_with_a_reason(ranks_of, wrong, told):
    with refused(told) as caught:
        ranks_of(2).run(wrong, split_conv, quiet=True)
    assert caught.value.cause == "ValueError"
