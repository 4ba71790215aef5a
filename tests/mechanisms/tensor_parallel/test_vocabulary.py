"""Vocabulary split over ranks: embedding and cross-entropy against one process, against DTensor, and to the byte."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.group import split_sizes
from pardist_lib.mechanisms.tensor_parallel.vocabulary import VocabParallelEmbedding, vocab_parallel_cross_entropy
from tests.mechanisms.refusals import refused

CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-6},
         torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2}, torch.float16: {"rtol": 2e-3, "atol": 1e-3}}  # fmt: skip


def close(got, want, what="", dtype=None):
    assert (got is None) == (want is None), what
    if want is not None:
        bounds = CLOSE[dtype or want.dtype]
        torch.testing.assert_close(got, want, **bounds, equal_nan=True, msg=lambda text: f"{what}: {text}")


def several(fn, cases):
    """On a rank: fn(**case) for each case, in a world of its size."""
    return [in_world(case["n"], lambda c: fn(**c), {k: v for k, v in case.items() if k != "n"}) for case in cases]


# ---- embedding ------------------------------------------------------------------------------------------------


def table(vocabulary, width, dtype, padding=None):
    torch.manual_seed(5)
    return nn.Embedding(vocabulary, width, padding, dtype=dtype)


def tokens_of(vocabulary, shape=(3, 7)):
    """Random words, and those at the edges of every split."""
    words = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(vocabulary))
    edges = [w for n in (1, 2, 3, 4) for s in [torch.arange(vocabulary).tensor_split(n)] for w in
             [p[i].item() for p in s if len(p) for i in (0, -1)]]  # fmt: skip
    return torch.cat([words.flatten(), torch.tensor(edges)])


def embedded(vocabulary, width, dtype, padding=None, frozen=False):
    whole = table(vocabulary, width, dtype, padding)
    whole.weight.requires_grad_(not frozen)
    part, tokens = VocabParallelEmbedding.from_module(whole), tokens_of(vocabulary)
    y = part(tokens)
    if not frozen:
        (y * torch.arange(float(y.numel())).view_as(y)).sum().backward()
    return y.detach(), part.weight.grad, part.to_module().weight.detach(), (part.first, part.end)


def whole_numbers(kind):
    """300 words, of which a byte knows 256: the later ranks' first words do not fit into one."""
    torch.manual_seed(0)
    words, logits = torch.tensor([0, 1, 2, 100]).to(kind), torch.randn(4, 300, dtype=torch.float64)
    whole = nn.Embedding(300, 2)
    part = logits.tensor_split(dist.get_world_size(), -1)[dist.get_rank()]
    close(VocabParallelEmbedding.from_module(whole)(words), whole(words.long()), f"{kind}, embedding")
    close(vocab_parallel_cross_entropy(part, words), F.cross_entropy(logits, words.long()), f"{kind}, loss")


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_words_of_every_kind_of_whole_number(ranks_of, kind):
    ranks_of(4).run(whole_numbers, kind, quiet=True)


def one_process(vocabulary, width, dtype, padding=None, frozen=False):
    whole, tokens = table(vocabulary, width, dtype, padding), tokens_of(vocabulary)
    y = whole(tokens)
    (y * torch.arange(float(y.numel())).view_as(y)).sum().backward()
    return y.detach(), None if frozen else whole.weight.grad, whole.weight.detach()


def test_embedding_equals_one_process(ranks_of):
    cases = [{"n": n, "vocabulary": v, "width": 5, "dtype": dtype, "padding": padding, "frozen": frozen}
             for n in (1, 2, 3, 4) for v, dtype, padding, frozen in
             [(12, torch.float64, None, False), (10, torch.float32, 3, False), (3, torch.float64, None, False),
              (7, torch.float32, None, True), (50257, torch.float32, None, False)]]  # fmt: skip
    for rank, results in enumerate(ranks_of(4).run(several, embedded, cases, quiet=True)):
        for case, got in zip(cases, results, strict=True):
            if rank >= case["n"]:
                assert got is None
                continue
            y, grad, weight = one_process(**{k: v for k, v in case.items() if k != "n"})
            got_y, got_grad, got_weight, (first, end) = got
            assert torch.equal(got_y, y) and torch.equal(got_weight, weight), case  # sums with zeros are exact
            assert end - first == split_sizes(case["vocabulary"], case["n"])[rank]
            close(got_grad, None if grad is None else grad[first:end], f"rank {rank} of {case}")


