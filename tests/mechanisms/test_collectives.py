"""Collectives from send and receive: against one process's arithmetic, against torch's own, and to the byte."""

import inspect

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pardist_lib.mechanisms import collectives
from pardist_lib.mechanisms.collectives import point_to_point
from pardist_lib.mechanisms.group import split_sizes
from tests.mechanisms.refusals import refused

OPS = {
    "SUM": torch.sum,
    "AVG": lambda stacked, dim: torch.sum(stacked, dim) / len(stacked),
    "MAX": torch.amax,
    "MIN": torch.amin,
    "PRODUCT": torch.prod,
}
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool,
]  # fmt: skip
KINDS = ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce", "gather", "scatter"]
NAMES = [name for name in collectives.__all__ if name != "split_sizes" and not name.endswith("_group")]


def kind_of(name):
    return next(kind for kind in KINDS if name.endswith(kind))


def case_of(name, n, **changes):
    """One call of one collective, as plain data: every process can make every rank's input from it."""
    case = {
        "name": name, "n": n, "rows": 7, "shape": (), "dtype": torch.float32, "op": "SUM", "root": n - 1, "seed": 0,
        "layout": "contiguous", "sizes": [(5 * rank + 3) % 4 for rank in range(n)], "piece_bytes": 16,
    }  # fmt: skip
    return case | changes


def input_of(rank, case):
    """Small whole numbers: their sums and products are exact in every dtype, whatever the order."""
    kind, rows = kind_of(case["name"]), case["rows"]
    if kind in ("all_gather", "gather"):
        rows = case["sizes"][rank]
    elif kind == "scatter":
        rows = sum(case["sizes"])
    elif case["name"] == "bruck_all_to_all":
        rows *= case["n"]
    numbers = torch.Generator().manual_seed(1000 * case["seed"] + rank)
    x = torch.randint(0, 3, (rows, *case["shape"]), generator=numbers).to(case["dtype"])
    if case["layout"] == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    return torch.stack([x, torch.zeros_like(x)], -1)[..., 0] if case["layout"] == "strided" else x


def expected(case):
    """What every rank must end with, by one process that sees all inputs."""
    kind, n, root = kind_of(case["name"]), case["n"], case["root"]
    inputs = [input_of(rank, case) for rank in range(n)]
    if kind == "broadcast":
        return [inputs[root]] * n
    if kind == "all_gather":
        return [torch.cat(inputs)] * n
    if kind == "gather":
        return [torch.cat(inputs) if rank == root else None for rank in range(n)]
    if kind == "scatter":
        return list(inputs[root].split(case["sizes"]))
    if kind == "all_to_all":
        return [torch.cat([x.tensor_split(n)[rank] for x in inputs]) for rank in range(n)]
    total = OPS[case["op"]](torch.stack(inputs), 0).to(case["dtype"])
    if kind == "reduce":
        return [total if rank == root else inputs[rank] for rank in range(n)]
    return [total] * n if kind == "all_reduce" else list(total.tensor_split(n))


def called(case, group=None, members=None):
    """On a rank: make the call, look at what can only be seen there, return the result."""
    members = members or list(range(case["n"]))
    rank, root = members.index(dist.get_rank()), members[case["root"]]
    kind, op = kind_of(case["name"]), getattr(dist.ReduceOp, case["op"])
    function, x = getattr(collectives, case["name"]), input_of(rank, case)
    options = {"group": group, "op": op, "sizes": case["sizes"], "piece_bytes": case["piece_bytes"]}
    options |= {"src": root, "dst": root}
    options = {name: value for name, value in options.items() if name in inspect.signature(function).parameters}
    if kind == "scatter":
        whole, x = (x if rank == case["root"] else None), torch.empty_like(x.split(case["sizes"])[rank])
        result = function(x, whole, **options)
    else:
        result = function(x, **options)
    if kind in ("broadcast", "reduce", "all_reduce", "scatter"):
        assert result is x, "not in place"
    else:
        assert torch.equal(x, input_of(rank, case)), "the input was changed"
    return result


def several(cases):
    results = [called(case) for case in cases]
    return [result if result is None else result.clone(memory_format=torch.contiguous_format) for result in results]


def check(ranks, cases):
    results = ranks.run(several, cases, quiet=True)
    for i, case in enumerate(cases):
        for rank, want in enumerate(expected(case)):
            same(results[rank][i], want, f"rank {rank} of {case}")


def same(got, want, what):
    assert (got is None) == (want is None), what
    if want is not None:
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda text: f"{what}: {text}")


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

LIBRARY = [
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "_allgather_base", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "gather", "scatter", "reduce_scatter", "_reduce_scatter_base", "alltoall",
    "reduce_scatter_tensor_coalesced", "alltoall_base", "barrier", "monitored_barrier", "recv_anysource",
]  # fmt: skip


