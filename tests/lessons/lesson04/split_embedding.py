"""split_embedding: wrong answers as people write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F

from tests.lessons.lesson04.shared import edges, me
from tests.lessons.planted import mistake, right


def embedding(tokens, rows, first, end, grad, *, reduce=True, op=dist.ReduceOp.SUM, mask=None, masked_grad=True):
    inside = (tokens >= first) & (tokens < end) if mask is None else mask
    local = (tokens - first).clamp(0, len(rows) - 1)
    result = rows[local] * inside.unsqueeze(-1)
    if reduce:
        dist.all_reduce(result, op)
    gradient = torch.zeros_like(rows)
    kept = grad * inside.unsqueeze(-1) if masked_grad else grad
    gradient.index_add_(0, local.flatten(), kept.flatten(0, -2))
    return result, gradient


@mistake("split_embedding", "the sum over the ranks is missing")
def never_summed(tokens, rows, vocabulary, grad):
    return embedding(tokens, rows, *edges(vocabulary), grad, reduce=False)


@mistake("split_embedding", "so >=, not >")
def first_word_lost(tokens, rows, vocabulary, grad):
    first, end = edges(vocabulary)
    return embedding(tokens, rows, first, end, grad, mask=(tokens > first) & (tokens < end))


@mistake("split_embedding", "tokens < first + len(rows), not <=")
def one_word_too_many(tokens, rows, vocabulary, grad):
    first, end = edges(vocabulary)
    return embedding(tokens, rows, first, end, grad, mask=(tokens >= first) & (tokens <= end))


@mistake("split_embedding", "they have to be zeros")
def no_mask(tokens, rows, vocabulary, grad):
    first, end = edges(vocabulary)
    return embedding(tokens, rows, first, end, grad, mask=torch.ones_like(tokens).bool())


@mistake("split_embedding", "it works where 4 divides the vocabulary, but not for 9 words: the shards are taken")
def even_shards_only(tokens, rows, vocabulary, grad):
    rank, n = me()
    first = rank * (vocabulary // n)
    return embedding(tokens, rows, first, first + len(rows), grad)


@mistake("split_embedding", "it works where 4 divides the vocabulary, but not for 9 words: the shards are taken")
def rank_times_its_own_length(tokens, rows, vocabulary, grad):
    first = dist.get_rank() * len(rows)
    return embedding(tokens, rows, first, first + len(rows), grad)


@mistake("split_embedding", "among this rank's rows it is at token - first")
def token_modulo_rows(tokens, rows, vocabulary, grad):
    first, end = edges(vocabulary)
    mine, local = (tokens >= first) & (tokens < end), tokens % len(rows)
    result = rows[local] * mine.unsqueeze(-1)
    dist.all_reduce(result)
    return result, torch.zeros_like(rows).index_add_(0, local[mine], grad[mine])


@mistake("split_embedding", "MAX instead of SUM")
def the_greatest(tokens, rows, vocabulary, grad):
    return embedding(tokens, rows, *edges(vocabulary), grad, op=dist.ReduceOp.MAX)


@mistake("split_embedding", "only one rank has the row, the others add zeros")
def averaged(tokens, rows, vocabulary, grad):
    return embedding(tokens, rows, *edges(vocabulary), grad, op=dist.ReduceOp.AVG)


@mistake("split_embedding", "other ranks' tokens end up in row 0")
def row_0_gets_the_rest(tokens, rows, vocabulary, grad):
    first, end = edges(vocabulary)
    theirs = (tokens < first) | (tokens >= end)
    local = (tokens - first).masked_fill(theirs, 0)
    result = rows[local].masked_fill(theirs.unsqueeze(-1), 0)
    dist.all_reduce(result)
    return result, torch.zeros_like(rows).index_add_(0, local.flatten(), grad.flatten(0, -2))


@mistake("split_embedding", "other ranks' tokens end up in the first and the last row")
def edges_get_the_rest(tokens, rows, vocabulary, grad):
    return embedding(tokens, rows, *edges(vocabulary), grad, masked_grad=False)


@mistake("split_embedding", "a word that comes twice counts once")
def overwrites(tokens, rows, vocabulary, grad):
    first, end = edges(vocabulary)
    mine = (tokens >= first) & (tokens < end)
    result, gradient = rows.new_zeros(grad.shape), torch.zeros_like(rows)
    result[mine] = rows[tokens[mine] - first]
    dist.all_reduce(result)
    gradient[tokens[mine] - first] += grad[mine]
    return result, gradient


@mistake("split_embedding", "backward sends nothing")
def all_reduces_grad_too(tokens, rows, vocabulary, grad):
    grad = grad / dist.get_world_size()
    dist.all_reduce(grad)
    return embedding(tokens, rows, *edges(vocabulary), grad)


@mistake("split_embedding", "the backward of the sum over ranks is no sum")
def sums_grad(tokens, rows, vocabulary, grad):
    return embedding(tokens, rows, *edges(vocabulary), grad * dist.get_world_size())


@mistake("split_embedding", "it calls all_gather")
def gathers_the_table(tokens, rows, vocabulary, grad):
    most = -(-vocabulary // dist.get_world_size())
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), rows.size(1))])
    tables = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(tables, padded)
    sizes = [len(part) for part in torch.arange(vocabulary).tensor_split(len(tables))]
    table = torch.cat([t[:size] for t, size in zip(tables, sizes, strict=True)])
    first, end = edges(vocabulary)
    whole = torch.zeros_like(table).index_add_(0, tokens.flatten(), grad.flatten(0, -2))
    return table[tokens], whole[first:end]


@mistake("split_embedding", "`tokens` was changed: += and calls ending in _ write into what was given")
def changes_tokens(tokens, rows, vocabulary, grad):
    first, end = edges(vocabulary)
    theirs = (tokens < first) | (tokens >= end)
    tokens -= first
    tokens[theirs] = 0
    result = rows[tokens]
    result[theirs] = 0
    dist.all_reduce(result)
    kept = grad.masked_fill(theirs.unsqueeze(-1), 0)
    return result, torch.zeros_like(rows).index_add_(0, tokens.flatten(), kept.flatten(0, -2))


@mistake("split_embedding", "it returns a Tensor: (result, gradient of rows) is asked for")
def forward_only(tokens, rows, vocabulary, grad):
    return embedding(tokens, rows, *edges(vocabulary), grad)[0]


@right("split_embedding")
def by_autograd(tokens, rows, vocabulary, grad):
    first, end = edges(vocabulary)
    leaf = rows.clone().requires_grad_()
    padded = torch.cat([leaf, leaf.new_zeros(1, leaf.size(1))])
    part = F.embedding(torch.where((tokens >= first) & (tokens < end), tokens - first, len(rows)), padded)
    part.backward(grad)
    result = part.detach()
    dist.all_reduce(result)
    return result, leaf.grad


@mistake("split_embedding", "it works with 4 ranks, but not with 3 (is a 4 written into it?)")
def for_four_ranks(tokens, rows, vocabulary, grad):
    words = torch.arange(vocabulary).tensor_split(4)[dist.get_rank()]
    return embedding(tokens, rows, int(words[0]), int(words[-1]) + 1, grad)


@right("split_embedding")
def as_a_matmul(tokens, rows, vocabulary, grad):
    first, end = edges(vocabulary)
    one_hot = F.one_hot(tokens, vocabulary)[..., first:end].to(rows.dtype)
    result = functional.all_reduce(one_hot @ rows, "sum", dist.group.WORLD).clone()
    return [result, one_hot.flatten(0, -2).T @ grad.flatten(0, -2)]