def fresh():
    torch.manual_seed(3)
    part = VocabParallelEmbedding(10, 4, padding_idx=0)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    whole = nn.Embedding(10, 4, 0)
    return torch.equal(part.to_module().weight, whole.weight) and torch.equal(state, torch.get_rng_state())


def test_a_new_embedding_is_part_of_what_one_process_would_draw(ranks_of):
    assert ranks_of(3).run(fresh, quiet=True) == [True] * 3


# ---- cross-entropy --------------------------------------------------------------------------------------------

PLAIN = {"shape": (2, 5), "vocabulary": 11, "dtype": torch.float64, "reduction": "mean", "ignored": (),
         "smoothing": 0.0, "scale": 1.0, "told": False, "ignore_index": -100}  # fmt: skip


def inputs(shape, vocabulary, dtype, ignored, scale, ignore_index, **_):
    g = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(*shape, vocabulary, generator=g, dtype=torch.float64) * scale).to(dtype)
    target = torch.randint(vocabulary, shape, generator=g)
    target.view(-1)[list(ignored)] = ignore_index
    return logits, target


def split_loss(case):
    rank, n = dist.get_rank(), dist.get_world_size()
    logits, target = inputs(**case)
    part = logits.tensor_split(n, -1)[rank].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(
        part, target, reduction=case["reduction"], ignore_index=case["ignore_index"],
        label_smoothing=case["smoothing"], vocab_size=case["vocabulary"] if case["told"] else None,
    )  # fmt: skip
    loss.backward(torch.ones_like(loss) * 3)
    return loss.detach(), part.grad


def whole_loss(case):
    logits, target = inputs(**case)
    logits.requires_grad_()
    rows = logits.flatten(0, -2) if case["shape"] else logits.unsqueeze(0)
    loss = F.cross_entropy(rows, target.flatten(), reduction=case["reduction"],
                           ignore_index=case["ignore_index"], label_smoothing=case["smoothing"])  # fmt: skip
    loss = loss.view(target.shape) if case["reduction"] == "none" else loss
    loss.backward(torch.ones_like(loss) * 3)
    return loss.detach(), logits.grad


def check_losses(ranks, n, cases):
    results = ranks.run(in_world, n, lambda: [split_loss(case) for case in cases], quiet=True)
    for rank, mine in enumerate(results[:n]):
        for case, (loss, grad) in zip(cases, mine, strict=True):
            want, want_grad = whole_loss(case)
            what = f"rank {rank} of {n}, {case}"
            close(loss, want, f"loss, {what}")
            close(grad, want_grad.tensor_split(n, -1)[rank], f"gradient, {what}")


CHANGES = [
    {}, {"reduction": "none"}, {"reduction": "sum"}, {"ignored": (0, 3)}, {"ignored": (1,), "ignore_index": 4},
    {"smoothing": 0.1}, {"smoothing": 0.1, "ignored": (2,), "reduction": "none"}, {"smoothing": 1.0},
    {"scale": 1000.0}, {"scale": 1000.0, "smoothing": 0.2}, {"dtype": torch.float32, "scale": 1000.0},
    {"dtype": torch.float32, "told": True, "smoothing": 0.1}, {"dtype": torch.bfloat16}, {"dtype": torch.float16},
    {"vocabulary": 3}, {"vocabulary": 3, "told": True, "smoothing": 0.3}, {"shape": ()}, {"shape": (4,)},
    {"shape": (2, 0)}, {"ignored": range(10)}, {"ignored": range(10), "reduction": "sum"}, {"told": True},
]  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_cross_entropy_equals_torchs(ranks_of, n):
    check_losses(ranks_of(4), n, [PLAIN | change for change in CHANGES])


