"""The exercise split_cross_entropy."""

import torch
import torch.distributed as dist

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from .shared import F32, F64, call_answer, parts_of, random, results, told

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
            raise told(wrong, known, notable) from None
        known |= {text for text, holds in notable.items() if holds} | {"the first case"}


def _cross_case(vocabulary, tokens, dtype, scale):
    """Logits of every word, and targets in which every word comes."""
    logits = random((tokens, vocabulary), dtype, vocabulary) * scale
    return logits, torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens)) % vocabulary


def _cross(answer, vocabulary, tokens, dtype, scale):
    logits, target = _cross_case(vocabulary, tokens, dtype, scale)
    part = logits.tensor_split(dist.get_world_size(), 1)[dist.get_rank()].clone()
    return call_answer(answer, part, target, vocabulary)


def _judge_cross(seen, vocabulary, tokens, dtype, scale, about):
    n = len(seen)
    logits, target = _cross_case(vocabulary, tokens, dtype, scale)
    x = logits.double()
    parts, rows = parts_of(vocabulary, n), torch.arange(tokens)
    only_calls(seen, ("all_reduce",), {
        "all_gather": "it calls all_gather: all logits would be on every rank, and three numbers a token are enough",
        "": "it calls {op}: all_reduce of one number a token, three times, is all that is needed",
    })  # fmt: skip
    losses, grads = results(seen, 2, ("loss", "gradient"), ("logits", "target", "vocabulary"), about)

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


exercise = Exercise(hints, check)
