"""A transformer block split, without and with sequence parallelism: one process, bytes, memory, dropout."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.group import split_sizes
from pardist_lib.mechanisms.tensor_parallel.transformer import ParallelTransformerBlock, TransformerBlock
from tests.mechanisms.refusals import refused
from tests.mechanisms.tensor_parallel.nets import weights_like

CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-11}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}

FORMS = {"no": {}, "keep": {"sequence_parallel": True}, "again": {"sequence_parallel": True, "keep_gathered": False}}

PLAIN = {"heads": 12, "kv": None, "width": 24, "hidden": 36, "bias": True, "norm": "layer", "dtype": torch.float64,
         "batch": 2, "s": 12, "frozen": (), "form": "no", "chunks": 1}  # fmt: skip


def close(got, want, what, bounds=None):
    torch.testing.assert_close(got, want, **(bounds or CLOSE[want.dtype]), msg=lambda text: f"{what}: {text}")


def whole_of(case, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    norm = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[case["norm"]]
    whole = TransformerBlock(case["width"], case["heads"], case["kv"], case["hidden"], bias=case["bias"], norm=norm,
                             dropout=dropout, dtype=case["dtype"])  # fmt: skip
    for name, p in whole.named_parameters():
        nn.init.normal_(p, std=p.size(-1) ** -0.5 if p.dim() > 1 else 0.3)
        p.requires_grad_(name not in case["frozen"])
    return whole


def input_of(case):
    g = torch.Generator().manual_seed(case["s"])
    return torch.randn(case["batch"], case["s"], case["width"], generator=g, dtype=torch.float64).to(case["dtype"])


def one_process(case):
    """Output, gradient of the input, {name: gradient}."""
    whole, x = whole_of(case), input_of(case).requires_grad_()
    y = whole(x)
    (y * weights_like(y)).sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in whole.named_parameters()}


def part_of(case, **more):
    options = FORMS[case["form"]] | {"chunks": case["chunks"]}
    return ParallelTransformerBlock.from_module(whole_of(case, dist.get_rank()), **options, **more)


def split(case):
    rank, n = dist.get_rank(), dist.get_world_size()
    part, x, sizes = part_of(case), input_of(case), split_sizes(case["s"], n)
    back = part.to_module()
    same = all(torch.equal(p, q) and p.requires_grad == q.requires_grad for p, q in
               zip(back.parameters(), whole_of(case).parameters(), strict=True))  # fmt: skip
    weights = weights_like(x)
    if case["form"] != "no":
        x, weights = (t.split(sizes, 1)[rank].clone() for t in (x, weights))
    x.requires_grad_()
    y = part(x, sizes) if case["form"] != "no" else part(x)
    (y * weights).sum().backward()
    frozen = [name for name, p in part.named_parameters() if p.grad is None]
    for p in part.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    return y.detach(), x.grad, {name: g.detach() for name, g in part.to_module().named_parameters()}, frozen, same


def check(ranks, n, cases):
    results = ranks.run(in_world, n, lambda: [split(case) for case in cases], quiet=True)
    for rank, mine in enumerate(results[:n]):
        for case, (y, grad, grads, frozen, same) in zip(cases, mine, strict=True):
            want, want_grad, want_grads = one_process(case)
            what = f"rank {rank} of {n}, {case}"
            assert same and list(grads) == list(want_grads), what
            if case["form"] != "no":
                want, want_grad = (t.tensor_split(n, 1)[rank] for t in (want, want_grad))
            close(y, want, f"output, {what}")
            close(grad, want_grad, f"gradient of the input, {what}")
            assert len(frozen) == len(case["frozen"]), what
            for name, g in want_grads.items():
                close(grads[name], torch.zeros_like(grads[name]) if g is None else g, f"gradient of {name}, {what}")


CHANGES = [
    {}, {"s": 7}, {"s": 3, "batch": 1}, {"hidden": 37}, {"norm": "rms", "bias": False}, {"chunks": 3},
    {"frozen": ("norm1.weight", "attention.qkv.weight")}, {"frozen": ("norm2.bias", "mlp.2.bias")},
    {"dtype": torch.float32, "bias": False}, {"dtype": torch.float32, "bias": False, "norm": "rms", "s": 5},
]  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_block_equals_one_process(ranks_of, n):
    check(ranks_of(4), n, [PLAIN | change | {"form": form} for form in FORMS for change in CHANGES])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_form_and_world(ranks_of, data):
    n = data.draw(st.integers(1, 4))
    kv, groups, d = (data.draw(st.integers(1, most)) for most in (2, 2, 3))
    case = PLAIN | {
        "heads": n * kv * groups, "kv": n * kv, "width": n * kv * groups * d, "hidden": data.draw(st.integers(1, 9)),
        "batch": data.draw(st.integers(1, 3)), "s": data.draw(st.integers(1, 9)),
        "form": data.draw(st.sampled_from(list(FORMS))),
        "norm": data.draw(st.sampled_from(["layer", "rms"])), "chunks": data.draw(st.integers(1, 3)),
    }  # fmt: skip
    check(ranks_of(4), n, [case])


def steps(module, case, many, rank=0, n=1):
    """Losses of `many` steps with AdamW; batches of changing length."""
    optimizer, losses = torch.optim.AdamW(module.parameters(), lr=1e-2), []
    for step in range(many):
        x = input_of(case | {"s": 5 + step % 3})
        goal = x.flip(1)
        sizes = split_sizes(x.size(1), n)
        if case["form"] != "no" and n > 1:
            part = module(x.split(sizes, 1)[rank], sizes)
            loss = (part - goal.split(sizes, 1)[rank]).square().sum() / x.numel()
        else:
            loss = (module(x) - goal).square().sum() / x.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
        if case["form"] != "no" and n > 1:
            dist.all_reduce(losses[-1])
    return torch.stack(losses)


def trained(case, many):
    part = part_of(case)
    losses = steps(part, case, many, dist.get_rank(), dist.get_world_size())
    return losses, {name: p.detach() for name, p in part.to_module().named_parameters()}


@pytest.mark.parametrize("form", FORMS)
def test_after_20_steps_still_equal(ranks_of, form):
    # The bias of attention's keys has a gradient of zero but for rounding, which Adam makes as large as any other.
    case = PLAIN | {"form": form, "bias": False}
    whole = whole_of(case)
    losses = steps(whole, case | {"form": "no"}, 20)
    for n in (2, 3, 4):
        for got, weights in ranks_of(4).run(in_world, n, trained, case, 20, quiet=True)[:n]:
            close(got, losses, f"losses on {n}")
            for name, p in whole.named_parameters():
                close(weights[name], p.detach(), f"{name} on {n} ranks", {"rtol": 1e-9, "atol": 1e-9})


def in_groups(case):
    """Ranks 0 and 2 split one block, ranks 1 and 3 another one, at the same time."""
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    mine, place = groups[dist.get_rank() % 2], dist.get_rank() // 2
    part = ParallelTransformerBlock.from_module(whole_of(case, dist.get_rank()), mine, **FORMS[case["form"]])
    x, weights = (t.tensor_split(2, 1)[place] for t in (input_of(case), weights_like(input_of(case))))
    y = part(x, split_sizes(case["s"], 2))
    (y * weights).sum().backward()
    whole = part.to_module()
    wanted = whole(input_of(case))
    (wanted * weights_like(wanted)).sum().backward()
    apart = [(y - wanted.tensor_split(2, 1)[place]).abs().max().item()]
    pairs = zip((part.norm1.weight, part.mlp[2].bias), (whole.norm1.weight, whole.mlp[2].bias), strict=True)
    apart += [(p.grad - q.grad).abs().max().item() for p, q in pairs]
    heard = ""
    try:
        ParallelTransformerBlock.from_module(whole, groups[1 - dist.get_rank() % 2])
    except ValueError as error:
        heard = str(error)
    dist.destroy_process_group(mine)
    return max(apart), whole.norm1.weight.detach(), heard


@pytest.mark.parametrize("form", ["keep", "again"])
def test_two_groups_at_once_and_outsiders_are_told(ranks_of, form):
    results = ranks_of(4).run(in_groups, PLAIN | {"form": form, "s": 7}, quiet=True)
    assert all(apart < 1e-10 for apart, *_ in results)
    weights = [w for _, w, _ in results]
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])  # each group its own first rank's
    assert all(f"ParallelTransformerBlock: rank {r} is not in" in heard for r, (*_, heard) in enumerate(results))


# ---- to the byte ----------------------------------------------------------------------------------------------


_made = []


def prepare(case):
    _made[:] = [part_of(case), input_of(case)]
    if case["form"] != "no":
        _made[1] = _made[1].tensor_split(dist.get_world_size(), 1)[dist.get_rank()].clone()
    _made[1].requires_grad_()


def forward_backward():
    """Which messages were sent in forward, and how many."""
    y = _made[0](_made[1])
    y.sum().backward()


def forward_only():
    _made[0](_made[1])


def bytes_sent(trace, rank):
    return trace.bytes("all_reduce", rank), trace.bytes("send", rank)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_a_block_sends_what_the_formula_says(ranks_of, n, form):
    case = PLAIN | {"form": form, "dtype": torch.float32}
    ranks_of(n).run(prepare, case, quiet=True)
    whole = case["batch"] * case["s"] * case["width"] * 4  # bytes of the activations, S
    half, norms = whole * (n - 1) // n, 2 * case["width"] * 4
    forward, both = ranks_of(n).trace(forward_only), ranks_of(n).trace(forward_backward)
    many = int(n > 1)
    for rank in range(n):
        if form == "no":  # 2 + 2 all-reduces, and nothing else
            calls = [(e.name, e.bytes) for e in forward.collectives if e.rank == rank]
            assert calls == [("all_reduce", whole)] * 2 * many
            calls = [(e.name, e.bytes) for e in both.collectives if e.rank == rank]
            assert calls == [("all_reduce", whole)] * 4 * many
        else:  # halves: 4 forward, 4 or 6 backward; and the gradients of two norms
            backward = {"keep": 4, "again": 6}[form]
            assert bytes_sent(forward, rank) == (0, 4 * half)
            assert bytes_sent(both, rank) == (2 * norms * many, (4 + backward) * half)


# ---- memory ---------------------------------------------------------------------------------------------------


def kept(case):
    """Bytes kept for backward by one forward pass, each piece of memory once; parameters are not counted."""
    n, rank = dist.get_world_size(), dist.get_rank()
    part, x = part_of(case), input_of(case)
    if case["form"] != "no":
        x = x.tensor_split(n, 1)[rank].clone()
    x.requires_grad_()
    own, found = {p.untyped_storage().data_ptr() for p in part.parameters()}, {}

    def keep(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = part(x)  # noqa: F841
    return sum(size for pointer, size in found.items() if pointer not in own)


@pytest.mark.parametrize("n", [2, 4])
def test_sequence_parallelism_keeps_less_and_the_regathered_form_least(ranks_of, n):
    case = PLAIN | {"dtype": torch.float32, "s": 48, "hidden": 96}
    sizes = {form: max(ranks_of(n).run(kept, case | {"form": form}, quiet=True)) for form in FORMS}
    alone = ranks_of(4).run(in_world, 1, kept, case, quiet=True)[0]
    assert alone > sizes["no"] > sizes["keep"] > sizes["again"]
    assert abs(sizes["again"] * n / alone - 1) < 0.03  # one n-th of everything; the parameters of norms, doubled, rest


# ---- dropout --------------------------------------------------------------------------------------------------


def dropped(form):
    """A block's output with dropout on, and what of the residual branches was dropped."""
    case = PLAIN | {"form": form, "s": 8}
    part = ParallelTransformerBlock.from_module(whole_of(case, dropout=0.5), **FORMS[form])
    for p in part.parameters():
        nn.init.zeros_(p)
    nn.init.ones_(part.mlp[2].bias)  # x + dropout(1): only the MLP's dropout is left
    x = torch.zeros(2, 8, 24, dtype=torch.float64)
    x = x.tensor_split(dist.get_world_size(), 1)[dist.get_rank()] if form != "no" else x
    torch.manual_seed(3)
    return part(x).detach()


