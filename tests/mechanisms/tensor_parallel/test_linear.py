"""Split linear layers and MLPs: against one process, to the byte, weights in and out."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.measure.trace import record
from pardist_lib.mechanisms.collectives import copy_to_group
from pardist_lib.mechanisms.group import split_sizes
from pardist_lib.mechanisms.tensor_parallel import (
    ColumnParallelLinear,
    ParallelMLP,
    RowParallelLinear,
    full_state_dict,
)
from tests.mechanisms.refusals import refused
from tests.mechanisms.tensor_parallel.nets import CLOSE, close, same_gradients, seeded

WORLDS = [1, 2, 3, 4]


def case_of(kind="mlp", **changes):
    case = {
        "kind": kind, "sizes": (10, 20, 6), "bias": True, "dtype": torch.float64, "shape": (2, 5), "options": {},
        "sequence": False, "frozen": (), "own_seeds": True,
    }  # fmt: skip
    return case | changes


def plain_of(case):
    a, b, c = case["sizes"]
    made = partial(nn.Linear, bias=case["bias"], dtype=case["dtype"])
    module = nn.Sequential(made(a, b), nn.GELU(), made(b, c)) if case["kind"] == "mlp" else made(a, b)
    for name, p in module.named_parameters():
        p.requires_grad = name not in case["frozen"]
    return module


def split_of(case, plain):
    kind = {"mlp": ParallelMLP, "column": ColumnParallelLinear, "row": RowParallelLinear}[case["kind"]]
    return kind.from_module(plain, **({"sequence_parallel": True} if case["sequence"] else {}), **case["options"])


def beside_one_process(case):
    """On a rank: forward, backward of the split module and of the whole one."""
    rank, n, kind = dist.get_rank(), dist.get_world_size(), case["kind"]
    torch.manual_seed(rank if case["own_seeds"] else 0)
    split = split_of(case, plain_of(case))
    torch.manual_seed(0)
    plain = plain_of(case)
    whole = seeded((*case["shape"], case["sizes"][0]), case["dtype"]).requires_grad_()
    x, arguments = whole.detach().clone(), {}
    if kind == "row" and case["options"].get("input_is_parallel", True):
        x = x.tensor_split(n, -1)[rank].clone()
    elif case["sequence"] and kind != "row":
        x, arguments = x.tensor_split(n, -2)[rank].clone(), {"sizes": split_sizes(x.size(-2), n)}
    x.requires_grad_()
    y, wanted = split(x, **arguments), plain(whole)
    g = seeded(wanted.shape, case["dtype"], 1)
    wanted.backward(g)
    if kind == "column" and not case["options"].get("gather_output"):
        wanted, g = (t.tensor_split(n, -1)[rank] for t in (wanted, g))
    elif case["sequence"] and kind != "column":
        wanted, g = (t.tensor_split(n, -2)[rank] for t in (wanted, g))
    close(y.detach(), wanted.detach(), f"output of {case}")
    y.backward(g)
    right = whole.grad
    if x.shape != whole.shape:
        right = right.tensor_split(n, -1 if kind == "row" else -2)[rank]
    close(x.grad, right, f"input's gradient of {case}")
    same_gradients(split, plain, case)
    for p, q in zip(split.parameters(), plain.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad and (p.grad is None) == (q.grad is None), case


def several(cases):
    for case in cases:
        beside_one_process(case)


def cases_of(dtype):
    chunks, gathered = {"chunks": 3}, {"gather_output": True}
    for sizes in [(10, 20, 6), (8, 12, 4), (5, 3, 2), (2, 1, 3)]:
        yield case_of(sizes=sizes, dtype=dtype)
        yield case_of("column", sizes=sizes, dtype=dtype, options=gathered)
        yield case_of("row", sizes=sizes, dtype=dtype, bias=False)
    yield case_of(dtype=dtype, options=chunks, shape=(2, 1))
    yield case_of(dtype=dtype, options=chunks, shape=(7,), bias=False)
    yield case_of(dtype=dtype, shape=())
    yield case_of(dtype=dtype, shape=(0, 3))
    yield case_of("column", dtype=dtype)
    yield case_of("row", dtype=dtype, options={"input_is_parallel": False})
    for sequence in ((2, 8), (2, 5), (7,), (1, 2)):
        yield case_of(dtype=dtype, sequence=True, shape=sequence)
        yield case_of(dtype=dtype, sequence=True, shape=sequence, options={"keep_gathered": False})
    yield case_of("column", dtype=dtype, sequence=True)
    yield case_of("row", dtype=dtype, sequence=True)
    for frozen in (("0.weight", "2.bias"), ("0.bias", "2.weight"), ("0.weight", "0.bias", "2.weight", "2.bias")):
        yield case_of(dtype=dtype, frozen=frozen)
        yield case_of(dtype=dtype, frozen=frozen, sequence=True, options={"keep_gathered": False})


@pytest.mark.parametrize("n", WORLDS)
def test_equal_to_one_process(ranks_of, n):
    ranks_of(n).run(several, [*cases_of(torch.float64), *list(cases_of(torch.float32))[::3]], quiet=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_dtype_and_world(ranks_of, data):
    draw, small = data.draw, st.integers(1, 9)
    kind, sequence = draw(st.sampled_from(["mlp", "column", "row"])), draw(st.booleans())
    options = {"chunks": draw(st.integers(1, 4))}
    if kind == "column":
        options["gather_output"] = draw(st.booleans())
    case = case_of(
        kind, sizes=draw(st.tuples(small, small, small)), bias=draw(st.booleans()), sequence=sequence, options=options,
        dtype=draw(st.sampled_from(list(CLOSE))), shape=tuple(draw(st.lists(small, min_size=sequence, max_size=3))),
    )  # fmt: skip
    ranks_of(draw(st.integers(1, 4))).run(beside_one_process, case, quiet=True)


# ---- training -------------------------------------------------------------------------------------------------


def trained(make_optimizer, dtype):
    """20 steps of a split MLP and of a whole one: largest difference of a weight, relative to the weights."""
    torch.manual_seed(dist.get_rank())
    split = ParallelMLP(10, 21, 5, activation=nn.Tanh(), dtype=dtype)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(10, 21, dtype=dtype), nn.Tanh(), nn.Linear(21, 5, dtype=dtype))
    x, y = seeded((32, 10), dtype), seeded((32, 5), dtype, 1)
    losses = []
    for model in (split, plain):
        optimizer = make_optimizer(model.parameters())
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    whole = full_state_dict(split)
    return losses, max((whole[name] - p).abs().max().item() for name, p in plain.state_dict().items())


@pytest.mark.parametrize("n", WORLDS)
def test_equal_after_20_steps(ranks_of, n):
    for make in (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
        partial(torch.optim.AdamW, lr=0.01),
    ):
        for dtype, near in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            for losses, difference in ranks_of(n).run(trained, make, dtype, quiet=True):
                assert difference < near and abs(losses[0] - losses[1]) < near, (n, dtype, losses, difference)


# ---- to the byte ----------------------------------------------------------------------------------------------


def traffic(kind, options, needs_grad=True):
    """What one forward sends, and one forward with its backward: a record of each, made on the rank."""
    rank, n = dist.get_rank(), dist.get_world_size()
    layer = {"column": ColumnParallelLinear, "row": RowParallelLinear, "mlp": ParallelMLP}[kind](12, 24, **options)
    x = torch.ones(2, 4, 12)
    if kind == "row":
        x = x.tensor_split(n, -1)[rank]
    elif options.get("sequence_parallel"):
        x = x.tensor_split(n, 1)[rank]
    x = x.clone().requires_grad_(needs_grad)
    return [record(fn)[1] for fn in (lambda: layer(x), lambda: layer(x).sum().backward())]


def sent(record):
    _, _, _, messages, _ = record
    found = {}
    for name, _, _, size, *_ in messages:
        if name != "recv":
            found[name] = found.get(name, 0) + size
    return found


@pytest.mark.parametrize("n", [2, 4])
def test_bytes_of_forward_and_backward(ranks_of, n):
    tokens, wide, narrow = 8, 24 * 4, 12 * 4
    part, in_parts = (n - 1) / n * tokens, {"sequence_parallel": True}
    back, summed, gathered = {"all_reduce": tokens * narrow}, {"all_reduce": tokens * wide}, {"send": part * wide}
    forms = [
        ("column", {}, {}, back),
        ("column", {"chunks": 2}, {}, back),
        ("column", {"input_is_copied": True}, {}, {}),
        ("column", {"gather_output": True}, gathered, gathered | back),
        ("row", {}, summed, summed),
        ("row", {"chunks": 2}, summed, summed),
        ("mlp", {}, back, {"all_reduce": 2 * tokens * narrow}),
        ("mlp", in_parts, {"send": 2 * part * narrow}, {"send": 4 * part * narrow}),
        ("mlp", in_parts | {"keep_gathered": False}, {"send": 2 * part * narrow}, {"send": 5 * part * narrow}),
    ]
    for kind, options, ahead, both in forms:
        for records in ranks_of(n).run(traffic, kind, options, quiet=True):
            assert [sent(record) for record in records] == [ahead, both], (kind, options)
    for kind in ("column", "mlp"):  # data needs no gradient: the first layer's all-reduce is not made
        after = {} if kind == "column" else {"all_reduce": tokens * narrow}
        for records in ranks_of(n).run(traffic, kind, {}, False, quiet=True):
            assert [sent(record) for record in records][1] == after


def query_key_value():
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    plain = [nn.Linear(6, 10, dtype=torch.float64) for _ in range(3)]
    split = [ColumnParallelLinear.from_module(p, input_is_copied=True) for p in plain]
    x = seeded((3, 6), torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    copied = copy_to_group(a)
    sum((layer(copied) ** 2).sum() for layer in split).backward()
    sum((layer(b) ** 2).sum() for layer in plain).backward()
    close(a.grad, b.grad, "input's gradient of three layers")
    for layer, whole in zip(split, plain, strict=True):
        close(layer.weight.grad, whole.weight.grad.tensor_split(n)[rank], "weight")


def test_three_layers_share_one_all_reduce(ranks_of):
    trace = ranks_of(3).trace(query_key_value, quiet=True)
    calls = [e for e in trace.collectives if e.name == "all_reduce" and e.rank == 1]
    assert [e.bytes for e in calls] == [3 * 6 * 8]


# ---- weights in and out ---------------------------------------------------------------------------------------


def round_trip(dtype, bias, group=None):
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(rank)
    for kind in (ColumnParallelLinear, RowParallelLinear):
        mine = nn.Linear(10, 7, bias, dtype=dtype).eval()
        mine.weight.requires_grad = False
        layer = kind.from_module(mine, group)
        dist.all_gather_object(all_of_them := [None] * n, mine.state_dict(), group=group)
        wanted = all_of_them[0]
        whole = layer.to_module()
        assert type(whole) is nn.Linear and not whole.training and not layer.training
        assert set(whole.state_dict()) == set(wanted)
        for name, tensor in whole.state_dict().items():
            assert tensor.dtype == dtype and torch.equal(tensor, wanted[name]), name
        assert not whole.weight.requires_grad and (not bias or whole.bias.requires_grad)
        part = wanted["weight"].tensor_split(n, kind.split_dim)[rank]
        assert torch.equal(layer.weight, part) and layer.weight.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize("n", WORLDS)
def test_weights_go_in_and_come_out_exactly(ranks_of, n):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for bias in (True, False):
            ranks_of(n).run(round_trip, dtype, bias, quiet=True)


def made_directly():
    """The layers as their own constructors make them, and what is left of the random numbers."""
    torch.manual_seed(dist.get_rank())
    made = [ColumnParallelLinear(10, 7), RowParallelLinear(7, 10, bias=False), ParallelMLP(4, 9)]
    after = torch.rand(1).item()
    return [{k: v.clone() for k, v in full_state_dict(layer).items()} for layer in made], after


def test_constructors_draw_as_one_process_would(ranks_of):
    results = ranks_of(3).run(made_directly, quiet=True)
    torch.manual_seed(0)
    plain = [nn.Linear(10, 7), nn.Linear(7, 10, bias=False), nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 4))]
    after = torch.rand(1).item()
    assert results[0][1] == after
    for states, _ in results:
        for state, module in zip(states, plain, strict=True):
            assert list(state) == list(module.state_dict())
            assert all(torch.equal(state[name], p) for name, p in module.state_dict().items())


# ---- what is refused, and a smaller world ---------------------------------------------------------------------


def making(make):
    return make()


def outside():
    group = group_of((0, 1))
    if dist.get_rank() == 2:
        RowParallelLinear(3, 4, group=group)


def test_what_does_not_fit_is_refused(ranks_of):
    ranks = ranks_of(3)
    mlp = nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 4))
    column, row = partial(ColumnParallelLinear, 10, 8), partial(RowParallelLinear, 12, 8)
    for make, said in [
        (
            lambda: column()(torch.ones(2, 10).long()),
            r"ColumnParallelLinear\(10, 8, .* needs floating",
        ),
        (
            lambda: column()(torch.ones(2, 5)),
            r"rank \d of 3: the input's last dimension has to be 10, its sha",
        ),
        (lambda: row()(torch.ones(2, 12)), r"has to be 4, its shape is \[2, 12\]; that is the whole input, which inp"),
        (lambda: row(input_is_parallel=False)(torch.ones(2, 4)), r"has to be 12.*; that is a part of it, as a column"),
        (
            lambda: column()(torch.ones(2, 10).double()),
            r"input is torch.float64, the weights are torch.float32: x.to\(",
        ),
        (lambda: row()(torch.ones(())), r"has to be 4, its shape is \[\]"),
        (lambda: ColumnParallelLinear.from_module(nn.Conv2d(1, 2, 3)), r"splits nn.Linear, not Conv2d\(1, 2"),
        (lambda: ColumnParallelLinear.from_module(row()), r"is split already: its to_module\(\) gives the whole"),
        (lambda: ParallelMLP.from_module(mlp), r"a rank sees only its own features, so Softmax\(dim=-1\) cannot stand"),
        (lambda: ParallelMLP(4, 8, activation=nn.Softmax(-1)), r"so Softmax\(dim=-1\) cannot stand there"),
        (lambda: ParallelMLP(4, 8, group=torch.ones(1)), r"group is a Tensor, but has to be a process group, or None"),
        (outside, r"RowParallelLinear: rank 2 is not in this group: only its members"),
    ]:
        with refused(said):
            ranks.run(making, make, quiet=True)


def test_a_smaller_world_on_the_same_ranks(ranks_of):
    ranks_of(4).run(in_world, 3, beside_one_process, case_of(), quiet=True)
