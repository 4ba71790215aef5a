"""Attention with its heads split: against one process, against DTensor, and to the byte."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.tensor_parallel.attention import Attention, ParallelAttention, attend
from tests.mechanisms.refusals import refused

CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-11}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}
PLAIN = {"kind": "ours", "heads": 4, "kv": None, "width": 8, "bias": True, "causal": True, "dtype": torch.float64,
         "batch": 2, "s": 5, "frozen": (), "mask": None}  # fmt: skip


def close(got, want, what):
    assert (got is None) == (want is None), what
    if want is not None:
        torch.testing.assert_close(got, want, **CLOSE[want.dtype], msg=lambda text: f"{what}: {text}")


def whole_of(case, seed=0):
    torch.manual_seed(seed)
    if case["kind"] == "ours":
        options = {name: case[name] for name in ("bias", "causal", "dtype")}
        whole = Attention(case["width"], case["heads"], case["kv"], **options)
    else:
        whole = nn.MultiheadAttention(case["width"], case["heads"], bias=case["bias"], dtype=case["dtype"],
                                      batch_first=case["kind"] == "torch, batch first")  # fmt: skip
    for p in whole.parameters():
        nn.init.normal_(p, std=case["width"] ** -0.5)
    for name, p in whole.named_parameters():
        p.requires_grad_(name not in case["frozen"])
    return whole


def input_of(case):
    g = torch.Generator().manual_seed(case["s"])
    return torch.randn(case["batch"], case["s"], case["width"], generator=g, dtype=torch.float64).to(case["dtype"])


def called(module, x, case):
    """The output in (batch, s, width), with the masks of the case."""
    if case["kind"] == "ours":
        return module(x)
    x = x if module.batch_first else x.transpose(0, 1)
    y, _ = module(x, x, x, **masks_of(case))
    return y if module.batch_first else y.transpose(0, 1)


def masks_of(case):
    b, s, h = case["batch"], case["s"], case["heads"]
    later = torch.ones(s, s, dtype=torch.bool).triu(1)
    padding = torch.arange(s).expand(b, s) >= s - torch.arange(b)[:, None]
    added = torch.randn(b * h, s, s, generator=torch.Generator().manual_seed(1)).to(case["dtype"])
    masks = {
        None: {},
        "causal": {"attn_mask": later, "is_causal": True},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": later, "key_padding_mask": padding},
        "per head": {"attn_mask": added},
    }
    return masks[case["mask"]]


def forward_and_backward(module, case):
    """Output, gradient of the input, {name: gradient of the whole module's parameter}."""
    x = input_of(case).requires_grad_()
    y = called(module, x, case)
    (y * torch.linspace(-0.2, 0.2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert all((p.grad is not None) == (name in trained) for name, p in module.named_parameters())
    if hasattr(module, "to_module"):
        for p in module.parameters():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
        grads = dict(module.to_module().named_parameters())
    else:
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    return y.detach(), x.grad, {name: g.detach() for name, g in grads.items()}


def split(case):
    part = ParallelAttention.from_module(whole_of(case, seed=dist.get_rank()))  # the first rank's weights count
    back = part.to_module()
    same = {name: torch.equal(p, q) and p.requires_grad == q.requires_grad for (name, p), q in
            zip(back.named_parameters(), whole_of(case).parameters(), strict=True)}  # fmt: skip
    return forward_and_backward(part, case), same, type(back) is type(whole_of(case))


def check(ranks, n, cases):
    results = ranks.run(in_world, n, lambda: [split(case) for case in cases], quiet=True)
    for rank, mine in enumerate(results[:n]):
        for case, ((y, grad, grads), same, kind) in zip(cases, mine, strict=True):
            want, want_grad, want_grads = forward_and_backward(whole_of(case), case)
            what = f"rank {rank} of {n}, {case}"
            assert kind and all(same.values()) and len(same) == len(want_grads), what
            close(y, want, f"output, {what}")
            close(grad, want_grad, f"gradient of the input, {what}")
            assert list(grads) == list(want_grads)
            for name, g in want_grads.items():
                close(grads[name], g, f"gradient of {name}, {what}")


CHANGES = [
    {}, {"heads": 12, "width": 24}, {"bias": False}, {"causal": False}, {"heads": 12, "kv": 12, "width": 12},
    {"frozen": ("qkv.weight",)}, {"frozen": ("out.bias", "qkv.bias")}, {"s": 1, "batch": 1}, {"batch": 0},
    {"kind": "torch"}, {"kind": "torch, batch first"}, {"kind": "torch, batch first", "bias": False},
    {"kind": "torch", "mask": "causal"}, {"kind": "torch", "mask": "padding"}, {"kind": "torch", "mask": "per head"},
    {"kind": "torch", "mask": "per head", "batch": 0},
    {"kind": "torch, batch first", "mask": "both", "frozen": ("in_proj_weight",)},
]  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_equals_one_process(ranks_of, n):
    heads = {3: {"heads": 3, "width": 12}}.get(n, {})
    cases = [PLAIN | heads | change for change in CHANGES]
    cases += [PLAIN | {"heads": 4 * n, "kv": kv, "width": 8 * n} for kv in (n, 2 * n)]
    cases += [c | {"dtype": torch.float32} for c in cases[:2] + cases[-1:]]  # the bias of keys: zero but for rounding
    cases = [c if c["dtype"] == torch.float64 else c | {"bias": False} for c in cases]
    check(ranks_of(4), n, cases)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_heads_width_and_world(ranks_of, data):
    n, kv, groups, d = (data.draw(st.integers(1, most)) for most in (4, 2, 3, 4))
    sizes = {"heads": n * kv * groups, "kv": n * kv, "width": n * kv * groups * d}
    sizes |= {"batch": data.draw(st.integers(1, 3)), "s": data.draw(st.integers(1, 6))}
    options = {"bias": data.draw(st.booleans()), "causal": data.draw(st.booleans())}
    check(ranks_of(4), n, [PLAIN | sizes | options])


def in_an_encoder_layer():
    """A layer of torch's own, with its attention split and nothing else: also where it would take a short cut."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    wanted = layer(x, src_key_padding_mask=padding)
    layer.self_attn = ParallelAttention.from_module(layer.self_attn)
    apart = [(layer(x, src_key_padding_mask=padding) - wanted).abs().max().item()]
    with torch.no_grad():
        apart.append((layer.eval()(x, src_key_padding_mask=padding) - wanted)[~padding].abs().max().item())
    return apart


def test_torchs_encoder_layer_takes_it(ranks_of):
    for apart in ranks_of(4).run(in_an_encoder_layer, quiet=True):
        assert max(apart) < 1e-12


class ThreeMatrices(nn.Module):
    """Attention as DTensor's plan knows it: a matrix each for queries, keys and values."""

    def __init__(self, whole, heads):
        super().__init__()
        width = whole.embed_dim
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        for layer, w, b in zip(
            (self.q, self.k, self.v), whole.qkv.weight.chunk(3), whole.qkv.bias.chunk(3), strict=True
        ):
            layer.weight.data, layer.bias.data = w.detach().clone(), b.detach().clone()
        self.o.load_state_dict(whole.out.state_dict())
        self.heads = heads

    def forward(self, x):
        return self.o(attend(torch.cat([self.q(x), self.k(x), self.v(x)], -1), self.heads, self.heads, causal=True))


def beside_dtensor():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    rank, n = dist.get_rank(), dist.get_world_size()
    case = PLAIN | {"heads": 8, "width": 32, "dtype": torch.float32}
    whole = whole_of(case)
    theirs = ThreeMatrices(whole, 8 // n)
    plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}
    parallelize_module(theirs, init_device_mesh("cpu", (n,)), plan)
    ours = ParallelAttention.from_module(whole)
    results = []
    for module in (ours, theirs):
        x = input_of(case).requires_grad_()
        y = module(x)
        (y * torch.linspace(-0.2, 0.2, y.numel()).view_as(y)).sum().backward()
        results.append((y.detach(), x.grad))
    mine = ours.qkv.weight.grad.chunk(3)
    their_grads = [getattr(theirs, name).weight.grad.to_local() for name in "qkv"]
    return results, [*mine, ours.out.weight.grad], [*their_grads, theirs.o.weight.grad.to_local()], rank


@pytest.mark.parametrize("n", [2, 4])
def test_equals_dtensor(ranks_of, n):
    for (ours, theirs), grads, their_grads, _ in ranks_of(n).run(beside_dtensor, quiet=True):
        for got, want in zip([*ours, *grads], [*theirs, *their_grads], strict=True):
            close(got, want, "beside DTensor")


def trained(steps):
    case = PLAIN | {"heads": 12, "width": 24}
    part = ParallelAttention.from_module(whole_of(case))
    return after(part, steps, case), {name: p.detach() for name, p in part.to_module().named_parameters()}


def after(module, steps, case):
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9), []
    for step in range(steps):
        x = input_of(case | {"s": 3 + step})
        loss = (module(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_after_20_steps_still_equal(ranks_of, n):
    case = PLAIN | {"heads": 12, "width": 24}
    whole = whole_of(case)
    losses = after(whole, 20, case)
    for got, weights in ranks_of(4).run(in_world, n, trained, 20, quiet=True)[:n]:
        close(got, losses, "losses")
        for name, p in whole.named_parameters():
            close(weights[name], p.detach(), name)


def fresh():
    torch.manual_seed(7 + dist.get_rank())
    part = ParallelAttention(8, 4, 4, dtype=torch.float64)
    torch.manual_seed(7)
    whole = Attention(8, 4, 4, dtype=torch.float64)
    return all(torch.equal(p, q) for p, q in zip(part.to_module().parameters(), whole.parameters(), strict=True))


def test_a_new_one_starts_as_rank_0s_would(ranks_of):
    assert ranks_of(4).run(fresh, quiet=True) == [True] * 4


def dropped():
    """Outputs of one input on every rank, twice with dropout and once without; and the global stream afterwards."""
    torch.manual_seed(0)
    part = ParallelAttention(8, 4, causal=False, dropout=0.5, dtype=torch.float64)
    x = torch.ones(1, 6, 8, dtype=torch.float64)
    qkv = torch.randn(1, 6, 6, dtype=torch.float64)
    torch.manual_seed(1)
    outputs = [part(x).detach(), part(x).detach()]
    from pardist_lib.mechanisms.tensor_parallel.on_part import random_per_rank

    with random_per_rank():
        own = attend(qkv, 1, 1, dropout=0.5)  # the same head everywhere: other places are dropped
    return outputs, part.eval()(x).detach(), own, torch.get_rng_state()


def test_heads_drop_different_weights_and_results_stay_alike(ranks_of):
    results = ranks_of(4).run(dropped, quiet=True)
    (first, second), calm, own, state = results[0]
    assert not torch.equal(first, second) and not torch.equal(first, calm)
    for (a, b), c, other, s in results[1:]:
        assert torch.equal(a, first) and torch.equal(b, second) and torch.equal(c, calm) and torch.equal(s, state)
        assert not torch.equal(other, own)


# ---- to the byte ----------------------------------------------------------------------------------------------


def traced(part):
    x = torch.zeros(2, 6, 24, requires_grad=True)
    part(x).sum().backward()


def make(**options):
    return ParallelAttention(24, 12, **options)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_one_all_reduce_forward_one_backward_for_all_of_qkv(ranks_of, n):
    trace = ranks_of(n).trace(lambda part: traced(part), make_on_rank(ranks_of(n)))
    size = 2 * 6 * 24 * 4
    for rank in range(n):
        calls = [(e.name, e.bytes) for e in trace.collectives if e.rank == rank]
        assert calls == [("all_reduce", size)] * 2 * (n > 1)


def make_on_rank(ranks):
    """A module as plain data: its part has to be made on the rank, before the trace."""
    ranks.run(prepare, quiet=True)
    return Prepared()


_made = []


def prepare():
    _made[:] = [make()]


class Prepared:
    def __call__(self, x):
        return _made[0](x)


# ---- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda P: P(20, 5), "5 heads cannot be split over 4 ranks.*: 1 or 5 ranks would fit, or 4 or 20 heads"),
        (lambda P: P(24, 12, 2), "2 key-value heads cannot be split over 4 ranks.*: 1 or 2 ranks would fit, or 4 key"),
        (lambda P: P(10, 4), "embed_dim 10 has to be a multiple of num_heads 4"),
        (lambda P: P.from_module(nn.Linear(2, 2)), r"splits Attention and nn.MultiheadAttention, not Linear\("),
        (lambda P: P.from_module(P(8, 4)), "is split already: its to_module"),
        (lambda P: P.from_module(nn.MultiheadAttention(8, 4, kdim=4)), "with kdim, vdim, add_bias_kv or add_zero_attn"),
        (lambda P: P.from_module(nn.MultiheadAttention(8, 4, add_bias_kv=True)), "does not split"),
        (lambda P: P(8, 4)(torch.zeros(5, 8)), r"x has to be \(batch, s, 8\), its shape is \[5, 8\]"),
        (lambda P: P(8, 4)(torch.zeros(1, 5, 2)), "the input's last dimension has to be 8"),
        (lambda P: P(8, 4)(torch.zeros(1, 5, 8).long()), "needs floating point"),
        (lambda P: P.from_module(nn.MultiheadAttention(8, 4))(torch.zeros(5, 8), torch.zeros(5, 8)), "self-attention"),
        (
            lambda P: P.from_module(nn.MultiheadAttention(8, 4))(*[torch.zeros(5, 8)] * 3, is_causal=True),
            "give the mask, too",
        ),
        (lambda P: P(8, 0), "has to be a multiple of num_heads 0"),
        (lambda P: P.from_module(type("Own", (nn.MultiheadAttention,), {"forward": print})(8, 4)), "a forward of its"),
        (lambda P: P(8, 4, group=3), "group is a int, but has to be a process group"),
    ],
)  # fmt: skip
def test_refused_with_a_reason(ranks_of, wrong, told):
    with refused(told) as caught:
        ranks_of(4).run(wrong, ParallelAttention, quiet=True)
    assert caught.value.cause == "ValueError"
