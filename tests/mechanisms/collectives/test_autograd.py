"""The autograd pairs: forward and backward against one process's arithmetic, in every dimension, and to the byte."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pardist_lib import RankError
from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms import collectives
from pardist_lib.mechanisms.collectives.autograd import wanted as wanted_now
from pardist_lib.mechanisms.group import split_sizes

NAMES = [name for name in collectives.__all__ if name.endswith("_group") and name != "all_to_all_in_group"]
SLICED = ("scatter_to_group", "reduce_scatter_to_group")  # their result is a slice
GATHERED = ("gather_from_group", "all_gather_from_group")  # their input is one


def whole_of(rank, shape, dtype, seed=0):
    """Small whole numbers: sums are exact in every dtype."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(100 * seed + rank)).to(dtype)


def expected(name, n, shape, dim, dtype):
    """[(output, input's gradient) of each rank] by one process that sees every rank's input and output's gradient."""
    x, g = ([whole_of(r + start, shape, dtype) for r in range(n)] for start in (0, 50))

    def cut(tensors, i):
        return tensors[i].tensor_split(n, dim)[i]

    slices_x, slices_g = torch.cat([cut(x, r) for r in range(n)], dim), torch.cat([cut(g, r) for r in range(n)], dim)
    total_x, total_g = sum(x), sum(g)
    return {
        "copy_to_group": [(x[r], total_g) for r in range(n)],
        "reduce_from_group": [(total_x, g[r]) for r in range(n)],
        "scatter_to_group": [(cut(x, r), slices_g) for r in range(n)],
        "gather_from_group": [(slices_x, cut(g, r)) for r in range(n)],
        "all_gather_from_group": [(slices_x, total_g.tensor_split(n, dim)[r]) for r in range(n)],
        "reduce_scatter_to_group": [(total_x.tensor_split(n, dim)[r], slices_g) for r in range(n)],
    }[name]


def called(name, shape, dim, dtype, strided=False, group=None):
    """On a rank: (output, input's gradient)."""
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    x, g = whole_of(rank, shape, dtype), whole_of(rank + 50, shape, dtype)
    x = x.tensor_split(n, dim)[rank] if name in GATHERED else x
    g = g.tensor_split(n, dim)[rank] if name in SLICED else g
    if strided:
        x, g = (torch.stack([t, torch.zeros_like(t)], -1)[..., 0] for t in (x, g))
    before, given = x.clone(), g.clone()
    x = x.requires_grad_() if dtype.is_floating_point else x
    options = {"dim": dim} if name in SLICED + GATHERED else {}
    if name in GATHERED:
        options["sizes"] = split_sizes(shape[dim], n)
    y = getattr(collectives, name)(x, group=group, **options)
    result = torch.empty(y.shape, dtype=dtype).copy_(y.detach())
    if not dtype.is_floating_point:
        return result, None
    y.backward(g)
    y.detach().add_(1)  # nobody else's memory: neither x nor g may change
    unchanged = torch.equal(g, given) and (name == "copy_to_group" or torch.equal(x, before))
    assert unchanged, f"{name} changed what it was given"
    return result, torch.empty(x.shape, dtype=dtype).copy_(x.grad)


def several(cases):
    return [called(*case) for case in cases]


def check(ranks, n, cases):
    for rank, results in enumerate(ranks.run(several, cases, quiet=True)):
        for case, got in zip(cases, results, strict=True):
            same(got, expected(case[0], n, *case[1:4])[rank], f"{case} on rank {rank} of {n}")


