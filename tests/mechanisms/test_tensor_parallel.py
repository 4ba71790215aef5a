"""Split layers: against one process, against DTensor's parallelize_module, to the byte; a whole model by a plan."""

import copy
from collections import OrderedDict
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
    full_gradients,
    full_state_dict,
    parallelize,
)
from tests.mechanisms.refusals import refused

CLOSE = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 1e-6)}
WORLDS = [1, 2, 3, 4]


def seeded(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got, wanted, what):
    relative, absolute = CLOSE[wanted.dtype]
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    said = f"rank {dist.get_rank()}, {what}"
    torch.testing.assert_close(
        got, wanted, rtol=relative, atol=absolute * scale, msg=lambda text: f"{said}: {text}"
    )  # fmt: skip


def same_gradients(model, plain, what):
    """Every parameter's gradient of the split model, put together, beside the unsplit model's."""
    whole = full_gradients(model)
    named = dict(plain.named_parameters(remove_duplicate=False))
    assert list(whole) == list(named), what
    for name, p in named.items():
        close(whole[name], torch.zeros_like(p) if p.grad is None else p.grad, f"{what}: gradient of {name}")


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


# ---- against DTensor ------------------------------------------------------------------------------------------


def beside_dtensor(width, hidden, dtype):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)).to(dtype)
    ours = parallelize(copy.deepcopy(theirs), {"0": "column", "2": "row"})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(theirs, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    x = seeded((2, 3, width), dtype)
    results = []
    for model in (ours, theirs):
        given = x.clone().requires_grad_()
        y = model(given)
        (y**2).sum().backward()
        results.append((y.detach(), given.grad))
    close(results[0][0], results[1][0], "output")
    close(results[0][1], results[1][1], "input's gradient")
    whole = full_gradients(ours)
    for name, p in theirs.named_parameters():
        close(p.to_local().detach(), dict(ours.named_parameters())[name].detach(), f"shard of {name}")
        close(whole[name], p.grad.full_tensor(), f"gradient of {name}")


@pytest.mark.parametrize("n", [2, 4])
def test_same_as_dtensor(ranks_of, n):
    for dtype in CLOSE:
        ranks_of(n).run(beside_dtensor, 8, 16, dtype, quiet=True)


def test_same_as_dtensor_over_three(ranks_of):
    ranks_of(3).run(beside_dtensor, 9, 12, torch.float64, quiet=True)


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


def half_precision():
    torch.manual_seed(0)
    mlp, x = ParallelMLP(8, 16), seeded((4, 8), torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x)
        whole = mlp.to_module()(x.detach())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and mlp[0].weight.grad.dtype == torch.float32 == x.grad.dtype
    return (y - whole).abs().max().item()


def test_under_autocast(ranks_of):
    assert max(ranks_of(2).run(half_precision, quiet=True)) < 0.02


# ---- a whole model by a plan ----------------------------------------------------------------------------------


class Reader(nn.Module):
    """A model that nobody wrote for being split: tied weights, an unused layer, a frozen one, a buffer, a LayerNorm."""

    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.first = nn.ModuleList([nn.Linear(width, 13) for _ in range(2)])
        self.second = nn.ModuleList([nn.Linear(13, width, bias=i == 0) for i in range(2)])
        self.norm = nn.LayerNorm(width)
        self.unused = nn.Linear(width, 5)
        self.out = nn.Linear(width, 11, bias=False)
        self.again = nn.Linear(width, 11, bias=False)
        self.again.weight = self.out.weight
        self.first[1].weight.requires_grad = False
        self.register_buffer("scale", torch.rand(1))

    def forward(self, tokens):
        x = self.embed(tokens)
        for up, down in zip(self.first, self.second, strict=True):
            x = x + self.scale * down(torch.tanh(up(self.norm(x))))
        return self.out(x) + self.again(x * x)


PLAN = {"first.*": "column", "second.*": "row", "unused": "column", "[oa]*[tn]": "column, gathered"}


def split_readers_model(groups):
    """Split over each group in turn, the whole one put together in between: each time beside one process."""
    groups = {ranks: group_of(ranks) for ranks in groups}  # every rank takes part in making each
    torch.manual_seed(0)
    plain = Reader().double()
    tokens = torch.arange(22).view(2, 11) % 11
    wanted = plain(tokens)
    (wanted**2).sum().backward()
    torch.manual_seed(dist.get_rank() + 5)
    model = Reader().double()  # the same only on rank 0
    if dist.get_rank() == 0:
        model.load_state_dict(plain.state_dict())
    for ranks, group in groups.items():
        if dist.get_rank() in ranks:
            model = parallelize(model, PLAN, group)
            assert model.out.weight is model.again.weight and isinstance(model.first[1], ColumnParallelLinear)
            y = model(tokens)
            (y**2).sum().backward()
            close(y.detach(), wanted.detach(), "output")
            same_gradients(model, plain, ranks)
            state = full_state_dict(model)
            assert list(state) == list(plain.state_dict())
            assert all(torch.equal(state[name], t) for name, t in plain.state_dict().items())
            model = Reader().double()
            model.load_state_dict(state)


def test_a_readers_model_in_four_parts_then_two_then_three(ranks_of):
    ranks_of(4).run(split_readers_model, [(0, 1, 2, 3), (0, 1), (0, 1, 2), (0,)], quiet=True)


def torchs_encoder():
    """torch's own transformer layers, feed-forward split; in training and, where they take a short cut, evaluation."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 17, dropout=0.0, batch_first=True, dtype=torch.float64)
    plain = nn.TransformerEncoder(layer, 2)
    model = parallelize(copy.deepcopy(plain), {"layers.*.linear1": "column", "layers.*.linear2": "row"})
    x = seeded((3, 5, 8), torch.float64)
    padded = torch.arange(5).expand(3, 5) > 3
    for mask in (None, padded):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, wanted = (m(t, src_key_padding_mask=mask) for m, t in ((model, a), (plain, b)))
        (y**2).sum().backward(), (wanted**2).sum().backward()
        close(y.detach(), wanted.detach(), "output")
        close(a.grad, b.grad, "input's gradient")
        same_gradients(model, plain, "encoder")
        model.eval(), plain.eval()
        with torch.no_grad():
            y, wanted = model(x, src_key_padding_mask=mask), plain(x, src_key_padding_mask=mask)
        close(y[:, :4], wanted[:, :4], "output in evaluation")
        model.train(), plain.train()


def test_torchs_transformer_layers(ranks_of):
    ranks_of(3).run(torchs_encoder, quiet=True)


class Speaker(nn.Module):
    """Everything that a style is for, with one table at both ends."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(13, 8), nn.Linear(8, 13, bias=False)
        self.head.weight = self.words.weight
        self.layer = nn.TransformerEncoderLayer(8, 4, 12, dropout=0.0, batch_first=True)
        self.conv = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 3))
        self.mlp = nn.Sequential(nn.Linear(8, 20), nn.SiLU(), nn.Linear(20, 8))

    def forward(self, tokens):
        x = self.words(tokens)
        x = x + self.mlp(self.layer(x))
        return self.head(x), self.conv(x[:, None])