@st.composite
def any_case(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    many = torch.Size(shape).numel()
    return draw(st.integers(1, 4)), PLAIN | {
        "shape": shape, "vocabulary": draw(st.integers(1, 23)), "dtype": draw(st.sampled_from(list(CLOSE)[:2])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "smoothing": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "scale": draw(st.sampled_from([1.0, 1000.0])), "told": draw(st.booleans()),
        "ignored": draw(st.lists(st.integers(0, many - 1), max_size=many - 1)),
    }  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(any_case())
def test_any_shape_vocabulary_dtype_and_world(ranks_of, drawn):
    n, case = drawn
    check_losses(ranks_of(4), n, [case])


def under_autocast():
    logits, target = inputs(**PLAIN | {"dtype": torch.bfloat16})
    part = logits.tensor_split(dist.get_world_size(), -1)[dist.get_rank()]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = F.cross_entropy(logits.flatten(0, -2), target.flatten())
        return vocab_parallel_cross_entropy(part, target), theirs


def test_under_autocast_the_loss_is_float32_as_torchs(ranks_of):
    for ours, theirs in ranks_of(3).run(under_autocast, quiet=True):
        assert ours.dtype == theirs.dtype == torch.float32
        close(ours, theirs, "loss")


def beside_dtensor(reduction, smoothing):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    n = dist.get_world_size()
    mesh = init_device_mesh("cpu", (n,))
    logits, target = inputs(**PLAIN | {"dtype": torch.float32, "vocabulary": 4 * n, "ignored": (1, 2)})
    logits, target = logits.flatten(0, -2), target.flatten()
    theirs = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_()
    with loss_parallel():
        loss = F.cross_entropy(theirs, target, reduction=reduction)
        loss.sum().backward()
    ours = logits.tensor_split(n, -1)[dist.get_rank()].clone().requires_grad_()
    own = vocab_parallel_cross_entropy(ours, target, reduction=reduction)
    own.sum().backward()
    return (
        own.detach(),
        loss.full_tensor().detach() if hasattr(loss, "full_tensor") else loss.detach(),
        ours.grad,
        theirs.grad.to_local(),
    )


@pytest.mark.parametrize("n", [2, 4])
def test_cross_entropy_equals_dtensors_loss_parallel(ranks_of, n):
    for own, theirs, grad, their_grad in ranks_of(n).run(beside_dtensor, "mean", 0.0, quiet=True):
        close(own, theirs, "loss")
        close(grad, their_grad, "gradient")


def model_steps(steps, dtype, tied):
    """Embedding, a layer, logits of all words: some steps of training, the vocabulary split."""
    whole = language_model(dtype, tied)
    rank, n = dist.get_rank(), dist.get_world_size()
    embedding, layer = VocabParallelEmbedding.from_module(whole[0]), whole[1]
    head = embedding.weight if tied else nn.Parameter(whole[2].weight.detach().tensor_split(n)[rank].clone())
    from pardist_lib.mechanisms.collectives.autograd import copy_to_group

    parameters = [embedding.weight, *layer.parameters(), *([] if tied else [head])]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for step in range(steps):
        words = batch(step)
        logits = F.linear(copy_to_group(torch.tanh(layer(embedding(words[:, :-1])))), head)
        loss = vocab_parallel_cross_entropy(logits, words[:, 1:], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, embedding.weight.detach(), head.detach(), layer.weight.detach()


def language_model(dtype, tied):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Embedding(13, 6), nn.Linear(6, 6), nn.Linear(6, 13, bias=False)]).to(dtype)
    if tied:
        model[2].weight = model[0].weight
    return model


def batch(step):
    return torch.randint(13, (4, 6), generator=torch.Generator().manual_seed(step))


def whole_steps(steps, dtype, tied):
    model = language_model(dtype, tied)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(steps):
        words = batch(step)
        logits = model[2](torch.tanh(model[1](model[0](words[:, :-1]))))
        loss = F.cross_entropy(logits.transpose(1, 2), words[:, 1:], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model[0].weight.detach(), model[2].weight.detach(), model[1].weight.detach()


@pytest.mark.parametrize("tied", [False, True])
def test_after_20_steps_still_equal_also_with_tied_weights(ranks_of, tied):
    losses, embedding, head, layer = whole_steps(20, torch.float64, tied)
    for n in (2, 3, 4):
        for rank, got in enumerate(ranks_of(4).run(in_world, n, model_steps, 20, torch.float64, tied, quiet=True)[:n]):
            close(torch.tensor(got[0]).double(), torch.tensor(losses).double(), dtype=torch.float32)
            close(got[1], embedding.tensor_split(n)[rank], f"embedding on rank {rank} of {n}")
            close(got[2], head.tensor_split(n)[rank], f"head on rank {rank} of {n}")
            close(got[3], layer, f"layer on rank {rank} of {n}")


# ---- to the byte ----------------------------------------------------------------------------------------------


def forward_and_backward(kind, vocabulary, dtype, told, smoothing=0.0):
    rank, n = dist.get_rank(), dist.get_world_size()
    if kind == "embedding":
        part = VocabParallelEmbedding.from_module(table(vocabulary, 8, dtype))
        return part(torch.arange(12) % vocabulary).sum().backward()
    logits, target = torch.randn(6, vocabulary, dtype=dtype), torch.arange(6) % vocabulary
    part = logits.tensor_split(n, -1)[rank].clone().requires_grad_()
    size = vocabulary if told else None
    vocab_parallel_cross_entropy(part, target, vocab_size=size, label_smoothing=smoothing).backward()


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("vocabulary", [16, 17])
def test_traffic_to_the_byte(ranks_of, n, vocabulary):
    many = n > 1  # one rank sends nothing
    for dtype, item in ((torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 4)):
        for told, smoothing in ((True, 0.0), (True, 0.1), (False, 0.1)):
            trace = ranks_of(n).trace(forward_and_backward, "loss", vocabulary, dtype, told, smoothing)
            for rank in range(n):
                calls = [(e.name, e.bytes) for e in trace.collectives if e.rank == rank]
                first = 6 * item + (0 if told else n * item)
                assert calls == many * [("all_reduce", first), ("all_reduce", 6 * item), ("all_reduce", 6 * item)]
    trace = ranks_of(n).trace(forward_and_backward, "embedding", vocabulary, torch.float32, True)
    calls = [(e.name, e.bytes) for e in trace.collectives if e.name not in ("send", "recv")]
    assert calls == many * n * [("all_reduce", 12 * 8 * 4)]
    assert trace.bytes("send") == many * (vocabulary - -(-vocabulary // n)) * 8 * 4  # the table, dealt out


def memory_of_the_loss():
    """(bytes kept for backward, bytes of the logits)"""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    logits = torch.randn(64, 500, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        vocab_parallel_cross_entropy(logits, torch.arange(64))
    return sum(kept.values()), logits.nbytes


def test_backward_keeps_the_logits_and_little_else(ranks_of):
    for kept, logits in ranks_of(2).run(memory_of_the_loss, quiet=True):
        assert logits <= kept <= logits + 64 * 40


# ---- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, cause, told",
    [
        (lambda E, ce: E(10, 4)(torch.zeros(2)), "TypeError", "whole numbers, not torch.float32"),
        (lambda E, ce: E(10, 4)(torch.tensor([3, 10])), "IndexError", "token 10 is outside the vocabulary of 10"),
        (lambda E, ce: E(10, 4)(torch.tensor([-1])), "IndexError", "token -1 is outside"),
        (lambda E, ce: E.from_module(nn.Linear(2, 2)), "ValueError", "splits nn.Embedding, not Linear"),
        (lambda E, ce: E.from_module(E(10, 4)), "ValueError", "is split already"),
        (lambda E, ce: E.from_module(nn.Embedding(9, 2, max_norm=1.0)), "ValueError", "max_norm=1.0 does not split"),
        (lambda E, ce: ce(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2).long()), "TypeError", "floating point"),
        (lambda E, ce: ce(torch.zeros(2, 3), torch.zeros(2)), "TypeError", "targets are whole numbers"),
        (lambda E, ce: ce(torch.zeros(2, 3, 5), torch.zeros(2, 5).long()), "ValueError", "the vocabulary is the last"),
        (lambda E, ce: ce(torch.zeros(2, 3), torch.tensor([0, 6])), "IndexError", "target 6 is outside .* 6 words"),
        (lambda E, ce: ce(torch.zeros(2, 3), torch.tensor([0, -1])), "IndexError", "target -1 is outside"),
        (lambda E, ce: ce(torch.zeros(2, 3), torch.zeros(2).long(), reduction="avg"), "ValueError", "not 'avg'"),
        (lambda E, ce: ce(torch.zeros(1, 3), torch.tensor([0]), label_smoothing=2), "ValueError", "between 0 and 1"),
        (lambda E, ce: ce(torch.zeros(2, 3), torch.zeros(2).long(), vocab_size=10), "ValueError", "it owns 5"),
    ],
)  # fmt: skip
def test_refused_with_a_reason(ranks_of, wrong, cause, told):
    with refused(told) as caught:
        ranks_of(2).run(wrong, VocabParallelEmbedding, vocab_parallel_cross_entropy, quiet=True)
    assert caught.value.cause == cause
