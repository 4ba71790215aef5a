"""Every collective: against one process's arithmetic, against torch's own, and to the byte."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pardist_lib.mechanisms import collectives
from pardist_lib.mechanisms.group import split_sizes
from tests.mechanisms.collectives.cases import (
    DTYPES,
    NAMES,
    OPS,
    called,
    case_of,
    check,
    expected,
    kind_of,
    same,
)
from tests.mechanisms.collectives.counted import sent_by

# ---- against one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_collective_at_every_kind_of_size(ranks_of, n):
    """Empty, smaller than n, a multiple, one more; from every root."""
    cases = []
    for name in NAMES:
        cases += [case_of(name, n, rows=rows, sizes=split_sizes(rows, n)) for rows in (0, n - 1, 3 * n, 3 * n + 1)]
        if kind_of(name) in ("broadcast", "reduce", "gather", "scatter"):
            cases += [case_of(name, n, root=root) for root in range(n)]
    check(ranks_of(n), cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_collective_moves_every_dtype(ranks_of, dtype):
    check(ranks_of(3), [case_of(name, 3, dtype=dtype) for name in NAMES])


@pytest.mark.parametrize("op", OPS)
def test_every_operation(ranks_of, op):
    reducing = [name for name in NAMES if "reduce" in name]
    check(ranks_of(3), [case_of(name, 3, op=op, dtype=torch.float64) for name in reducing])
    if op != "AVG":
        check(ranks_of(4), [case_of(name, 4, op=op, dtype=torch.bool) for name in reducing])


@st.composite
def any_case(draw):
    n = draw(st.integers(1, 4))
    name, dtype, op = draw(st.sampled_from(NAMES)), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(list(OPS)))
    if dtype.is_complex and op in ("MAX", "MIN") or op == "AVG" and not dtype.is_floating_point:
        op = "SUM"
    return case_of(
        name, n, dtype=dtype, op=op, rows=draw(st.integers(0, 11)), root=draw(st.integers(0, n - 1)),
        shape=draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)])), seed=draw(st.integers(0, 99)),
        sizes=draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)),
        layout=draw(st.sampled_from(["contiguous", "transposed", "strided"])),
        piece_bytes=draw(st.sampled_from([8, 24, 64, 1 << 20])),
    )  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=any_case())
def test_any_shape_dtype_operation_and_world(ranks_of, case):
    check(ranks_of(case["n"]), [case])


def long_tensors():
    """Ours on tensors of several pieces, while everybody sends before anybody receives: elementwise right?"""
    rank, n, wrong = dist.get_rank(), dist.get_world_size(), []
    line = torch.arange(3_500_001.0)  # 14 MB, uneven in every way
    for name in ("ring", "naive", "tree", "recursive_doubling", "halving_doubling"):
        x = line + rank
        if not torch.equal(getattr(collectives, f"{name}_all_reduce")(x), n * line + sum(range(n))):
            wrong.append(name)
    for name in ("naive", "chain", "tree"):
        x = line * (rank == 1)
        if not torch.equal(getattr(collectives, f"{name}_broadcast")(x, src=1), line):
            wrong.append(name)
    shard = line.tensor_split(n)[rank]
    if not torch.equal(collectives.ring_all_gather(shard, split_sizes(len(line), n)), line):
        wrong.append("ring_all_gather")
    if not torch.equal(collectives.ring_reduce_scatter(line), n * shard):
        wrong.append("ring_reduce_scatter")
    if not torch.equal(collectives.pairwise_all_to_all(line), shard.repeat(n)):
        wrong.append("pairwise_all_to_all")
    return wrong


@pytest.mark.parametrize("n", [2, 3])
def test_long_tensors_stream_without_a_deadlock(ranks_of, n):
    assert ranks_of(n).run(long_tensors, quiet=True) == [[]] * n


# ---- against torch --------------------------------------------------------------------------------------------


def beside_torch(dtype):
    """{collective: largest difference from torch's own, relative to the largest number}"""
    rank, n = dist.get_rank(), dist.get_world_size()
    x = torch.randn(12 * n, 5, generator=torch.Generator().manual_seed(rank), dtype=dtype)
    chunks, full = list(x.chunk(n)), [torch.empty_like(x) for _ in range(n)]
    theirs = {kind: x.clone() for kind in ("all_reduce", "reduce", "broadcast")}
    dist.all_reduce(theirs["all_reduce"])
    dist.reduce(theirs["reduce"], 0)
    if rank:
        theirs["reduce"] = x  # torch leaves anything there, ours what was
    dist.broadcast(theirs["broadcast"], n - 1)
    theirs["reduce_scatter"] = torch.empty_like(chunks[0])
    dist.reduce_scatter(theirs["reduce_scatter"], chunks)
    dist.all_gather(full, x)
    theirs["all_gather"] = torch.cat(full)
    theirs["gather"] = theirs["all_gather"] if rank == 0 else None
    theirs["scatter"] = torch.empty_like(chunks[0])
    dist.scatter(theirs["scatter"], chunks if rank == 0 else None, 0)
    theirs["all_to_all"] = torch.empty_like(x)
    dist.all_to_all_single(theirs["all_to_all"], x)
    difference = {}
    for name in NAMES:
        kind, function = kind_of(name), getattr(collectives, name)
        if kind == "scatter":
            ours = function(torch.empty_like(chunks[0]), x if rank == 0 else None)
        else:
            ours = function(x.clone(), **({"src": n - 1} if kind == "broadcast" else {}))
        if theirs[kind] is None:
            difference[name] = 0.0 if ours is None else float("inf")
        else:
            difference[name] = ((ours - theirs[kind]).abs().max() / theirs[kind].abs().max()).item()
    return difference


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_same_as_torch(ranks_of, n):
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        for rank, difference in enumerate(ranks_of(n).run(beside_torch, dtype, quiet=True)):
            for name, amount in difference.items():
                assert amount <= (close if "reduce" in name else 0), (name, dtype, rank, amount)


# ---- to the byte ----------------------------------------------------------------------------------------------


def elements_sent(name, rank, n, size, root):
    """The formulas: elements that `rank` sends for a whole of `size` elements in chunks c."""
    c, seat = split_sizes(size, n), (rank - root) % n
    power = n.bit_length() - 1  # of the ranks that recursive doubling uses
    if n == 1:
        return 0
    if name.startswith(("recursive", "halving")):
        paired = rank < 2 * (n - 2**power)
        if paired and rank % 2 == 0:
            return size
        half = rank // 2 if paired else rank - (n - 2**power)
        kept = size if power == 1 else size + [size - size // 2, size // 2][half // 2]
        return paired * size + (power * size if name.startswith("recursive") else kept)
    branch = sum(c[(s + root) % n] for s in branch_of(seat, n))
    return {
        "naive_broadcast": (n - 1) * size * (seat == 0),
        "chain_broadcast": size * (seat != n - 1),
        "tree_broadcast": size * len(children_of(seat, n)),
        "naive_reduce": size * (seat != 0),
        "tree_reduce": size * (seat != 0),
        "naive_gather": c[rank] * (seat != 0),
        "tree_gather": branch * (seat != 0),
        "naive_scatter": (size - c[rank]) * (seat == 0),
        "tree_scatter": branch - c[rank],
        "naive_all_reduce": size if rank else (n - 1) * size,
        "tree_all_reduce": size * ((rank != 0) + len(children_of(rank, n))),
        "ring_all_reduce": 2 * size - c[rank] - c[(rank + 1) % n],
        "naive_reduce_scatter": size if rank else size - c[0],
        "ring_reduce_scatter": size - c[rank],
        "direct_reduce_scatter": size - c[rank],
        "naive_all_gather": c[rank] if rank else (n - 1) * size,
        "ring_all_gather": size - c[(rank + 1) % n],
        "direct_all_gather": (n - 1) * c[rank],
        "bruck_all_gather": {2: c[rank], 3: 2 * c[rank], 4: 2 * c[rank] + c[(rank + 1) % n]}[n],
        "naive_all_to_all": size if rank else n * (size - c[0]),
        "pairwise_all_to_all": size - c[rank],
        "bruck_all_to_all": {2: 1, 3: 2, 4: 4}[n] * size,  # chunks of `size`: input_of makes n of them
    }[name]


def children_of(seat, n):
    """Below a seat of a binomial tree: those that differ in one bit, lower than all of the seat's own."""
    return [seat + 2**b for b in range(10) if seat + 2**b < n and (seat == 0 or seat % 2 ** (b + 1) == 0)]


def branch_of(seat, n):
    return [seat] + [s for child in children_of(seat, n) for s in branch_of(child, n)]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_payload_is_the_formula_to_the_byte_and_no_library_collective_is_called(ranks_of, n):
    root = n // 2
    cases = [
        case_of(name, n, rows=size, sizes=split_sizes(size, n), root=root, dtype=dtype)
        for name in NAMES
        for size, dtype in ((12, torch.float32), (11, torch.float64), (2, torch.int16))
    ]
    for rank, (messages, library) in enumerate(ranks_of(n).run(sent_by, cases, quiet=True)):
        assert library == []
        for case, sizes in zip(cases, messages, strict=True):
            elements = elements_sent(case["name"], rank, n, case["rows"], root)
            assert sum(sizes) == elements * case["dtype"].itemsize, (rank, case)
            assert 0 not in sizes, (rank, case)


# ---- groups ---------------------------------------------------------------------------------------------------


def in_subgroups(cases):
    """Two halves at once; per rank its results, or what a rank hears that is not in the group."""
    groups = {members: dist.new_group(members) for members in ((1, 3), (0, 2))}
    mine = (1, 3) if dist.get_rank() % 2 else (0, 2)
    results = [called(case, groups[mine], list(mine)) for case in cases]
    outside, heard = groups[(0, 2) if mine == (1, 3) else (1, 3)], []
    for name in NAMES:
        x = torch.zeros(4)
        try:
            getattr(collectives, name)(x, group=outside, **({"src": 0} if "broadcast" in name else {}))
        except ValueError as error:
            heard.append(str(error))
    try:
        collectives.tree_broadcast(torch.zeros(1), src=1 - dist.get_rank() % 2, group=groups[mine])
    except ValueError as error:
        heard.append(str(error))
    dist.destroy_process_group(groups[mine])
    return results, heard


def test_subgroups_count_from_their_own_first_rank_and_outsiders_are_told(ranks_of):
    cases = [case_of(name, 2, root=root) for name in NAMES for root in (0, 1)]
    for rank, (results, heard) in enumerate(ranks_of(4).run(in_subgroups, cases, quiet=True)):
        for case, got in zip(cases, results, strict=True):
            same(got, expected(case)[rank // 2], f"rank {rank} of {case}")
        *outside, root = heard
        assert len(outside) == len(NAMES) and all(f"rank {rank} is not in this group" in text for text in outside)
        assert root == f"rank {1 - rank % 2} is not in the group of ranks {[1, 3] if rank % 2 else [0, 2]}"