def same(got, wanted, where):
    for what, mine, right in zip(("output", "gradient"), got, wanted, strict=True):
        if mine is not None:
            said = f"{what} of {where}"
            torch.testing.assert_close(mine, right, rtol=0, atol=0, msg=lambda text, said=said: f"{said}: {text}")


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_pair_along_every_dimension(ranks_of, n):
    """Uneven, even, fewer than ranks, none at all; the last one strided."""
    cases = [
        (name, shape, dim, torch.float64, strided)
        for name in NAMES
        for shape, strided in [((7, 12, 2), False), ((0, 3, 5), False), ((4, 5, 6), True)]
        for dim in (0, 1, -1)
    ]
    check(ranks_of(n), n, cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_every_pair_in_every_dtype(ranks_of, dtype):
    check(ranks_of(3), 3, [(name, (5, 4), dim, dtype) for name in NAMES for dim in (0, 1)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_world(ranks_of, data):
    n, name = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(NAMES))
    shape = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    check(ranks_of(n), n, [(name, shape, dim, torch.float32, data.draw(st.booleans()))])


def beside_torch():
    """Largest difference from torch.distributed.nn's functions, which scale nothing: forward and backward."""
    from torch.distributed.nn import functional as theirs

    rank, n = dist.get_rank(), dist.get_world_size()
    worst = 0.0
    for ours, other in [
        (lambda x: collectives.all_gather_from_group(x), lambda x: torch.cat(theirs.all_gather(x))),
        (lambda x: collectives.copy_to_group(collectives.reduce_from_group(x)), theirs.all_reduce),
    ]:
        a = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        b = a.detach().clone().requires_grad_()
        y, z = ours(a), other(b)
        g = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank + n))
        y.backward(g), z.backward(g)
        worst = max(worst, (y - z).abs().max().item(), (a.grad - b.grad).abs().max().item())
    return worst


@pytest.mark.parametrize("n", [2, 3])
def test_same_as_torchs_own(ranks_of, n):
    assert max(ranks_of(n).run(beside_torch, quiet=True)) < 1e-12


def second_derivative():
    x = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    y = collectives.reduce_from_group((dist.get_rank() + 1) * collectives.copy_to_group(x) ** 3)
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    return first.item(), torch.autograd.grad(first, x)[0].item()


def test_a_gradient_has_a_gradient(ranks_of):
    """y = (1 + 2 + 3)·x³"""
    assert ranks_of(3).run(second_derivative, quiet=True) == [(6 * 3 * 4.0, 6 * 6 * 2.0)] * 3


# ---- to the byte ----------------------------------------------------------------------------------------------


def forward(name, shape, dim):
    rank, n = dist.get_rank(), dist.get_world_size()
    x = torch.ones(shape)
    x = (x.tensor_split(n, dim)[rank] if name in GATHERED else x).clone().requires_grad_()
    options = {"dim": dim} if name in SLICED + GATHERED else {}
    options |= {"sizes": split_sizes(shape[dim], n)} if name in GATHERED else {}
    return getattr(collectives, name)(x, **options)


