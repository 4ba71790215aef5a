"""The exercise split_embedding."""

import torch
import torch.distributed as dist

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from .shared import F32, F64, call_answer, parts_of, random, results, told

hints = (
    "Which words does this rank own? torch.arange(vocabulary).tensor_split(n)[rank] says it; its first one is "
    "where rows begins.",
    "mine = (tokens >= first) & (tokens < first + len(rows)). Start with zeros, fill in the rows of the tokens "
    "that are mine, at tokens - first; then the sum over the ranks has every row once.",
    "Backward, each rank adds grad to the rows of its own tokens and sends nothing: "
    "gradient.index_add_(0, (tokens - first)[mine], grad[mine]) also counts a word that comes twice.",
)


def check(run):
    known = set()
    for n, vocabulary, shape, dtype in [
        (4, 8, (9,), F32), (4, 9, (20,), F32), (4, 10, (3, 7), F32), (3, 7, (12,), F64), (2, 5, (2, 2, 3), F64),
    ]:  # fmt: skip
        notable = {
            f"it works where {n} divides the vocabulary, but not for {vocabulary} words": vocabulary % n
            and not any("divides the vocabulary" in text for text in known),
            "it works only for tokens with one dimension": len(shape) > 1,
            f"it works with 4 ranks, but not with {n} (is a 4 written into it?)": n != 4,
        }
        about = f"{vocabulary} words on {n} ranks, tokens of shape {shape}"
        try:
            seen = run(_embed, vocabulary, shape, dtype, n=n, about=about)
            _judge_embedding(seen, vocabulary, shape, dtype, about)
        except Wrong as wrong:
            raise told(wrong, known, notable) from None
        known |= {text for text, holds in notable.items() if holds} | {"the first case"}


def _embedding_case(vocabulary, shape, dtype):
    """(tokens with every word at least once where there is room, table, grad)"""
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    many = torch.Size(shape).numel()
    tokens = order.repeat(-(-many // vocabulary))[:many].view(shape)
    return tokens, random((vocabulary, 3), dtype, 1), random((*shape, 3), dtype, 2)


def _embed(answer, vocabulary, shape, dtype):
    tokens, table, grad = _embedding_case(vocabulary, shape, dtype)
    rows = table.tensor_split(dist.get_world_size())[dist.get_rank()].clone()
    return call_answer(answer, tokens, rows, vocabulary, grad)


def _judge_embedding(seen, vocabulary, shape, dtype, about):
    n = len(seen)
    tokens, table, grad = _embedding_case(vocabulary, shape, dtype)
    parts = parts_of(vocabulary, n)
    only_calls(seen, ("all_reduce",), {
        "all_gather": "it calls all_gather: whole tables or results travel, where the sum of one row and zeros does",
        "": "it calls {op}: one all_reduce of the result is all that is needed",
    })  # fmt: skip
    names = ("result", "gradient of rows")
    got, got_grad = results(seen, 2, names, ("tokens", "rows", "vocabulary", "grad"), about)

    def summands(start=0, stop=0, mask=True, first=None):
        """What each rank adds: with its words from `start` later on to `stop` further."""
        found = []
        for r, (a, b) in enumerate(parts):
            begin = a if first is None else first(r)
            mine = (tokens >= a + start) & (tokens < b + stop) if first is None else \
                (tokens >= begin) & (tokens < begin + b - a)  # fmt: skip
            local = (tokens - begin).clamp(0, b - a - 1)
            part = table[a:b][local]
            found.append(part * (mine if mask else torch.ones_like(mine)).unsqueeze(-1))
        return found

    own, width = summands(), table.size(1)
    even = vocabulary // n
    mistakes = [
        ("each rank has only the rows of its own words, zeros elsewhere: the sum over the ranks is missing", own),
        ("a rank's first word is left out: it owns the words from first on, so >=, not >",
         [sum(summands(start=1))] * n),
        ("the word after a rank's last one counts as its own, too: tokens < first + len(rows), not <=",
         [sum(summands(stop=1))] * n),
        ("a rank's last word is left out: tokens < first + len(rows)", [sum(summands(stop=-1))] * n),
        ("other ranks' words are looked up, too (at the edge of the shard), and added: they have to be zeros",
         [sum(summands(mask=False))] * n),
        (f"the shards are taken to begin at rank · {even}, but tensor_split gives the first ones a word more",
         [sum(summands(first=lambda r: r * even))] * n),
        (f"the shards are taken to begin at rank · {even + 1}, but not all have {even + 1} words",
         [sum(summands(first=lambda r: r * (even + 1)))] * n),
        ("the shards are taken to begin at rank · len(rows), but shards may differ in length",
         [sum(summands(first=lambda r: r * (parts[r][1] - parts[r][0])))] * n),
        ("a token's row is looked up at token % len(rows): among this rank's rows it is at token - first",
         [sum(table[a:b][tokens % (b - a)] * ((tokens >= a) & (tokens < b)).unsqueeze(-1) for a, b in parts)] * n),
        (f"divided by {n}: only one rank has the row, the others add zeros", [table[tokens] / n] * n),
        ("MAX instead of SUM: a negative number is less than the others' zeros", [torch.stack(own).amax(0)] * n),
    ]  # fmt: skip
    same(got, [table[tokens]] * n, "the result", about, mistakes)

    def gradients(index, weight, overwrite=False):
        found = []
        for a, b in parts:
            g = torch.zeros(b - a, width, dtype=dtype)
            local, chosen = index(a, b), grad * weight(a, b).unsqueeze(-1)
            if overwrite:
                keep = weight(a, b).bool()
                g[local[keep]] = grad[keep]
            else:
                g.index_add_(0, local.flatten(), chosen.flatten(0, -2))
            found.append(g)
        return found

    def inside(a, b):
        return ((tokens >= a) & (tokens < b)).to(dtype)

    def everything(a, b):
        return torch.ones(tokens.shape, dtype=dtype)

    def clamped(a, b):
        return (tokens - a).clamp(0, b - a - 1)

    right = gradients(clamped, inside)
    mistakes = [
        ("other ranks' tokens end up in row 0: their part of grad has to be left out",
         gradients(lambda a, b: (tokens - a) * ((tokens >= a) & (tokens < b)), everything)),
        ("other ranks' tokens end up in the first and the last row: their part of grad has to be left out",
         gradients(clamped, everything)),
        ("a word that comes twice counts once: index_add_ (or accumulate=True) adds, an assignment overwrites",
         gradients(clamped, inside, overwrite=True)),
        (f"{n} times too large: the backward of the sum over ranks is no sum, each rank has the whole grad already",
         [g * n for g in right]),
        (f"divided by {n}: every rank owns its rows alone, there is nothing to average", [g / n for g in right]),
        ("the gradient is zero", [torch.zeros_like(g) for g in right]),
    ]  # fmt: skip
    if len({g.shape for g in right}) == 1:
        mistakes.append(("the gradients are added up over the ranks: each rank has other rows", [sum(right)] * n))
    same(got_grad, right, "the gradient of rows", about, mistakes)
    size = grad.numel() * grad.element_size()
    for rank, one in enumerate(seen):
        made = [call.bytes for call in one.calls]
        if made != [size]:
            why = f"{len(made)} all_reduces of {sum(made):,} bytes, where one of {size:,} is enough"
            if len(made) > 1:
                why += ": backward sends nothing"
            raise Wrong(f"the results are right, but it makes {why}", f"rank {rank}, {about}", f"[{size}]", f"{made}")


exercise = Exercise(hints, check)