def sent_by(cases):
    """Runs the cases with every message counted: per case [bytes of each message], and library calls made."""
    messages, library = [], []
    saved = {name: getattr(dist.ProcessGroup, name) for name in ["send", *LIBRARY] if hasattr(dist.ProcessGroup, name)}

    def counting(group, tensors, *args, **kwargs):
        messages[-1].append(sum(t.numel() * t.element_size() for t in tensors))
        return saved["send"](group, tensors, *args, **kwargs)

    def telling(name):
        return lambda *args, **kwargs: (library.append(name), saved[name](*args, **kwargs))[1]

    try:
        for name in saved:
            setattr(dist.ProcessGroup, name, counting if name == "send" else telling(name))
        for case in cases:
            messages.append([])
            called(case)
    finally:
        for name, method in saved.items():
            setattr(dist.ProcessGroup, name, method)
    return messages, library


def children_of(seat, n):
    """Below a seat of a binomial tree: those that differ in one bit, lower than all of the seat's own."""
    return [seat + 2**b for b in range(10) if seat + 2**b < n and (seat == 0 or seat % 2 ** (b + 1) == 0)]


def branch_of(seat, n):
    return [seat] + [s for child in children_of(seat, n) for s in branch_of(child, n)]


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


def test_the_ring_sends_two_n_minus_one_over_n_in_two_n_minus_one_messages(ranks_of):
    cases = [case_of("ring_all_reduce", 4, rows=1000, piece_bytes=piece_bytes) for piece_bytes in (1000, 250)]
    for messages, _ in ranks_of(4).run(sent_by, cases, quiet=True):
        assert messages[0] == [1000] * 6  # one chunk of 250 float32 a step
        assert len(messages[1]) == 24 and sum(messages[1]) == 6000 and max(messages[1]) <= 252


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


# ---- what is refused, and the rest ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda c: c.ring_all_reduce(torch.zeros(3, dtype=torch.int32), dist.ReduceOp.AVG), "AVG of torch.int32"),
        (lambda c: c.tree_reduce(torch.zeros(3), 0, dist.ReduceOp.BAND), "not one of SUM, AVG, MAX, MIN, PRODUCT"),
        (lambda c: c.ring_all_gather(torch.zeros(3), [3, 4, 5]), "do not fit: 2 ranks"),
        (lambda c: c.ring_all_gather(torch.zeros(3, 2), out=torch.zeros(5, 2)), r"shape \[6, 2\]"),
        (lambda c: c.ring_reduce_scatter(torch.zeros(4), out=torch.zeros(4)[::2]), "out must be a contiguous"),
        (lambda c: c.naive_scatter(torch.zeros(2), torch.zeros(5) if dist.get_rank() == 0 else None), "whole tensor"),
        (lambda c: c.bruck_all_to_all(torch.zeros(3)), "2 ranks do not divide 3 rows"),
        (lambda c: c.pairwise_all_to_all(torch.zeros(3), [1, 1]), "do not fit 3 rows"),
    ],
)
def test_refused_with_a_reason(ranks_of, wrong, told):
    with refused(told) as caught:
        ranks_of(2).run(wrong, collectives, quiet=True)
    assert caught.value.cause == "ValueError"


def with_out_and_parameters():
    rank, n = dist.get_rank(), dist.get_world_size()
    whole = torch.zeros(n, 2)
    whole[rank] = rank + 1  # as nccl's in-place all-gather: each rank's rows are where they belong already
    gathered = collectives.ring_all_gather(whole[rank : rank + 1], out=whole)
    room = torch.empty(1, 2)
    reduced = collectives.ring_reduce_scatter(whole, out=room)
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.weight, rank)
    collectives.tree_broadcast(layer.weight, src=n - 1)
    number = collectives.ring_all_reduce(torch.tensor(2.0))
    row = collectives.ring_all_gather(torch.tensor(float(rank)))
    return gathered is whole or gathered.data_ptr() == whole.data_ptr(), whole, reduced, layer.weight, number, row


def test_into_given_memory_and_of_parameters_and_single_numbers(ranks_of):
    for rank, (same_memory, whole, reduced, weight, number, row) in enumerate(ranks_of(3).run(with_out_and_parameters)):
        assert same_memory
        same(whole, torch.tensor([[1.0, 1], [2, 2], [3, 3]]), "all_gather")
        same(reduced, torch.full((1, 2), 3.0 * (rank + 1)), "reduce_scatter")
        assert weight.requires_grad and torch.equal(weight.detach(), torch.full((2, 2), 2.0))
        assert number.shape == () and number == 6
        same(row, torch.tensor([0.0, 1, 2]), "all_gather of numbers")


def through_the_host(cases):
    """As for ranks that share one GPU: each message through a copy."""
    saved = point_to_point._gloo_on_gpu
    point_to_point._gloo_on_gpu = lambda tensor, group: True
    try:
        return several(cases)
    finally:
        point_to_point._gloo_on_gpu = saved


def test_messages_can_pass_through_the_hosts_memory(ranks_of):
    cases = [case_of(name, 3) for name in NAMES]
    results = ranks_of(3).run(through_the_host, cases, quiet=True)
    for i, case in enumerate(cases):
        for rank, want in enumerate(expected(case)):
            same(results[rank][i], want, f"rank {rank} of {case}")