def test_dropout_is_alike_where_activations_are_whole_and_different_where_they_are_split(ranks_of):
    first, *others = ranks_of(4).run(dropped, "no", quiet=True)
    assert set(first.unique().tolist()) == {0.0, 2.0} and all(torch.equal(first, other) for other in others)
    parts = ranks_of(4).run(dropped, "keep", quiet=True)
    assert len({tuple(part.flatten().tolist()) for part in parts}) == 4
    assert 0.35 < torch.cat(parts, 1).ne(0).double().mean() < 0.65


# ---- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda P: P(20, 5), "5 heads cannot be split over 4 ranks"),
        (lambda P: P.from_module(P(8, 4)), "is split already"),
        (lambda P: P.from_module(nn.Linear(2, 2)), "splits TransformerBlock, not Linear"),
        (lambda P: P(8, 4, sequence_parallel=True)(torch.zeros(1, 3, 8), [3, 3]), "do not fit: 4 ranks"),
        (lambda P: P(8, 4, group="tp"), "group is a str, but has to be a process group"),
    ],
)  # fmt: skip
def test_refused_with_a_reason(ranks_of, wrong, told):
    with refused(told) as caught:
        ranks_of(4).run(wrong, ParallelTransformerBlock, quiet=True)
    assert caught.value.cause == "ValueError"