def every_style():
    torch.manual_seed(0)
    plain = Speaker().double()
    torch.manual_seed(dist.get_rank())
    plan = {
        "words": "vocabulary", "head": "column, gathered", "layer.self_attn": "attention", "layer.linear1": "column",
        "layer.linear2": "row", "mlp": "mlp", "conv.0": "convolution, output channels",
        "conv.2": "convolution, input channels",
    }  # fmt: skip
    model = parallelize(Speaker().double(), plan)
    tokens, results = torch.arange(10).view(2, 5), []
    for m in (model, plain):
        m.train()
        words, pictures = m(tokens)
        ((words**2).sum() + (pictures**2).sum()).backward()
        results.append((words.detach(), pictures.detach()))
        m.eval()
        with torch.no_grad():
            results[-1] += m(tokens)
    for got, wanted in zip(*results, strict=True):
        close(got, wanted, "output")
    same_gradients(model, plain, "every style")
    assert model.words.weight is model.head.weight
    assert all(torch.equal(full_state_dict(model)[name], t) for name, t in plain.state_dict().items())


@pytest.mark.parametrize("n", [1, 2, 4])
def test_every_style(ranks_of, n):
    ranks_of(n).run(every_style, quiet=True)


class Heads(nn.Module):
    """Attention as Qwen3 has it: grouped heads, a hand-written norm of each head's queries, rotations in a buffer."""

    def __init__(self, width, heads, kv_heads, dropout):
        super().__init__()
        self.d = width // heads
        sizes = {"q": width, "k": kv_heads * self.d, "v": kv_heads * self.d}
        self.qkv = nn.ModuleDict({name: nn.Linear(width, size, bias=False) for name, size in sizes.items()})
        self.q_norm, self.drop = Scale(self.d), nn.Dropout(dropout)
        self.out = nn.Linear(width, width, bias=False)
        self.register_buffer("turn", torch.polar(torch.ones(9, self.d // 2), torch.rand(9, self.d // 2)), False)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, self.d)).transpose(1, 2) for layer in self.qkv.values())
        turned = torch.view_as_complex(self.q_norm(q).unflatten(-1, (-1, 2))) * self.turn[: x.size(1)]
        y = nn.functional.scaled_dot_product_attention(torch.view_as_real(turned).flatten(-2), k, v, enable_gqa=True)
        return self.out(self.drop(y).transpose(1, 2).flatten(2))


class Scale(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Pictures(nn.Module):
    """Patches by a convolution, a named MLP with a dropout in it, a gated MLP, counts that are 16 bits wide."""

    def __init__(self, width=8, dropout=0.0):
        super().__init__()
        self.patches, self.heads = nn.Conv2d(3, width, 2, 2), Heads(width, 4, 2, dropout)
        names = ("up", "act", "drop", "down")
        parts = nn.Linear(width, 10), nn.GELU(), nn.Dropout(dropout), nn.Linear(10, width)
        self.mlp = nn.Sequential(OrderedDict(zip(names, parts, strict=True)))
        self.gate, self.up, self.down = nn.Linear(width, 11), nn.Linear(width, 11), nn.Linear(11, width)
        self.register_buffer("counts", torch.randint(9, (3,), dtype=torch.int16))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.heads(x)
        x = x + self.mlp(x)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x)) + self.counts.sum()


PARTS = {
    "patches": "convolution, output channels, gathered", "heads.qkv.*": "column", "heads.q_norm": "on a part",
    "heads.drop": "on a part", "heads.out": "row", "mlp": "mlp", "gate": "column", "up": "column", "down": "row",
}  # fmt: skip


def pictures():
    torch.manual_seed(0)
    plain = Pictures().double().eval()
    torch.manual_seed(dist.get_rank())
    model = parallelize(Pictures().double().eval(), PARTS)
    assert not any(part.training for part in model.modules())
    x = seeded((2, 3, 6, 6), torch.float64)
    for batch in (2, 1, 0):
        results = []
        for m in (model, plain):
            m.zero_grad()
            m.train()
            results.append(m(x[:batch]))
            (results[-1] ** 2).sum().backward()
        close(*(y.detach() for y in results), f"output, {batch} pictures")
        same_gradients(model, plain, f"{batch} pictures")
    state = full_state_dict(model)
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(state[name], t) for name, t in plain.state_dict().items())
    assert str(model.mlp.to_module()) == str(plain.mlp) and str(model.heads.q_norm.to_module()) == "Scale()"


def test_parts_that_a_rank_uses_on_its_own_heads_and_names_that_stay(ranks_of):
    ranks_of(2).run(pictures, quiet=True)


def dropped_between():
    """What is dropped of 64 equal hidden features of this rank, and what all ranks have after them."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 64 * dist.get_world_size()), nn.Dropout(0.5), nn.Linear(64, 4))
    mlp = parallelize(nn.Sequential(plain), {"0.0": "column", "0.1": "on a part"})
    return (mlp[0][1](torch.ones(64)) == 0).tolist(), torch.rand(1).item()


def test_dropout_on_a_part_drops_other_features_on_each_rank(ranks_of):
    masks, after = zip(*ranks_of(4).run(dropped_between, quiet=True), strict=True)
    assert len(set(map(tuple, masks))) == 4 and len(set(after)) == 1
    assert all(16 < sum(mask) < 48 for mask in masks)


class TimesTen(nn.Embedding):
    def forward(self, tokens):
        return 10 * super().forward(tokens)


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    return layer


@pytest.mark.parametrize(
    "make, style, lost",
    [
        (lambda: TimesTen(9, 4), "vocabulary", r"TimesTen\(9, 4\) has a forward of its own, which would be lost"),
        (hooked, "row", r"Linear\(.*\) has hooks"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "column", r"has a parametrization"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)),
            "convolution, output channels",
            r"has a pa",
        ),
    ],
)
def test_what_would_be_lost_is_refused(ranks_of, make, style, lost):
    with refused(f"0: .*{lost}"):
        ranks_of(2).run(making, lambda: parallelize(nn.Sequential(make()), {"0": style}), quiet=True)


def plan_refused(plan, **how):
    model = nn.Sequential()
    model.body = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    model.attention = nn.MultiheadAttention(4, 2)
    model.embed, model.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    model.head.weight = model.embed.weight
    model.split = ColumnParallelLinear(4, 4)
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    try:
        parallelize(model, plan, **how)
    finally:
        assert before == {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}, "changed"


def test_a_plan_that_does_not_fit_is_refused_and_changes_nothing(ranks_of):
    for plan, said in [
        ({"body.9": "column"}, r"no module is called 'body.9': the model has body, body.0, body.1"),
        ({"body.0": "colum"}, r"body.0: 'colum' is not one of the styles 'column', "),
        ({"body.1": "column"}, r"body.1: ColumnParallelLinear splits nn.Linear, not GELU"),
        ({"body.*": "column"}, r"body.1: ColumnParallelLinear splits nn.Linear, not GELU"),
        ({"body.0": "column", "*.0": "row"}, r"body.0: 'body.0' says 'column', but '\*.0' says 'row'"),
        ({"body": "mlp", "body.0": "column"}, r"body.0 is inside body, and the plan splits both"),
        ({"split": "row"}, r"split: ColumnParallelLinear\(4, 4, .*\) is split already: its to_module\(\) gives"),
        ({"attention.out_proj": "row"}, r"nn.MultiheadAttention takes the weights of its parts without calling them"),
        ({"head": "column, gathered"}, r"embed.weight and head.weight are one parameter, and the plan does not split"),
        ({"body.0": nothing}, r"body.0: its style returned a NoneType, a module is asked for"),
        (None, r"a plan is a dict {name of a module: style}, not None"),
        ({0: "column"}, r"a plan is a dict {name of a module: style}, not {0: 'column'}"),
        ({"body.0": ["column"]}, r"body.0: \['column'\] is not one of the styles"),
        ({"body": "column"}, r"body: ColumnParallelLinear splits nn.Linear, not Sequential\(…\)"),
        ({"attention": "mlp"}, r"ParallelMLP splits nn.Sequential\(nn.Linear, activation, nn.Linear\), not Multihead"),
    ]:
        with refused(said):
            ranks_of(2).run(plan_refused, plan, quiet=True)


def nothing(module, group):
    return None


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
