"""Ring attention and all-to-all attention against one process: results and all gradients."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.context_parallel.order import deal
from pardist_lib.mechanisms.context_parallel.ring import ring_attention
from tests.mechanisms.context_parallel.cases import ATTENTIONS, MASKS, PLAIN, alone, apart, together

CLOSE = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def check(ranks, n, cases):
    results = ranks.run(in_world, n, lambda: [together(case) for case in cases], quiet=True)
    for case, *of_ranks in zip(cases, *results[:n], strict=True):
        wanted = alone(case)
        for rank, mine in enumerate(of_ranks):
            for what, got, want in zip(("result", "dq", "dk", "dv"), mine, wanted, strict=True):
                assert got.dtype == case["dtype"]
                off = apart(got, want)
                assert off < CLOSE[case["dtype"]], f"{what} of rank {rank} of {n} is off by {off:.2g}: {case}"


CHANGES = [
    *({"s": s} for s in (1, 2, 3, 5, 7, 8, 13)), {"s": 600}, {"s": 601, "order": "contiguous"},
    {"causal": False}, {"causal": False, "order": "contiguous"}, {"order": "contiguous"}, {"layout": "transposed"},
    {"e": 3}, {"d": 1, "e": 1}, {"batch": 0}, {"batch": 1, "s": 1, "causal": False}, {"s": 23, "length": 23}, {"s": 0},
    {"scale": 1000.0}, {"scale": 1000.0, "s": 300, "order": "contiguous"}, {"scale": 1000.0, "causal": False},
    *({"mask": mask, "causal": causal} for mask in MASKS if mask for causal in (True, False)),
    {"mask": "window", "s": 290, "causal": False}, {"mask": "some see nothing", "scale": 1000.0},
    {"documents": "one row"}, {"documents": "each", "s": 41}, {"documents": "each", "order": "contiguous"},
    {"documents": "one row", "mask": "window", "causal": False}, {"documents": "each", "mask": "some see nothing"},
]  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("how", ATTENTIONS)
def test_equals_one_process(ranks_of, how, n):
    base = PLAIN | {"how": how, "heads": 2 * n, "kv": 2 * n}
    cases = [base | change for change in CHANGES]
    cases += [base | {"kv": n} | change for change in ({}, {"s": 7, "causal": False}, {"documents": "each"})]
    cases += [base | {"heads": 6 * n}, base | {"heads": 6 * n, "mask": "window", "order": "contiguous"}]
    small = [{"order": "contiguous"}, {"s": 300, "kv": n}, {"documents": "each", "mask": "some see nothing"}]
    cases += [base | change | {"dtype": dtype} for change in small for dtype in CLOSE if dtype != torch.float64]
    check(ranks_of(4), n, cases)


@pytest.mark.parametrize("n", [3, 4])
def test_a_long_sequence_that_nothing_divides(ranks_of, n):
    long = PLAIN | {"s": 4099, "heads": n, "kv": n, "batch": 1}
    check(ranks_of(4), n, [long | {"how": how} for how in ATTENTIONS])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_attention(ranks_of, data):
    n, kv, groups = (data.draw(st.integers(1, most)) for most in (4, 2, 3))
    how = data.draw(st.sampled_from([*ATTENTIONS]))
    kv = kv * n if how == "all to all" else kv
    case = PLAIN | {"how": how, "kv": kv, "heads": kv * groups, "s": data.draw(st.integers(1, 40))}
    case |= {name: data.draw(st.integers(1, 3)) for name in ("d", "e", "batch")}
    choices = {"mask": [*MASKS], "documents": [None, "one row", "each"], "order": ["zigzag", "contiguous"]}
    choices |= {"causal": [True, False], "scale": [1.0, 30.0]}
    case |= {name: data.draw(st.sampled_from(values)) for name, values in choices.items()}
    check(ranks_of(4), n, [case])


# ---- as part of a program -------------------------------------------------------------------------------------


def of_own_group(how):
    """Ranks 1 and 3 attend to a sequence of their own, without the others."""
    group = dist.new_group([1, 3])
    if dist.get_rank() % 2 == 0:
        return None
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64)
    y = ATTENTIONS[how](*(deal(x, group, 2) for x in (q, k, v)), group)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return (y - deal(want, group, 2)).abs().max().item()


@pytest.mark.parametrize("how", ATTENTIONS)
def test_in_a_group_of_some_ranks(ranks_of, how):
    none, first, none_again, second = ranks_of(4).run(of_own_group, how, quiet=True)
    assert none is none_again is None and max(first, second) < 1e-12


def changed_in_between():
    """Two forwards and their backwards in either order; then keys that are changed after forward."""
    torch.manual_seed(0)
    own = [deal(x, dim=2).requires_grad_() for x in torch.randn(3, 1, 4, 8, 4, dtype=torch.float64)]
    first, second = ring_attention(*own), ring_attention(*(2 * x for x in own))
    in_turn = [torch.autograd.grad(y.sum(), own, retain_graph=True) for y in (first, second)]
    crossed = [torch.autograd.grad(y.sum(), own, retain_graph=True) for y in (second, first)][::-1]
    moved = [x * 1 for x in own]
    y = ring_attention(*moved)
    with torch.no_grad():
        moved[1].add_(1)
    try:
        y.sum().backward()
    except RuntimeError as error:
        return in_turn, crossed, str(error)
    return in_turn, crossed, "no error"


def test_backward_sees_the_keys_of_its_own_forward(ranks_of):
    for in_turn, crossed, said in ranks_of(4).run(changed_in_between, quiet=True):
        for x, y in zip(in_turn, crossed, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
        assert not torch.equal(in_turn[0][1], in_turn[1][1]) and "modified by an inplace operation" in said


def with_and_without_autocast():
    torch.manual_seed(0)
    own = [deal(x, dim=2).bfloat16().requires_grad_() for x in torch.randn(3, 1, 4, 40, 8)]
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = ring_attention(*own)
            found.append([y, *torch.autograd.grad(y.float().square().sum(), own)])
    return found


def test_autocast_changes_nothing_inside_the_ring(ranks_of):
    for found in ranks_of(4).run(with_and_without_autocast, quiet=True):
        assert all(torch.equal(a, b) and a.dtype == torch.bfloat16 for a, b in zip(*found, strict=True))
