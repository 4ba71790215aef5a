"""The exercises of lesson 04: hints, and how an answer is checked."""

import torch
import torch.distributed as dist

from .judge import Wrong, only_calls, same, type_of
from .watch import watched

F32, F64 = torch.float32, torch.float64


def _random(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def _parts(length, n):
    """[(first, after the last)] of what torch.tensor_split cuts."""
    edges = [0]
    for part in torch.arange(length).tensor_split(n):
        edges.append(edges[-1] + len(part))
    return list(zip(edges, edges[1:], strict=False))


def _call(answer, *given):
    """On a rank: call the answer, and keep which of the tensors it was given it has changed."""
    before = [g.clone() if isinstance(g, torch.Tensor) else g for g in given]
    seen = watched(answer, *given)
    changed = [i for i, (g, b) in enumerate(zip(given, before, strict=True))
               if isinstance(g, torch.Tensor) and not (g.shape == b.shape and torch.equal(g, b))]  # fmt: skip
    seen.kept = {"changed": changed}
    return seen


def _results(seen, count, names, given, about):
    """[each rank's results] with `count` in each; Raises Wrong for another number, or where an input was changed."""
    for rank, one in enumerate(seen):
        result = one.result
        if not isinstance(result, (tuple, list)) or len(result) != count:
            many = f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
            asked = f"({', '.join(names)})"
            raise Wrong(f"it returns a {type_of(result)}{many}: {asked} is asked for", f"rank {rank}, {about}")
        for i in one.kept["changed"]:
            raise Wrong(f"the input `{given[i]}` was changed: work on a copy of it", f"rank {rank}, {about}")
    return [[one.result[i] for one in seen] for i in range(count)]


def _told(wrong, known, notable):
    """Say what is new in the first case that fails: `notable` {text: whether it holds}, `known` those seen before."""
    new = [text for text, holds in notable.items() if holds and text not in known]
    if known and len(new) == 1:
        wrong.diagnosis = f"{new[0]}: {wrong.diagnosis}"
    return wrong


# ---- which heads ----------------------------------------------------------------------------------------------


class heads_of_rank:
    hints = (
        "With equally many heads on each rank, where does rank r begin? What if the division leaves a remainder?",
        "Query head h uses key-value head h // (num_heads // num_kv_heads). Which ones do the first and the last of a "
        "rank's query heads use?",
        "From the key-value head of the first query head to that of the last one: range(first // group, last // group "
        "+ 1), where group = num_heads // num_kv_heads. There may be one key-value head for several ranks.",
    )

    @staticmethod
    def check(run):
        cases = [(8, 8, 4), (12, 4, 4), (12, 12, 3), (8, 2, 4), (12, 3, 2), (6, 2, 6), (16, 1, 4), (4, 2, 1)]
        [seen] = run(_all_heads, cases, n=1)
        for case, ranks in zip(cases, seen.result, strict=True):
            for rank, got in enumerate(ranks):
                _judge_heads(*case, rank, got, _by_remainder(*case, ranks))
        [seen] = run(_all_heads, [(5, 5, 4), (6, 2, 4), (3, 3, 4)], n=1)
        for (heads, kv, n), ranks in zip([(5, 5, 4), (6, 2, 4), (3, 3, 4)], seen.result, strict=True):
            for rank, got in enumerate(ranks):
                if got != "ValueError":
                    raise Wrong(
                        f"{heads} heads cannot be shared out equally over {n} ranks: raise ValueError, or heads are "
                        "lost or computed twice", f"heads_of_rank({heads}, {kv}, {rank}, {n})", "ValueError", f"{got}",
                    )  # fmt: skip


def _all_heads(answer, cases):
    def one(*case):
        try:
            return answer(*case)
        except ValueError:
            return "ValueError"

    return watched(lambda: [[one(heads, kv, rank, n) for rank in range(n)] for heads, kv, n in cases])


def _by_remainder(heads, kv, n, ranks):
    """Whether the ranks' key-value heads are those of h % kv: right nowhere but by chance."""
    used = [sorted({h % kv for h in range(r * heads // n, (r + 1) * heads // n)}) for r in range(n)]
    pairs = [got for got in ranks if isinstance(got, (tuple, list)) and len(got) == 2 and isinstance(got[1], range)]
    return len(pairs) == n > 1 and [list(got[1]) for got in pairs] == [list(range(u[0], u[-1] + 1)) for u in used]


def _judge_heads(heads, kv, n, rank, got, by_remainder):
    each, group = heads // n, heads // kv
    queries = range(rank * each, (rank + 1) * each)
    wanted = queries, range(queries[0] // group, queries[-1] // group + 1)
    where = f"heads_of_rank({heads}, {kv}, {rank}, {n})"
    shown = {"expected": f"{wanted}", "got": f"{got}"}
    if got == "ValueError":
        raise Wrong(f"it raises ValueError, but {heads} heads on {n} ranks are {each} each", where, **shown)
    if not isinstance(got, (tuple, list)) or len(got) != 2 or not all(isinstance(g, range) for g in got):
        raise Wrong("two ranges are asked for: (query heads, key-value heads)", where, **shown)
    if list(got[0]) != list(queries):
        if list(got[0]) == list(range(rank, heads, n)):
            why = "the heads are dealt out one by one: a rank takes heads that follow each other, rank 0 the first ones"
        elif list(got[0]) == list(range(heads)):
            why = "every rank takes all heads: rank is not used"
        elif len(got[0]) in (each - 1, each + 1):
            why = f"{len(got[0])} query heads, where {each} are asked for: the stop of a range is not part of it"
        else:
            why = f"rank {rank} of {n} takes {each} of {heads} query heads, from {rank} · {each} on"
        raise Wrong(why, where, **shown)
    if list(got[1]) != list(wanted[1]):
        share = range(rank * kv // n, (rank + 1) * kv // n)
        if by_remainder and kv > 1:
            why = f"query head h uses key-value head h // {group}, not h % {kv}: heads that share one stand together"
        elif list(got[1]) == list(range(kv)):
            why = "every rank takes all key-value heads: only those that its query heads use are asked for"
        elif list(got[1]) == list(queries):
            why = "the key-value heads are counted like query heads, but several query heads share one"
        elif kv < n and (len(got[1]) == 0 or list(got[1]) == list(share)):
            why = f"{kv} key-value heads for {n} ranks: several ranks need the same one, so they cannot be shared out"
        elif list(got[1]) == list(wanted[1])[:-1] and (queries[-1] + 1) % group:
            why = f"key-value head {wanted[1][-1]} is used on two ranks: query head {queries[-1]} uses it, too"
        elif list(got[1]) == list(range(wanted[1][0], wanted[1][-1] + 2)):
            why = f"one key-value head too many: query head {queries[-1]}, the last one here, uses head {wanted[1][-1]}"
        elif list(got[1]) == list(range(wanted[1][0], wanted[1][-1])):
            why = "the last key-value head is missing: the stop of a range is not part of it"
        else:
            why = f"query head h uses key-value head h // {group}, so {_spoken(queries)} use {_spoken(wanted[1])}"
        raise Wrong(why, where, **shown)


def _spoken(heads):
    return f"head {heads[0]}" if len(heads) == 1 else f"heads {heads[0]} to {heads[-1]}"


# ---- embedding ------------------------------------------------------------------------------------------------


class split_embedding:
    hints = (
        "Which words does this rank own? torch.arange(vocabulary).tensor_split(n)[rank] says it; its first one is "
        "where rows begins.",
        "mine = (tokens >= first) & (tokens < first + len(rows)). Start with zeros, fill in the rows of the tokens "
        "that are mine, at tokens - first; then the sum over the ranks has every row once.",
        "Backward, each rank adds grad to the rows of its own tokens and sends nothing: "
        "gradient.index_add_(0, (tokens - first)[mine], grad[mine]) also counts a word that comes twice.",
    )

    @staticmethod
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
                raise _told(wrong, known, notable) from None
            known |= {text for text, holds in notable.items() if holds} | {"the first case"}


def _embedding_case(vocabulary, shape, dtype):
    """(tokens with every word at least once where there is room, table, grad)"""
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    many = torch.Size(shape).numel()
    tokens = order.repeat(-(-many // vocabulary))[:many].view(shape)
    return tokens, _random((vocabulary, 3), dtype, 1), _random((*shape, 3), dtype, 2)


def _embed(answer, vocabulary, shape, dtype):
    tokens, table, grad = _embedding_case(vocabulary, shape, dtype)
    rows = table.tensor_split(dist.get_world_size())[dist.get_rank()].clone()
    return _call(answer, tokens, rows, vocabulary, grad)


def _judge_embedding(seen, vocabulary, shape, dtype, about):
    n = len(seen)
    tokens, table, grad = _embedding_case(vocabulary, shape, dtype)
    parts = _parts(vocabulary, n)
    only_calls(seen, ("all_reduce",), {
        "all_gather": "it calls all_gather: whole tables or results travel, where the sum of one row and zeros does",
        "": "it calls {op}: one all_reduce of the result is all that is needed",
    })  # fmt: skip
    names = ("result", "gradient of rows")
    got, got_grad = _results(seen, 2, names, ("tokens", "rows", "vocabulary", "grad"), about)

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


# ---- cross-entropy --------------------------------------------------------------------------------------------


class split_cross_entropy:
    hints = (
        "Three things of a row are needed, and each is one number a token: its greatest logit, the sum of exp(logit - "
        "greatest), and the target's logit. Each rank has a part of the first two; one rank has the third.",
        "all_reduce the greatest with dist.ReduceOp.MAX first, and take it off everywhere: else exp overflows, or "
        "ranks add up numbers that are scaled differently.",
        "The loss of a token is log(total) - (target's logit - greatest), where total is the all-reduced sum. Ranks "
        "that do not own the target add 0.",
        "The gradient is (softmax - 1 at the target) / tokens. softmax needs total, which every rank has: nothing is "
        "sent backward. Only the owner of the target subtracts 1.",
    )

    @staticmethod
    def check(run):
        known = set()
        for n, vocabulary, tokens, dtype, scale in [
            (4, 8, 6, F64, 1), (4, 10, 12, F64, 1), (4, 10, 12, F32, 1000), (3, 7, 9, F64, 1), (2, 5, 5, F32, 30),
        ]:  # fmt: skip
            notable = {
                f"it works where {n} divides the vocabulary, but not for {vocabulary} words": vocabulary % n
                and not any("divides the vocabulary" in text for text in known),
                "it works for small logits, but not for logits in the thousands": scale == 1000,
                f"it works with 4 ranks, but not with {n} (is a 4 written into it?)": n != 4,
            }
            about = f"{tokens} tokens, {vocabulary} words on {n} ranks, logits up to about {3 * scale}"
            try:
                seen = run(_cross, vocabulary, tokens, dtype, scale, n=n, about=about)
                _judge_cross(seen, vocabulary, tokens, dtype, scale, about)
            except Wrong as wrong:
                raise _told(wrong, known, notable) from None
            known |= {text for text, holds in notable.items() if holds} | {"the first case"}


def _cross_case(vocabulary, tokens, dtype, scale):
    """Logits of every word, and targets in which every word comes."""
    logits = _random((tokens, vocabulary), dtype, vocabulary) * scale
    return logits, torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens)) % vocabulary


def _cross(answer, vocabulary, tokens, dtype, scale):
    logits, target = _cross_case(vocabulary, tokens, dtype, scale)
    part = logits.tensor_split(dist.get_world_size(), 1)[dist.get_rank()].clone()
    return _call(answer, part, target, vocabulary)


def _judge_cross(seen, vocabulary, tokens, dtype, scale, about):
    n = len(seen)
    logits, target = _cross_case(vocabulary, tokens, dtype, scale)
    x = logits.double()
    parts, rows = _parts(vocabulary, n), torch.arange(tokens)
    only_calls(seen, ("all_reduce",), {
        "all_gather": "it calls all_gather: all logits would be on every rank, and three numbers a token are enough",
        "": "it calls {op}: all_reduce of one number a token, three times, is all that is needed",
    })  # fmt: skip
    losses, grads = _results(seen, 2, ("loss", "gradient"), ("logits", "target", "vocabulary"), about)

    local = [x[:, a:b] for a, b in parts]
    wanted, whole = x[rows, target], x.logsumexp(1)
    greatest, tops = x.amax(1), [part.amax(1) for part in local]
    scaled = sum((part - top[:, None]).exp().sum(1) for part, top in zip(local, tops, strict=True))  # each by its own
    owner = sum(((target >= a) & (target < b)) * top for (a, b), top in zip(parts, tops, strict=True))
    edge = sum(part[rows, (target - a).clamp(0, b - a - 1)] for part, (a, b) in zip(local, parts, strict=True))
    each = (whole - wanted).mean()
    loss_mistakes = [
        ("the sum of the losses: their mean over the tokens is asked for", [each * tokens] * n),
        ("each token's loss has the greatest logit in it: what is taken off the logits comes off the target's, too",
         [(whole - greatest - wanted).mean()] * n),
        ("each token's loss has the greatest logit in it: what is taken off the logits comes off the target's, too",
         [(whole - wanted + greatest).mean()] * n),
        ("every rank takes off its own greatest logit, so the sums of exp are scaled differently: MAX over the ranks "
         "first", [(scaled.log() - wanted + top).mean() for top in tops]),
        ("every rank takes off its own greatest logit, so the sums of exp are scaled differently: MAX over the ranks "
         "first", [(scaled.log() - wanted + owner).mean()] * n),
        ("the sum of exp goes over this rank's words only: the sum over the ranks is missing",
         [(part.logsumexp(1) - wanted).mean() for part in local]),
        ("the target's logit is missing where another rank owns it: it has to be summed over the ranks",
         [(whole - greatest - ((target >= a) & (target < b)) * (wanted - greatest)).mean() for a, b in parts]),
        ("ranks that do not own the target add a logit, too (at the edge of their shard): they have to add 0",
         [(whole - greatest - (edge - n * greatest)).mean()] * n),
        ("a rank's first word is left out: it owns the words from first on, so >=, not >",
         [(whole - greatest - sum(target != a for a, _ in parts).eq(n) * (wanted - greatest)).mean()] * n),
        ("the sign is the wrong way round: -log, not log, of the probability", [-each] * n),
        ("log2 instead of the natural logarithm", [each / torch.tensor(2.0).double().log()] * n),
        (f"the sum over the {n} ranks of a loss that every rank has whole", [each * n] * n),
        (f"divided by {n}: every rank has the whole mean already", [each / n] * n),
    ]  # fmt: skip
    for rank, loss in enumerate(losses):
        if isinstance(loss, (int, float)) and not isinstance(loss, bool):
            losses[rank] = torch.tensor(float(loss), dtype=dtype)  # a number is a number
        if isinstance(losses[rank], torch.Tensor) and losses[rank].numel() == 1:
            where, names = f"rank {rank}, {about}", [str(t)[6:] for t in (dtype, losses[rank].dtype)]
            if losses[rank].dim():
                shown = "shape ()", f"shape {tuple(losses[rank].shape)}"
                raise Wrong("the loss is a list of one number: a number alone has no dimensions", where, *shown)
            if losses[rank].dtype != dtype:
                raise Wrong(f"the loss is {names[1]}, where the logits are {names[0]}", where, *names)
            if not losses[rank].isfinite():
                why = "exp of a large logit is infinite: take the greatest of the row off first"
                if losses[rank] == -torch.inf:
                    why = (
                        "the sum of exp is 0: what was taken off is no logit of this row; each row has its own greatest"
                    )
                if not losses[rank].isnan() and scale < 100:
                    why = "the loss is infinite"
                elif (
                    losses[rank] == torch.inf and isinstance(grads[rank], torch.Tensor) and grads[rank].isfinite().all()
                ):
                    why = (
                        "the probability of a far target is too small for any number, so it is 0, and log(0) infinite: "
                    )
                    why += "the loss is log(total) - (target's logit - greatest), without a probability in between"
                raise Wrong(why, f"rank {rank}, {about}", f"{each:.6g}", f"{losses[rank]}")
        elif isinstance(loss, torch.Tensor) and loss.shape == (tokens,):
            raise Wrong("one loss for each token: their mean, one number, is asked for", f"rank {rank}, {about}")
    same(losses, [each.to(dtype)] * n, "the loss", about, _as(loss_mistakes, dtype))

    softmax = x.softmax(1)
    one = torch.zeros_like(x)
    one[rows, target] = 1
    right = [((softmax - one) / tokens)[:, a:b] for a, b in parts]

    def at_the_edge(a, b):
        g = softmax[:, a:b].clone()
        g[rows, (target - a).clamp(0, b - a - 1)] -= 1
        return g / tokens

    def without_the_first(a, b):
        g = softmax[:, a:b] - one[:, a:b]
        g[target == a, 0] += 1
        return g / tokens

    def in_column_0(a, b):
        g, inside = softmax[:, a:b].clone(), (target >= a) & (target < b)
        g[rows, (target - a) * inside] -= 1
        return g / tokens

    grad_mistakes = [
        ("the gradient is that of the summed loss: the mean divides it by the number of tokens",
         [g * tokens for g in right]),
        ("only softmax: the gradient has 1 less at the target", [softmax[:, a:b] / tokens for a, b in parts]),
        ("a rank's first word is left out: it owns the words from first on, so >=, not >",
         [without_the_first(a, b) for a, b in parts]),
        ("softmax goes over this rank's words only: divide by the sum over all ranks",
         [(part.softmax(1) - one[:, a:b]) / tokens for part, (a, b) in zip(local, parts, strict=True)]),
        ("every rank subtracts 1, also where another one owns the target", [at_the_edge(a, b) for a, b in parts]),
        ("every rank subtracts 1, also where another one owns the target", [in_column_0(a, b) for a, b in parts]),
        ("the gradient has the wrong sign: softmax minus 1 at the target", [-g for g in right]),
        (f"divided by {n}: nothing is averaged over the ranks", [g / n for g in right]),
        (f"{n} times too large: each rank has its whole gradient already", [g * n for g in right]),
    ]  # fmt: skip
    same(grads, [g.to(dtype) for g in right], "the gradient", about, _as(grad_mistakes, dtype))
    fair = 3 * tokens * logits.element_size()
    for rank, one_rank in enumerate(seen):
        made = [call.bytes for call in one_rank.calls]
        if sum(made) > fair:
            why = "the results are right, but more than three numbers a token are sent"
            raise Wrong(why, f"rank {rank}, {about}", f"{fair} bytes", f"{sum(made)} bytes in {len(made)} calls")


def _as(mistakes, dtype):
    return [(why, [value.to(dtype) for value in would]) for why, would in mistakes]


# ---- sequence parallelism -------------------------------------------------------------------------------------


class sequence_parallel_mlp:
    hints = (
        "First gather: every rank needs all positions, because it has only some of the hidden features of each. "
        "dist.all_gather fills a list of n tensors; torch.cat puts them together.",
        "hidden @ down.T is, for all positions, this rank's summand. dist.reduce_scatter(mine, list(whole.chunk(n))) "
        "adds up and leaves each rank its positions: half of an all-reduce.",
        "Backward is the mirror image: gather grad (reduce-scatter's mirror), then grad_hidden = (whole_grad @ down) * "
        "(hidden > 0), then reduce-scatter grad_hidden @ up (the gather's mirror).",
        "The gradients of up and down are this rank's own and are not sent: grad_hidden.T @ whole_x and whole_grad.T @ "
        "hidden, with all positions in them. Keep whole_x: gathering it again costs a fifth message.",
    )

    @staticmethod
    def check(run):
        known = set()
        for n, each, width, hidden, dtype in [
            (4, 2, 3, 2, F64),
            (4, 3, 5, 4, F32),
            (3, 2, 4, 3, F64),
            (2, 5, 3, 1, F32),
        ]:
            notable = {f"it works with 4 ranks, but not with {n} (is a 4 written into it?)": n != 4}
            about = f"{n} ranks with {each} positions and {hidden} hidden features each, width {width}"
            try:
                seen = run(_mlp, each, width, hidden, dtype, n=n, about=about)
                _judge_mlp(seen, each, width, hidden, dtype, about)
            except Wrong as wrong:
                raise _told(wrong, known, notable) from None
            known |= {text for text, holds in notable.items() if holds} | {"the first case"}


def _mlp_case(n, each, width, hidden, dtype):
    """Whole (x, up, down, grad)."""
    shapes = (n * each, width), (n * hidden, width), (width, n * hidden), (n * each, width)
    x, *others = [_random(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    x[-1] = 0  # padding, say: relu's input is exactly 0 there
    return [x, *others]


def _mlp(answer, each, width, hidden, dtype):
    n, rank = dist.get_world_size(), dist.get_rank()
    x, up, down, grad = _mlp_case(n, each, width, hidden, dtype)
    parts = [t.chunk(n, dim)[rank].clone() for t, dim in ((x, 0), (up, 0), (down, 1), (grad, 0))]
    seen = _call(answer, *parts)
    scatters = sum(call.op == "reduce_scatter" for call in seen.calls)
    if seen.hidden in [k * (n - 1) for k in range(scatters + 1)]:
        seen.hidden = 0  # gloo makes n calls of one dist.reduce_scatter: it is not hiding anything
    return seen


def _judge_mlp(seen, each, width, hidden, dtype, about):
    n = len(seen)
    x, up, down, grad = _mlp_case(n, each, width, hidden, dtype)
    ups, downs, xs, grads = up.chunk(n), down.chunk(n, 1), x.chunk(n), grad.chunk(n)
    _only_halves(seen, up.numel() // n * up.element_size())
    names = ("y", "gradient of x", "gradient of up", "gradient of down")
    got_y, got_x, got_up, got_down = _results(seen, 4, names, ("x", "up", "down", "grad"), about)

    h = [(x @ u.T).relu() for u in ups]
    summands = [hr @ d.T for hr, d in zip(h, downs, strict=True)]
    y, talked = sum(summands), any(one.calls for one in seen)
    mistakes = [
        ("each rank has only its own summand: the sum over the ranks is missing" if talked else
         "x was not gathered, and nothing is sent: each rank put only its own positions through its own features",
         [s.chunk(n)[r] for r, s in enumerate(summands)]),
        (f"divided by {n}: the ranks' summands are added, not averaged", list((y / n).chunk(n))),
        ("the relu is missing", list(sum(x @ u.T @ d.T for u, d in zip(ups, downs, strict=True)).chunk(n))),
        ("every rank has the first rank's positions", [y.chunk(n)[0]] * n),
        ("the parts of x are put together in another order than that of the ranks",
         [y.roll(each * r, 0).chunk(n)[0] for r in range(n)]),
    ]  # fmt: skip
    same(got_y, list(y.chunk(n)), "y", about, mistakes)

    gh = [(grad @ d) * (hr > 0) for hr, d in zip(h, downs, strict=True)]
    back = [g @ u for g, u in zip(gh, ups, strict=True)]
    mistakes = [
        ("each rank has only what its own features give: the gradient of x has to be summed over the ranks",
         [b.chunk(n)[r] for r, b in enumerate(back)]),
        ("the relu's part is missing: the gradient is zero where hidden is",
         list(sum(grad @ d @ u for d, u in zip(downs, ups, strict=True)).chunk(n))),
        ("where relu's input is 0 its gradient is 0: hidden > 0, not hidden >= 0",
         list(sum(((grad @ d) * (x @ u.T >= 0)) @ u for d, u in zip(downs, ups, strict=True)).chunk(n))),
        ("relu of the gradient: it has to be zero where hidden is, whatever its own sign",
         list(sum((grad @ d).relu() @ u for d, u in zip(downs, ups, strict=True)).chunk(n))),
        (f"divided by {n}: the ranks' parts are added, not averaged", list((sum(back) / n).chunk(n))),
    ]  # fmt: skip
    same(got_x, list(sum(back).chunk(n)), "the gradient of x", about, mistakes)

    right_up = [g.T @ x for g in gh]
    mistakes = [
        ("it counts this rank's positions only: each weight has worked on all positions",
         [gh[r].chunk(n)[r].T @ xs[r] for r in range(n)]),
        ("the gradients of up are added up over the ranks: each rank has other rows of up", [sum(right_up)] * n),
        (f"divided by {n}: each rank has the whole gradient of its own weights", [g / n for g in right_up]),
        ("the relu's part is missing: the gradient is zero where hidden is",
         [(grad @ d).T @ x for d in downs]),
    ]  # fmt: skip
    same(got_up, right_up, "the gradient of up", about, mistakes)
    right_down = [grad.T @ hr for hr in h]
    mistakes = [
        ("it counts this rank's positions only: each weight has worked on all positions",
         [grads[r].T @ h[r].chunk(n)[r] for r in range(n)]),
        ("the gradients of down are added up over the ranks: each rank has other columns of down",
         [sum(right_down)] * n),
        (f"divided by {n}: each rank has the whole gradient of its own weights", [g / n for g in right_down]),
        ("hidden before the relu: down was multiplied by what is left after it",
         [grad.T @ (x @ u.T) for u in ups]),
    ]  # fmt: skip
    same(got_down, right_down, "the gradient of down", about, mistakes)
    _judge_halves(seen, n, x.numel() * x.element_size(), about)


_GATHER, _SCATTER = ("all_gather", "all_gather_into_tensor"), ("reduce_scatter", "reduce_scatter_tensor")


def _only_halves(seen, weights):
    """weights: bytes of a rank's part of up."""
    reduced = {call.bytes for one in seen for call in one.calls if call.op == "all_reduce"}
    only_calls(seen, (*_GATHER, *_SCATTER, "send", "recv"), {
        "all_reduce": "it calls all_reduce for a weight's gradient: that is whole already, and no other rank needs it"
        if reduced == {weights} else
        "it calls all_reduce: each rank needs only its positions of the sum, reduce_scatter sends half",
        "broadcast": "it calls broadcast: all_gather brings every rank's part to all in one call",
        "": "it calls {op}: all_gather and reduce_scatter are all that is needed",
    })  # fmt: skip


def _judge_halves(seen, n, size, about):
    """Raise Wrong unless a rank sends four halves of an all-reduce: 4·(n − 1)/n·S."""
    for rank, one in enumerate(seen):
        gathers = [call for call in one.calls if call.op in _GATHER]
        scatters = [call for call in one.calls if call.op in _SCATTER]
        halves = len(gathers) + len(scatters)
        if any(call.bytes not in (size, size // n) for call in gathers + scatters):
            why = "the results are right, but what travels is not the size of x: gather x and grad, not weights"
            got = ", ".join(f"{call.op} of {call.bytes} bytes" for call in gathers + scatters)
            raise Wrong(why, f"rank {rank}, {about}", f"{size} bytes, or a rank's {size // n}", got)
        by_hand = sum(call.bytes for call in one.calls if call.op == "send")
        sent = halves * (n - 1) / n * size + by_hand
        fair = 4 * (n - 1) / n * size
        if sent > fair * 1.001:
            why = f"the results are right, but {sent / fair * 4:.3g} halves of an all-reduce are sent"
            if halves == 5 and len(gathers) == 3:
                why += ": x is gathered again in backward, where whole_x could have been kept"
            else:
                why += ", where 4 are enough: gather x, scatter y, gather grad, scatter its gradient"
            raise Wrong(why, f"rank {rank}, {about}", f"{fair:,.0f} bytes", f"{sent:,.0f} bytes")
