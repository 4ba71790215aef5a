"""A table split by rows; typically other ranks' words are not masked, shards begin elsewhere, words come twice."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, call, untouched, values, what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from .shared import parts_of, results

hints = (
    "Which words does this rank own? torch.arange(vocabulary).tensor_split(n)[rank] says it; its first one is "
    "where rows begins.",
    "mine = (tokens >= first) & (tokens < first + len(rows)). Start with zeros, fill in the rows of the tokens "
    "that are mine, at tokens - first; then the sum over the ranks has every row once.",
    "Backward, each rank adds grad to the rows of its own tokens and sends nothing: "
    "gradient.index_add_(0, (tokens - first)[mine], grad[mine]) also counts a word that comes twice.",
)


def check(run):
    for n, vocabulary, shape, dtype, new in CASES:
        about = f"{vocabulary} words on {n} ranks, tokens of shape {shape}"
        with what_is_new(new):
            seen = run(_embed, vocabulary, shape, dtype, n=n, about=about)
            only_calls(seen, ("all_reduce",), OTHER_CALLS)
            got, got_grad = results(seen, ("result", "gradient of rows"), about)
            untouched(seen, about)
            tokens, table, grad = _inputs(vocabulary, shape, dtype)
            _judge_result(got, tokens, table, about)
            _judge_gradient(got_grad, tokens.flatten(), table, grad.flatten(0, -2), about)
            for rank, one in enumerate(seen):
                made = [call.bytes for call in one.calls]
                if made != [grad.nbytes]:
                    why = f"{len(made)} all_reduces of {sum(made):,} bytes, where one of {grad.nbytes:,} is enough"
                    why = f"the results are right, but it makes {why}" + ": backward sends nothing" * (len(made) > 1)
                    raise Wrong(why, f"rank {rank}, {about}", f"[{grad.nbytes}]", f"{made}")


CASES = [  # ranks, words, shape of tokens, dtype, what is new in it
    (4, 8, (9,), F32, ""),
    (4, 9, (20,), F32, "it works where 4 divides the vocabulary, but not for 9 words"),
    (4, 10, (3, 7), F32, "it works only for tokens with one dimension"),
    (3, 7, (12,), F64, "it works with 4 ranks, but not with 3 (is a 4 written into it?)"),
    (2, 5, (2, 2, 3), F64, "it works with 4 ranks, but not with 2 (is a 4 written into it?)"),
]
OTHER_CALLS = {
    "all_gather": "it calls all_gather: whole tables or results travel, where the sum of one row and zeros does",
    "": "it calls {op}: one all_reduce of the result is all that is needed",
}


def _inputs(vocabulary, shape, dtype):
    """Tokens with every word at least once where there is room, the whole table, grad."""
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    many = torch.Size(shape).numel()
    tokens = order.repeat(-(-many // vocabulary))[:many].view(shape)
    return tokens, values((vocabulary, 3), dtype, 1), values((*shape, 3), dtype, 2)


def _embed(answer, vocabulary, shape, dtype):
    tokens, table, grad = _inputs(vocabulary, shape, dtype)
    rows = table.tensor_split(dist.get_world_size())[dist.get_rank()].clone()
    inputs = {"tokens": tokens, "rows": rows, "grad": grad}
    return call(lambda tokens, rows, grad: answer(tokens, rows, vocabulary, grad), inputs)


def _judge_result(got, tokens, table, about):
    n, parts = len(got), parts_of(len(table), len(got))

    def added(low=0, high=0, mask=True, begins=None):
        """What each rank adds, if its words are those from begins[rank] + low on, and so on."""
        for (a, b), begin in zip(parts, begins or [a for a, _ in parts], strict=True):
            mine = (tokens >= begin + low) & (tokens < begin + b - a + high)
            yield table[a:b][(tokens - begin).clamp(0, b - a - 1)] * (mine | (not mask))[..., None]

    def from_rank_times(*lengths):
        return sum(added(begins=[rank * length for rank, length in enumerate(lengths)]))

    each, most = len(table) // n, len(table) // n + 1
    modulo = [table[a:b][tokens % (b - a)] * ((tokens >= a) & (tokens < b))[..., None] for a, b in parts]
    others, begin = "other ranks' words are looked up, too", "the shards are taken to begin at rank · "
    mistakes = {
        "each rank has only the rows of its own words, zeros elsewhere: the sum over the ranks is missing": [*added()],
        "a rank's first word is left out: it owns the words from first on, so >=, not >": sum(added(low=1)),
        "the word after a rank's last one counts as its own: tokens < first + len(rows), not <=": sum(added(high=1)),
        "a rank's last word is left out: tokens < first + len(rows)": sum(added(high=-1)),
        f"{others} (at the edge of the shard), and added: they have to be zeros": sum(added(mask=False)),
        f"{begin}{each}, but tensor_split gives the first ones a word more": from_rank_times(*[each] * n),
        f"{begin}{most}, but not all have {most} words": from_rank_times(*[most] * n),
        f"{begin}len(rows), but shards may differ in length": from_rank_times(*(b - a for a, b in parts)),
        "a token's row is looked up at token % len(rows): among this rank's rows it is at token - first": sum(modulo),
        f"divided by {n}: only one rank has the row, the others add zeros": table[tokens] / n,
        "MAX instead of SUM: a negative number is less than the others' zeros": torch.stack([*added()]).amax(0),
    }
    same(got, table[tokens], "the result", about, mistakes.items())


def _judge_gradient(got, tokens, table, grad, about):
    n, once = len(got), torch.zeros_like(table)
    once[tokens] = grad
    right = torch.zeros_like(table).index_add_(0, tokens, grad).tensor_split(n)
    row_0, edges = [g.clone() for g in right], [g.clone() for g in right]
    for rank, (a, b) in enumerate(parts_of(len(table), n)):
        before, after = grad[tokens < a].sum(0), grad[tokens >= b].sum(0)
        row_0[rank][0] += before + after
        edges[rank][0] += before
        edges[rank][-1] += after
    theirs, sums = "their part of grad has to be left out", "the backward of the sum over ranks is no sum"
    twice = "a word that comes twice counts once: index_add_ (or accumulate=True) adds, an assignment overwrites"
    mistakes = {
        f"other ranks' tokens end up in row 0: {theirs}": row_0,
        f"other ranks' tokens end up in the first and the last row: {theirs}": edges,
        twice: once.tensor_split(n),
        f"{n} times too large: {sums}, each rank has the whole grad already": [g * n for g in right],
        f"divided by {n}: every rank owns its rows alone, there is nothing to average": [g / n for g in right],
        "the gradient is zero": [torch.zeros_like(g) for g in right],
    }
    if len(table) % n == 0:
        mistakes["the gradients are added up over the ranks: each rank has other rows"] = sum(right)
    same(got, right, "the gradient of rows", about, mistakes.items())


why = (
    "Every word has one owner and all others add zeros, so the sum is the row itself; backward each owner has "
    "the whole gradient already. Megatron's VocabParallelEmbedding does so, with a vocabulary padded until "
    "the ranks divide it; under sequence parallelism it reduce-scatters."
)
exercise = Exercise(hints, check, minutes=12, level="medium", why=why)