def both(name, shape, dim):
    forward(name, shape, dim).sum().backward()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bytes_of_forward_and_backward(ranks_of, n):
    shape = (12, 5)
    size, none, part = 240, {}, {"send": 240 * (n - 1) // n}
    all_reduce = {"all_reduce": size}
    forms = {
        "copy_to_group": (none, all_reduce),
        "reduce_from_group": (all_reduce, none),
        "scatter_to_group": (none, part),
        "gather_from_group": (part, none),
        "all_gather_from_group": (part, part),
        "reduce_scatter_to_group": (part, part),
    }
    for name, (ahead, back) in forms.items():
        traces = [ranks_of(n).trace(fn, name, shape, 0, quiet=True) for fn in (forward, both)]
        for rank in range(n):
            for trace, wanted in zip(traces, ([ahead], [ahead, back]), strict=True):
                for op in ("all_reduce", "send"):
                    want = sum(w.get(op, 0) for w in wanted) if n > 1 else 0
                    assert sum(e.bytes for e in trace.collectives if e.rank == rank and e.name == op) == want, name
                assert {e.name for e in trace.collectives} <= {"all_reduce", "send", "recv"}


# ---- what a backward is asked for ----------------------------------------------------------------------------------


class Asks(torch.autograd.Function):
    """a·b·c (the number is for nothing), and in `asked` what each backward was asked for."""

    asked = []

    @staticmethod
    def forward(ctx, a, number, b, c):
        ctx.save_for_backward(a, b, c)
        return a * b * c

    @staticmethod
    def backward(ctx, grad):
        a, b, c = ctx.saved_tensors
        Asks.asked.append(wanted_now(ctx))
        return grad * b * c, None, grad * a * c, grad * a * b


@pytest.mark.parametrize("leaf", [True, False])
def test_a_function_knows_which_gradients_this_backward_is_for(leaf):
    """The middle one never requires any. Of leaves, and of what has a graph itself."""
    leaves = [torch.ones((), requires_grad=i != 1) for i in range(3)]
    a, b, c = leaves if leaf else [t * 1 for t in leaves]
    y = Asks.apply(a, 2.0, b, c)
    Asks.asked.clear()
    torch.autograd.grad(y, [a], retain_graph=True)
    torch.autograd.grad(y, [c], retain_graph=True)
    torch.autograd.grad(y, [c, a], retain_graph=True)
    torch.autograd.backward(y, inputs=[leaves[2]], retain_graph=True)
    torch.autograd.backward(y)
    one, other, both = [True, *3 * [False]], [*3 * [False], True], [True, False, False, True]
    assert Asks.asked == [one, other, both, other, both]
    assert leaves[0].grad == 1 and leaves[2].grad == 2


# ---- groups and what does not fit -----------------------------------------------------------------------------


def in_pairs():
    """Each pair of ranks by itself, for every function."""
    group = [group_of((0, 1)), group_of((2, 3))][dist.get_rank() // 2]
    return [called(name, (3, 5), 1, torch.float64, False, group) for name in NAMES]


def test_a_group_keeps_to_itself(ranks_of):
    results = ranks_of(4).run(in_pairs, quiet=True)
    for rank in range(4):
        for name, got in zip(NAMES, results[rank], strict=True):
            same(got, expected(name, 2, (3, 5), 1, torch.float64)[rank % 2], f"{name} on rank {rank}")


def refused(name, *args, **kwargs):
    getattr(collectives, name)(*args, **kwargs)


def outside(name):
    group = group_of((0, 1))
    if dist.get_rank() == 2:
        getattr(collectives, name)(torch.ones(4), group=group)


def test_what_does_not_fit_is_refused(ranks_of):
    ranks, x = ranks_of(3), torch.ones(4, 2)
    for name in (*SLICED, *GATHERED):
        with pytest.raises(RankError, match=r"a tensor of shape \[4, 2\] has no dimension 2"):
            ranks.run(refused, name, x, dim=2, quiet=True)
    for name in GATHERED:
        with pytest.raises(RankError, match=r"sizes \[4, 4\] do not fit: 3 ranks, of which rank \d has 4 along"):
            ranks.run(refused, name, x, dim=0, sizes=[4, 4], quiet=True)
    with pytest.raises(RankError, match=r"cuts them, \[3, 3, 2\] along dimension 0, not \[4, 0, 4\]"):
        ranks.run(odd_sizes, quiet=True)
    for name in NAMES:
        with pytest.raises(RankError, match="rank 2 is not in this group"):
            ranks.run(outside, name, quiet=True)


def odd_sizes():
    sizes = [4, 0, 4]
    collectives.all_gather_from_group(torch.ones(sizes[dist.get_rank()], 2), sizes=sizes)


def test_a_smaller_world_on_the_same_ranks(ranks_of):
    results = ranks_of(4).run(in_world, 3, called, "gather_from_group", (5, 2), 0, torch.float64, quiet=True)
    for rank in range(3):
        same(results[rank], expected("gather_from_group", 3, (5, 2), 0, torch.float64)[rank], f"rank {rank}")
