"""Wrong answers to the exercises of lesson 04, as people really write them; and right ones that differ."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from planted import mistake, right

from pardist_lib.mechanisms.vocab_parallel import vocab_parallel_cross_entropy


def me():
    return dist.get_rank(), dist.get_world_size()


def edges(vocabulary):
    rank, n = me()
    words = torch.arange(vocabulary).tensor_split(n)[rank]
    return int(words[0]), int(words[-1]) + 1


# ---- heads_of_rank --------------------------------------------------------------------------------------------


@mistake("heads_of_rank", "cannot be shared out equally over 4 ranks: raise ValueError")
def rounds_down(num_heads, num_kv_heads, rank, world_size):
    each, group = num_heads // world_size, num_heads // num_kv_heads
    queries = range(rank * each, (rank + 1) * each)
    return queries, range(queries.start // group, (queries.stop - 1) // group + 1)


@mistake("heads_of_rank", "several ranks need the same one")
def shares_out_both(num_heads, num_kv_heads, rank, world_size):
    if num_heads % world_size:
        raise ValueError
    q, kv = num_heads // world_size, num_kv_heads // world_size
    return range(rank * q, (rank + 1) * q), range(rank * kv, (rank + 1) * kv)


@mistake("heads_of_rank", "it raises ValueError, but 8 heads on 4 ranks are 2 each")
def refuses_shared_kv_heads(num_heads, num_kv_heads, rank, world_size):
    if num_heads % world_size or num_kv_heads % world_size:
        raise ValueError
    q, kv = num_heads // world_size, num_kv_heads // world_size
    return range(rank * q, (rank + 1) * q), range(rank * kv, (rank + 1) * kv)


@mistake("heads_of_rank", "every rank takes all key-value heads")
def all_kv_heads(num_heads, num_kv_heads, rank, world_size):
    if num_heads % world_size:
        raise ValueError
    each = num_heads // world_size
    return range(rank * each, (rank + 1) * each), range(num_kv_heads)


@mistake("heads_of_rank", "counted like query heads, but several query heads share one")
def kv_as_queries(num_heads, num_kv_heads, rank, world_size):
    if num_heads % world_size:
        raise ValueError
    each = num_heads // world_size
    return range(rank * each, (rank + 1) * each), range(rank * each, (rank + 1) * each)


@mistake("heads_of_rank", "the heads are dealt out one by one")
def dealt_out(num_heads, num_kv_heads, rank, world_size):
    return range(rank, num_heads, world_size), range(rank, num_kv_heads, world_size)


@mistake("heads_of_rank", "the stop of a range is not part of it")
def a_head_too_few(num_heads, num_kv_heads, rank, world_size):
    each, group = num_heads // world_size, num_heads // num_kv_heads
    queries = range(rank * each, (rank + 1) * each)
    return queries, range(queries[0] // group, queries[-1] // group)


@mistake("heads_of_rank", "one key-value head too many: query head 1, the last one here, uses head 1")
def a_head_too_many(num_heads, num_kv_heads, rank, world_size):
    if num_heads % world_size:
        raise ValueError
    each, group = num_heads // world_size, num_heads // num_kv_heads
    queries = range(rank * each, (rank + 1) * each)
    return queries, range(queries[0] // group, queries[-1] // group + 2)


@mistake("heads_of_rank", "h // 3, not h % 4: heads that share one stand together")
def by_remainder(num_heads, num_kv_heads, rank, world_size):
    if num_heads % world_size:
        raise ValueError
    each = num_heads // world_size
    queries = range(rank * each, (rank + 1) * each)
    used = sorted({h % num_kv_heads for h in queries})
    return queries, range(used[0], used[-1] + 1)


@mistake("heads_of_rank", "rank is not used")
def rank_forgotten(num_heads, num_kv_heads, rank, world_size):
    return range(num_heads), range(num_kv_heads)


@mistake("heads_of_rank", "two ranges are asked for")
def how_many(num_heads, num_kv_heads, rank, world_size):
    return num_heads // world_size, num_kv_heads // world_size


@mistake("heads_of_rank", "key-value head 1 is used on two ranks")
def kv_heads_divided(num_heads, num_kv_heads, rank, world_size):
    """As many libraries do it, and right as long as no group of query heads lies on two ranks."""
    if num_heads % world_size:
        raise ValueError
    q, kv = num_heads // world_size, max(1, num_kv_heads // world_size)
    first = rank * num_kv_heads // world_size
    return range(rank * q, (rank + 1) * q), range(first, first + kv)


@right("heads_of_rank")
def by_their_kv_heads(num_heads, num_kv_heads, rank, world_size):
    each, rest = divmod(num_heads, world_size)
    if rest:
        raise ValueError(f"{rest} heads left over")
    queries = range(num_heads)[rank * each : (rank + 1) * each]
    used = [h * num_kv_heads // num_heads for h in queries]
    return [queries, range(min(used), max(used) + 1)]


# ---- split_embedding ------------------------------------------------------------------------------------------


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


@mistake("split_embedding", "the input `tokens` was changed")
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


# ---- split_cross_entropy --------------------------------------------------------------------------------------


def cross(logits, target, vocabulary, *, greatest="all", sum_exp=True, sum_wanted=True, mask=True, first=None):
    """(log of the sum of exp, the target's logit, softmax, mine, local), all with the greatest logit taken off."""
    first = edges(vocabulary)[0] if first is None else first
    mine = (target >= first) & (target < first + logits.size(1))
    local = (target - first).clamp(0, logits.size(1) - 1)
    top = logits.amax(1) if greatest else logits.new_zeros(len(target))
    if greatest == "all":
        dist.all_reduce(top, dist.ReduceOp.MAX)
    z = logits - top[:, None]
    total = z.exp().sum(1)
    if sum_exp:
        dist.all_reduce(total)
    wanted = z[torch.arange(len(target)), local] * (mine if mask else 1)
    if sum_wanted:
        dist.all_reduce(wanted)
    return total.log(), wanted, z.exp() / total[:, None], mine, local


def minus_one(softmax, mine, local):
    softmax[torch.arange(len(local)), local] -= mine.to(softmax.dtype)
    return softmax / len(local)


def finished(log_total, wanted, softmax, mine, local):
    return (log_total - wanted).mean(), minus_one(softmax, mine, local)


@mistake("split_cross_entropy", "but not for logits in the thousands: exp of a large logit is infinite")
def overflows(logits, target, vocabulary):
    return finished(*cross(logits, target, vocabulary, greatest=None))


@mistake("split_cross_entropy", "so it is 0, and log(0) infinite")
def log_of_a_probability(logits, target, vocabulary):
    log_total, wanted, softmax, mine, local = cross(logits, target, vocabulary)
    return -(wanted.exp() / log_total.exp()).log().mean(), minus_one(softmax, mine, local)


@mistake("split_cross_entropy", "the loss is a list of one number")
def a_list_of_one(logits, target, vocabulary):
    loss, gradient = finished(*cross(logits, target, vocabulary))
    return loss[None], gradient


@mistake("split_cross_entropy", "the loss is float32, where the logits are float64")
def loss_in_float32(logits, target, vocabulary):
    loss, gradient = finished(*cross(logits, target, vocabulary))
    return loss.float(), gradient


@mistake("split_cross_entropy", "the sums of exp are scaled differently: MAX over the ranks first")
def own_greatest(logits, target, vocabulary):
    return finished(*cross(logits, target, vocabulary, greatest="own"))


@mistake("split_cross_entropy", "the sum of exp goes over this rank's words only")
def own_sum(logits, target, vocabulary):
    return finished(*cross(logits, target, vocabulary, sum_exp=False))


@mistake("split_cross_entropy", "the target's logit is missing where another rank owns it")
def own_target(logits, target, vocabulary):
    return finished(*cross(logits, target, vocabulary, sum_wanted=False))


@mistake("split_cross_entropy", "they have to add 0")
def everybody_has_a_target(logits, target, vocabulary):
    return finished(*cross(logits, target, vocabulary, mask=False))


@mistake("split_cross_entropy", "their mean over the tokens is asked for")
def summed(logits, target, vocabulary):
    log_total, wanted, softmax, mine, local = cross(logits, target, vocabulary)
    return (log_total - wanted).sum(), minus_one(softmax, mine, local) * len(target)


@mistake("split_cross_entropy", "the mean divides it by the number of tokens")
def gradient_of_the_sum(logits, target, vocabulary):
    loss, gradient = finished(*cross(logits, target, vocabulary))
    return loss, gradient * len(target)


@mistake("split_cross_entropy", "only softmax: the gradient has 1 less at the target")
def only_softmax(logits, target, vocabulary):
    log_total, wanted, softmax, mine, local = cross(logits, target, vocabulary)
    return (log_total - wanted).mean(), softmax / len(target)


@mistake("split_cross_entropy", "every rank subtracts 1, also where another one owns the target")
def one_off_everywhere(logits, target, vocabulary):
    log_total, wanted, softmax, mine, local = cross(logits, target, vocabulary)
    return (log_total - wanted).mean(), minus_one(softmax, torch.ones_like(mine), local)


@mistake("split_cross_entropy", "softmax goes over this rank's words only")
def own_softmax(logits, target, vocabulary):
    log_total, wanted, _, mine, local = cross(logits, target, vocabulary)
    return (log_total - wanted).mean(), minus_one(logits.softmax(1), mine, local)


@mistake("split_cross_entropy", "it calls all_gather: all logits would be on every rank")
def gathers_logits(logits, target, vocabulary):
    n = dist.get_world_size()
    most = -(-vocabulary // n)
    padded = F.pad(logits, (0, most - logits.size(1)), value=-1e30)
    parts = [torch.empty_like(padded) for _ in range(n)]
    dist.all_gather(parts, padded)
    sizes = [len(part) for part in torch.arange(vocabulary).tensor_split(n)]
    whole = torch.cat([p[:, :s] for p, s in zip(parts, sizes, strict=True)], 1).requires_grad_()
    loss = F.cross_entropy(whole, target)
    loss.backward()
    first, end = edges(vocabulary)
    return loss.detach(), whole.grad[:, first:end]


@mistake("split_cross_entropy", "more than three numbers a token are sent")
def sums_all_logits(logits, target, vocabulary):
    first, end = edges(vocabulary)
    whole = logits.new_zeros(len(target), vocabulary)
    whole[:, first:end] = logits
    dist.all_reduce(whole)
    whole.requires_grad_()
    loss = F.cross_entropy(whole, target)
    loss.backward()
    return loss.detach(), whole.grad[:, first:end]


@mistake("split_cross_entropy", "it works where 4 divides the vocabulary, but not for 10 words")
def even_words_only(logits, target, vocabulary):
    rank, n = me()
    return finished(*cross(logits, target, vocabulary, first=rank * (vocabulary // n)))


@mistake("split_cross_entropy", "what is taken off the logits comes off the target's, too")
def greatest_forgotten_again(logits, target, vocabulary):
    log_total, wanted, softmax, mine, local = cross(logits, target, vocabulary)
    top = logits.amax(1)
    dist.all_reduce(top, dist.ReduceOp.MAX)
    return (log_total - wanted - top).mean(), minus_one(softmax, mine, local)


@mistake("split_cross_entropy", "one loss for each token")
def one_each(logits, target, vocabulary):
    log_total, wanted, softmax, mine, local = cross(logits, target, vocabulary)
    return log_total - wanted, minus_one(softmax, mine, local)


@mistake("split_cross_entropy", "it calls the course's own `vocab_parallel_cross_entropy`")
def the_courses_own(logits, target, vocabulary):
    logits = logits.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, target, vocab_size=vocabulary)
    loss.backward()
    return loss.detach(), logits.grad


@mistake("split_cross_entropy", "the input `logits` was changed")
def in_place(logits, target, vocabulary):
    top = logits.amax(1)
    dist.all_reduce(top, dist.ReduceOp.MAX)
    logits -= top[:, None]
    first = edges(vocabulary)[0]
    mine = (target >= first) & (target < first + logits.size(1))
    local = (target - first).clamp(0, logits.size(1) - 1)
    total = logits.exp().sum(1)
    dist.all_reduce(total)
    wanted = logits[torch.arange(len(target)), local] * mine
    dist.all_reduce(wanted)
    return finished(total.log(), wanted, logits.exp() / total[:, None], mine, local)


@mistake("split_cross_entropy", "each row has its own greatest")
def one_greatest_for_all_rows(logits, target, vocabulary):
    top = logits.max()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    return finished(*cross(logits - top, target, vocabulary, greatest=None))


@mistake("split_cross_entropy", "a rank's first word is left out: it owns the words from first on, so >=, not >")
def first_word_gets_no_minus_one(logits, target, vocabulary):
    log_total, wanted, softmax, mine, local = cross(logits, target, vocabulary)
    return (log_total - wanted).mean(), minus_one(softmax, mine & (local > 0), local)


@mistake("split_cross_entropy", "so >=, not >")
def first_words_logit_lost(logits, target, vocabulary):
    log_total, wanted, softmax, mine, local = cross(logits, target, vocabulary, sum_wanted=False)
    wanted = wanted * (local > 0)
    dist.all_reduce(wanted)
    return (log_total - wanted).mean(), minus_one(softmax, mine, local)


@right("split_cross_entropy")
def two_numbers_in_one_call(logits, target, vocabulary):
    first, end = edges(vocabulary)
    top = logits.amax(1)
    dist.all_reduce(top, dist.ReduceOp.MAX)
    z = logits - top[:, None]
    one_hot = F.one_hot(target, vocabulary)[:, first:end].to(z.dtype)
    both = torch.stack([z.exp().sum(1), (z * one_hot).sum(1)])
    dist.all_reduce(both)
    return both[0].log().sub(both[1]).mean().item(), (z.exp() / both[0][:, None] - one_hot) / len(target)


@right("split_cross_entropy")
def by_logsumexp(logits, target, vocabulary):
    """The ranks' own log-sum-exps, put together in a stable way."""
    first, end = edges(vocabulary)
    own = logits.logsumexp(1)
    top = own.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    total = (own - top).exp()
    dist.all_reduce(total)
    whole = total.log() + top
    one_hot = F.one_hot(target, vocabulary)[:, first:end].to(logits.dtype)
    wanted = (logits * one_hot).sum(1)
    dist.all_reduce(wanted)
    return (whole - wanted).mean(), ((logits - whole[:, None]).exp() - one_hot) / len(target)


# ---- sequence_parallel_mlp ------------------------------------------------------------------------------------


def gather(part):
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def scatter(whole, op=dist.ReduceOp.SUM):
    parts = [part.contiguous() for part in whole.chunk(dist.get_world_size())]
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter(mine, parts, op)
    return mine


def own_part(whole):
    return whole.chunk(dist.get_world_size())[dist.get_rank()].clone()


def mlp(x, up, down, grad, *, enter=gather, leave=scatter, back=gather, end=scatter, relu=True, masked=True):
    whole_x = enter(x)
    hidden = (whole_x @ up.T).relu() if relu else whole_x @ up.T
    y = leave(hidden @ down.T)
    whole_grad = back(grad)
    grad_hidden = (whole_grad @ down) * (hidden > 0) if masked else whole_grad @ down
    return y, end(grad_hidden @ up), grad_hidden.T @ whole_x, whole_grad.T @ hidden


def add_up_and_cut(whole):
    whole = whole.clone()
    dist.all_reduce(whole)
    return own_part(whole)


@mistake(
    "sequence_parallel_mlp",
    "it calls all_reduce: each rank needs only its positions of the sum, reduce_scatter sends half",
)
def all_reduce_and_cut(x, up, down, grad):
    return mlp(x, up, down, grad, leave=add_up_and_cut, end=add_up_and_cut)


@mistake("sequence_parallel_mlp", "each rank has only its own summand: the sum over the ranks is missing")
def cut_without_a_sum(x, up, down, grad):
    return mlp(x, up, down, grad, leave=own_part)


@mistake("sequence_parallel_mlp", "x was not gathered")
def own_positions_only(x, up, down, grad):
    hidden = (x @ up.T).relu()
    grad_hidden = (grad @ down) * (hidden > 0)
    return hidden @ down.T, grad_hidden @ up, grad_hidden.T @ x, grad.T @ hidden


@mistake("sequence_parallel_mlp", "the ranks' summands are added, not averaged")
def averages(x, up, down, grad):
    return mlp(x, up, down, grad, leave=lambda whole: scatter(whole, dist.ReduceOp.AVG))


@mistake("sequence_parallel_mlp", "the gradient of x has to be summed over the ranks")
def gradient_of_x_not_summed(x, up, down, grad):
    return mlp(x, up, down, grad, end=own_part)


@mistake("sequence_parallel_mlp", "the relu is missing")
def no_relu(x, up, down, grad):
    return mlp(x, up, down, grad, relu=False)


@mistake("sequence_parallel_mlp", "the relu's part is missing")
def no_relu_backward(x, up, down, grad):
    return mlp(x, up, down, grad, masked=False)


@mistake("sequence_parallel_mlp", "it counts this rank's positions only")
def weights_see_own_positions(x, up, down, grad):
    y, grad_x, _, _ = mlp(x, up, down, grad)
    hidden = (x @ up.T).relu()
    return y, grad_x, ((grad @ down) * (hidden > 0)).T @ x, grad.T @ hidden


@mistake("sequence_parallel_mlp", "6 halves of an all-reduce are sent")
def gathers_again(x, up, down, grad):
    y, grad_x, _, grad_down = mlp(x, up, down, grad)
    whole_x = gather(x)
    hidden = (whole_x @ up.T).relu()
    summands = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
    dist.all_gather(summands, grad)
    return y, grad_x, ((torch.cat(summands) @ down) * (hidden > 0)).T @ whole_x, grad_down


@mistake("sequence_parallel_mlp", "x is gathered again in backward")
def gathers_x_twice(x, up, down, grad):
    y = scatter((gather(x) @ up.T).relu() @ down.T)
    whole_x, whole_grad = gather(x), gather(grad)
    hidden = (whole_x @ up.T).relu()
    grad_hidden = (whole_grad @ down) * (hidden > 0)
    return y, scatter(grad_hidden @ up), grad_hidden.T @ whole_x, whole_grad.T @ hidden


@mistake("sequence_parallel_mlp", "hidden > 0, not hidden >= 0")
def zero_is_positive(x, up, down, grad):
    y, _, grad_up, grad_down = mlp(x, up, down, grad)
    return y, scatter(((gather(grad) @ down) * (gather(x) @ up.T >= 0)) @ up), grad_up, grad_down


@mistake("sequence_parallel_mlp", "relu of the gradient")
def relu_of_the_gradient(x, up, down, grad):
    y, _, grad_up, grad_down = mlp(x, up, down, grad)
    return y, scatter((gather(grad) @ down).relu() @ up), grad_up, grad_down


@mistake("sequence_parallel_mlp", "each rank has the whole gradient of its own weights")
def weights_divided(x, up, down, grad):
    y, grad_x, grad_up, grad_down = mlp(x, up, down, grad)
    return y, grad_x, grad_up / dist.get_world_size(), grad_down / dist.get_world_size()


@mistake("sequence_parallel_mlp", "it calls all_reduce for a weight's gradient")
def sums_the_weights_gradients(x, up, down, grad):
    y, grad_x, grad_up, grad_down = mlp(x, up, down, grad)
    dist.all_reduce(grad_up)
    return y, grad_x, grad_up, grad_down


@mistake("sequence_parallel_mlp", "down was multiplied by what is left after it")
def hidden_before_relu(x, up, down, grad):
    y, grad_x, grad_up, _ = mlp(x, up, down, grad)
    return y, grad_x, grad_up, gather(grad).T @ (gather(x) @ up.T)


@mistake("sequence_parallel_mlp", "y has shape")
def stays_whole(x, up, down, grad):
    y, *others = mlp(x, up, down, grad)
    return gather(y), *others


@mistake("sequence_parallel_mlp", "is asked for")
def y_only(x, up, down, grad):
    return scatter((gather(x) @ up.T).relu() @ down.T)


@mistake("sequence_parallel_mlp", "gather x and grad, not weights")
def gathers_weights(x, up, down, grad):
    """Sharded data parallelism: right, and something else."""
    whole_up, whole_down = gather(up), gather(down.T).T
    hidden = (x @ whole_up.T).relu()
    grad_hidden = (grad @ whole_down) * (hidden > 0)
    grad_up, grad_down = grad_hidden.T @ x, hidden.T @ grad
    return hidden @ whole_down.T, grad_hidden @ whole_up, scatter(grad_up), scatter(grad_down).T


def gather_tensor(part):
    whole = part.new_empty(len(part) * dist.get_world_size(), part.size(1))
    dist.all_gather_into_tensor(whole, part)
    return whole


def scatter_tensor(whole):
    mine = whole.new_empty(len(whole) // dist.get_world_size(), whole.size(1))
    dist.reduce_scatter_tensor(mine, whole)
    return mine


@right("sequence_parallel_mlp")
def of_whole_tensors(x, up, down, grad):
    return mlp(x, up, down, grad, enter=gather_tensor, leave=scatter_tensor, back=gather_tensor, end=scatter_tensor)


@right("sequence_parallel_mlp")
def functionally(x, up, down, grad):
    world = dist.group.WORLD
    return mlp(
        x, up, down, grad,
        enter=lambda t: functional.all_gather_tensor(t, 0, world).clone(),
        leave=lambda t: functional.reduce_scatter_tensor(t, "sum", 0, world).clone(),
    )  # fmt: skip


def ring_gather(part):
    rank, n = me()
    parts = [part if r == rank else torch.empty_like(part) for r in range(n)]
    for step in range(n - 1):
        message = dist.isend(parts[(rank - step) % n], (rank + 1) % n)
        dist.recv(parts[(rank - step - 1) % n], (rank - 1) % n)
        message.wait()
    return torch.cat(parts)


def straight_scatter(whole):
    rank, n = me()
    parts = [part.contiguous() for part in whole.chunk(n)]
    arrived = [torch.empty_like(parts[0]) for _ in range(n)]
    messages = [dist.isend(parts[r], r) for r in range(n) if r != rank]
    messages += [dist.irecv(arrived[r], r) for r in range(n) if r != rank]
    for message in messages:
        message.wait()
    return sum(arrived[:rank] + arrived[rank + 1 :], parts[rank])


@right("sequence_parallel_mlp")
def from_send_and_receive(x, up, down, grad):
    ways = {"enter": ring_gather, "leave": straight_scatter, "back": ring_gather, "end": straight_scatter}
    return list(mlp(x, up, down, grad, **ways))
