"""A whole model split by a plan: against one process, against DTensor's parallelize_module, what is refused."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import group_of
from pardist_lib.mechanisms.tensor_parallel import (
    ColumnParallelLinear,
    full_gradients,
    full_state_dict,
    parallelize,
)
from tests.mechanisms.refusals import refused
from tests.mechanisms.tensor_parallel.nets import CLOSE, close, same_gradients, seeded

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


# ---- a reader's model -----------------------------------------------------------------------------------------


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


# ---- what is refused ------------------------------------------------------------------------------------------


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
        ranks_of(2).run(lambda: parallelize(nn.Sequential(make()), {"0": style}) and None, quiet=True)


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
