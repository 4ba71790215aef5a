"""A = B × C in blocks: against one process, against DTensor, and to the byte."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.group import split_sizes
from pardist_lib.mechanisms.tensor_parallel import split_matmul
from pardist_lib.mechanisms.tensor_parallel.split_matmul import (
    matmul_by_columns,
    matmul_by_inner,
    matmul_by_rows,
    panels,
    process_grid,
    summa,
)
from tests.mechanisms.refusals import refused

CUTS = {"rows": (0, None, 0), "columns": (None, 1, 1), "inner": (1, 0, 0)}  # where B, C and A are cut
CLOSE = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 1e-6), torch.bfloat16: (2e-2, 2e-2)}
GRIDS = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 3: [(1, 3), (3, 1)], 4: [(2, 2), (1, 4), (4, 1)]}


def case_of(split, shape=(6, 8, 4), **changes):
    return {"split": split, "shape": shape, "dtype": torch.float64, "gather": False, "seed": 0, "panel": None} | changes


def operands(case):
    """B, C and the gradient of A, whole: small whole numbers where the dtype is for those."""
    m, k, w = case["shape"]
    numbers = torch.Generator().manual_seed(case["seed"])
    if case["dtype"].is_floating_point:
        draw = lambda *shape: torch.randn(shape, generator=numbers, dtype=torch.float64).to(case["dtype"])  # noqa: E731
    else:
        draw = lambda *shape: torch.randint(-9, 10, shape, generator=numbers).to(case["dtype"])  # noqa: E731
    return draw(m, k), draw(k, w), draw(m, w)


def part(tensor, dim, rank, n):
    return tensor if dim is None else tensor.tensor_split(n, dim)[rank]


def cut(case, tensor, which, rank, n):
    """A rank's part of B (0), C (1) or A (2)."""
    if isinstance(case["split"], tuple):
        rows, columns = case["split"]
        return part(part(tensor, 0, rank // columns, rows), 1, rank % columns, columns)
    return part(tensor, CUTS[case["split"]][which], rank, n)


def multiply(case, b, c, group=None):
    n, (m, k, w) = dist.get_world_size(group), case["shape"]
    if isinstance(case["split"], tuple):
        return summa(b, c, (m, k, w), process_grid(*case["split"]), gather=case["gather"], panel=case["panel"])
    if case["split"] == "rows":
        return matmul_by_rows(b, c, group, gather=case["gather"], sizes=split_sizes(m, n))
    if case["split"] == "columns":
        return matmul_by_columns(b, c, group, gather=case["gather"], sizes=split_sizes(w, n))
    return matmul_by_inner(b, c, group, gather=case["gather"])


def forward_and_backward(case):
    rank, n = dist.get_rank(), dist.get_world_size()
    whole_b, whole_c, a_grad = operands(case)
    b, c = (cut(case, whole, i, rank, n).clone() for i, whole in enumerate((whole_b, whole_c)))
    if not case["dtype"].is_floating_point:
        return multiply(case, b, c), None, None
    b.requires_grad_(), c.requires_grad_()
    a = multiply(case, b, c)
    (a * (a_grad if case["gather"] else cut(case, a_grad, 2, rank, n))).sum().backward()
    return a.detach(), b.grad, c.grad


def several(cases):
    return [forward_and_backward(case) for case in cases]


def check(ranks, n, cases):
    results = ranks.run(in_world, n, several, cases, quiet=True)
    for i, case in enumerate(cases):
        b, c, a_grad = operands(case)
        wanted = b @ c, a_grad @ c.T, b.T @ a_grad
        for rank in range(n):
            for which, name, got in zip(
                (2, 0, 1), ("A", "B's gradient", "C's gradient"), results[rank][i], strict=True
            ):
                if got is None:
                    continue
                want = wanted[0 if which == 2 else which + 1]
                want = want if which == 2 and case["gather"] else cut(case, want, which, rank, n)
                close = CLOSE.get(case["dtype"], (0, 0))
                torch.testing.assert_close(got, want, rtol=close[0], atol=close[1],
                                           msg=lambda text: f"{name}, rank {rank} of {n}, {case}: {text}")  # noqa: B023 # fmt: skip


SHAPES = [(6, 8, 4), (12, 12, 12), (5, 7, 3), (2, 3, 9), (1, 1, 1), (3, 0, 2), (0, 4, 5)]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_split_equals_one_process(ranks_of, n):
    cases = [
        case_of(split, shape, gather=gather, seed=i)
        for split in (*CUTS, *GRIDS[n])
        for i, shape in enumerate(SHAPES)
        for gather in (False, True)
    ]
    check(ranks_of(4), n, cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32], ids=str)
def test_every_dtype(ranks_of, dtype):
    splits = [*CUTS, (2, 2)] if dtype != torch.bfloat16 else ["rows", "columns"]  # bf16 sums depend on their order
    check(ranks_of(4), 4, [case_of(s, (7, 9, 5), dtype=dtype, gather=g) for s in splits for g in (False, True)])


def test_panels_of_any_width_give_the_same_product(ranks_of):
    cases = [case_of(grid, (5, 11, 6), panel=panel, gather=True) for grid in GRIDS[4] for panel in (1, 2, 4, 100)]
    check(ranks_of(4), 4, cases)


@st.composite
def any_case(draw):
    n = draw(st.integers(1, 4))
    split = draw(st.sampled_from([*CUTS, *GRIDS[n]]))
    shape = tuple(draw(st.lists(st.integers(0, 13), min_size=3, max_size=3)))
    dtype = draw(st.sampled_from([torch.float64, torch.int64]))
    return n, case_of(
        split, shape, dtype=dtype, gather=draw(st.booleans()), seed=draw(st.integers(0, 99)),
        panel=draw(st.sampled_from([None, 1, 3])),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=any_case())
def test_any_shape_dtype_and_world(ranks_of, case):
    check(ranks_of(4), case[0], [case[1]])


def test_panels_lie_in_one_block_of_both_operands():
    for inner, rows, columns, widest in [
        (12, 2, 2, None),
        (11, 2, 3, None),
        (7, 3, 2, 2),
        (3, 4, 2, None),
        (0, 2, 2, 1),
    ]:
        steps = panels(inner, rows, columns, widest)
        assert [i for p in steps for i in range(p.first, p.last)] == list(range(inner))
        for p in steps:
            whole = torch.arange(inner)
            assert whole.tensor_split(columns)[p.owner_column][p.in_b].tolist() == list(range(p.first, p.last))
            assert whole.tensor_split(rows)[p.owner_row][p.in_c].tolist() == list(range(p.first, p.last))
            assert p.last - p.first <= (widest or inner)
    assert len(panels(12, 2, 2)) == 2 and len(panels(11, 2, 3)) == 4


# ---- training ------------------------------------------------------------------------------------------------


def twenty_steps(split, make, distributed=True):
    """Fit B × C to a target by gradient descent, B and C being the parameters; the whole B and C at the end."""
    case = case_of(split, (6, 5, 7), gather=True, seed=3)
    whole_b, whole_c, target = operands(case)
    rank, n = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    b, c = (cut(case, w, i, rank, n).clone().requires_grad_() if distributed else w.clone().requires_grad_()
            for i, w in enumerate((whole_b, whole_c)))  # fmt: skip
    optimizer = make([b, c])
    for _ in range(20):
        optimizer.zero_grad()
        ((multiply(case, b, c) if distributed else b @ c) - target).square().mean().backward()
        optimizer.step()
    return b.detach(), c.detach()


@pytest.mark.parametrize("split", [*CUTS, (2, 2)], ids=str)
def test_twenty_steps_end_where_one_process_does(ranks_of, split):
    for make in (lambda p: torch.optim.SGD(p, 0.5, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.05)):
        b, c = twenty_steps(split, make, distributed=False)
        for rank, (b_part, c_part) in enumerate(ranks_of(4).run(twenty_steps, split, make, quiet=True)):
            for which, whole, got in ((0, b, b_part), (1, c, c_part)):
                want = cut({"split": split}, whole, which, rank, 4)
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# ---- against DTensor ------------------------------------------------------------------------------------------


def beside_dtensor(dtype):
    """The largest difference from DTensor's product and gradients, for each split."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    rank, n, gaps = dist.get_rank(), dist.get_world_size(), {}
    line = init_device_mesh("cpu", (n,))
    ways = [(split, line, [[Replicate() if d is None else Shard(d)] for d in dims[:2]]) for split, dims in CUTS.items()]
    if n == 4:
        ways.append(((2, 2), init_device_mesh("cpu", (2, 2)), [[Shard(0), Shard(1)]] * 2))
    for split, mesh, placements in ways:
        case = case_of(split, (4 * n, 3 * n, 2 * n), gather=True, dtype=dtype)
        *wholes, a_grad = operands(case)
        theirs = [
            distribute_tensor(w.clone(), mesh, p).requires_grad_() for w, p in zip(wholes, placements, strict=True)
        ]
        product = (theirs[0] @ theirs[1]).full_tensor()
        (product * a_grad).sum().backward()
        ours = [cut(case, w, i, rank, n).clone().requires_grad_() for i, w in enumerate(wholes)]
        a = multiply(case, *ours)
        (a * a_grad).sum().backward()
        pairs = [(ours[i].grad, cut(case, theirs[i].grad.full_tensor(), i, rank, n)) for i in (0, 1)]
        gaps[str(split)] = max((x - y).abs().max().item() for x, y in [(a, product), *pairs])
    return gaps


@pytest.mark.parametrize("n", [2, 3, 4])
def test_same_as_dtensor(ranks_of, n):
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for gaps in ranks_of(n).run(beside_dtensor, dtype, quiet=True):
            assert max(gaps.values()) <= close, gaps


# ---- to the byte ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 12, 16), (7, 9, 5)], ids=str)
@pytest.mark.parametrize("split", CUTS)
def test_what_a_split_sends(ranks_of, split, shape):
    ranks, n, (m, k, w) = ranks_of(4), 4, shape

    for gather in (False, True):
        trace = ranks.trace(forward_and_backward, case_of(split, shape, gather=gather))
        whole, pieces = m * w * 8, split_sizes(w if split == "columns" else m, n)
        rest = m if split == "columns" else w  # elements in one row, or column, that is dealt out
        for rank in range(n):
            ring = whole - pieces[(rank + 1) % n] * rest * 8  # an all-gather of A
            scatter = whole - pieces[rank] * rest * 8  # a reduce-scatter of A
            reduced = {"rows": k * w * 8, "columns": m * k * 8, "inner": 0}[split]
            if split == "inner":
                expected = (whole, 0) if gather else (0, scatter + ring)
            else:
                expected = (reduced, ring if gather else 0)
            assert (trace.bytes("all_reduce", rank), trace.bytes("send", rank)) == expected, (rank, gather)
            assert trace.bytes(rank=rank) - trace.bytes("recv", rank) == sum(expected)


@pytest.mark.parametrize("grid", [(2, 2), (1, 4), (4, 1)], ids=str)
def test_what_summa_sends(ranks_of, grid):
    (rows, columns), (m, k, w) = grid, (7, 9, 5)
    trace = ranks_of(4).trace(forward_and_backward, case_of(grid, (m, k, w)))
    gathered = ranks_of(4).trace(forward_and_backward, case_of(grid, (m, k, w), gather=True))
    areas = [h * v for h in split_sizes(m, rows) for v in split_sizes(w, columns)]
    for rank in range(4):
        (i, j), item = divmod(rank, columns), 8
        high, wide = split_sizes(m, rows)[i], split_sizes(w, columns)[j]
        b_part, c_part = high * split_sizes(k, columns)[j], split_sizes(k, rows)[i] * wide
        panels_sent = b_part * (columns - 1) + c_part * (rows - 1)
        summands = high * k - b_part + k * wide - c_part  # of what others own of B's rows and C's columns
        assert trace.bytes(rank=rank) - trace.bytes("recv", rank) == item * (2 * panels_sent + summands)
        more = m * w - areas[(rank + 1) % 4]
        assert gathered.bytes("send", rank) - trace.bytes("send", rank) == item * more


# ---- groups, and what is refused ------------------------------------------------------------------------------


def in_halves():
    """Two products at once, each on its own half of the ranks."""
    groups = {members: dist.new_group(members) for members in ((1, 3), (0, 2))}
    mine = (1, 3) if dist.get_rank() % 2 else (0, 2)
    group, place = groups[mine], mine.index(dist.get_rank())
    grid, results = process_grid(1, 2, group), []
    for split in CUTS:
        case = case_of(split, gather=True, seed=mine[0])
        b, c, _ = operands(case)
        results.append(multiply(case, cut(case, b, 0, place, 2), cut(case, c, 1, place, 2), group))
        results[-1] = bool(torch.allclose(results[-1], b @ c))
    results.append(bool(torch.allclose(summa(grid.block(b), grid.block(c), case["shape"], grid, gather=True), b @ c)))
    try:
        matmul_by_rows(b, c, groups[(0, 2) if mine == (1, 3) else (1, 3)])
    except ValueError as error:
        return results, str(error)


def test_two_groups_multiply_at_once_and_outsiders_are_told(ranks_of):
    for rank, (results, heard) in enumerate(ranks_of(4).run(in_halves, quiet=True)):
        assert results == [True] * 4
        assert f"rank {rank} is not in this group" in heard


ones = torch.ones


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda m: m.matmul_by_rows(ones(2, 3), ones(4, 5)), r"b \(2, 3\) has 3 columns, c \(4, 5\) has 4 rows"),
        (lambda m: m.matmul_by_columns(ones(3), ones(3, 5)), r"multiplies matrices: b has shape \(3,\)"),
        (lambda m: m.matmul_by_inner(ones(2, 3), ones(3, 5).double()), "b is torch.float32 on cpu, c torch.float64"),
        (lambda m: m.matmul_by_rows(ones(2, 3), ones(3, 5), gather=True, sizes=[3, 3]), r"sizes \[3, 3\] do not fit"),
        (lambda m: m.process_grid(2, 2), "2×2 ranks asked for, the group has 2: 1×2, 2×1 would fit"),
        (lambda m: m.process_grid(-1, -2), "-1×-2 ranks asked for"),
        (
            lambda m: m.summa(ones(4, 6), ones(6, 2), (4, 6, 4), m.process_grid(1, 2)),
            r"b has shape \(4, 6\), but row 0, column . of a 1×2 grid has \(4, 3\) of a \(4, 6\) matrix",
        ),
    ],
)
def test_refused_with_a_reason(ranks_of, wrong, told):
    with refused(told) as caught:
        ranks_of(2).run(wrong, split_matmul, quiet=True)
    assert caught.value.cause == "ValueError"
