"""Cross-entropy of split logits; typically a maximum or a sum stays a rank's own, or targets are other ranks' words."""

import math

import torch
import torch.distributed as dist
from torch.nn import functional as F

from ..exercises.cases import F32, F64, call, untouched, values, what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from .shared import parts_of, results

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
    for n, vocabulary, tokens, dtype, scale, new in CASES:
        about = f"{tokens} tokens, {vocabulary} words on {n} ranks, logits up to about {3 * scale}"
        with what_is_new(new):
            seen = run(_cross, vocabulary, tokens, dtype, scale, n=n, about=about)
            logits, target = _inputs(vocabulary, tokens, dtype, scale)
            only_calls(seen, ("all_reduce",), OTHER_CALLS)
            losses, grads = results(seen, ("loss", "gradient"), about)
            untouched(seen, about)
            _judge_loss(losses, grads, logits, target, scale, about)
            _judge_gradient(grads, logits, target, about)
            fair = 3 * tokens * logits.element_size()
            for rank, one in enumerate(seen):
                if (made := sum(call.bytes for call in one.calls)) > fair:
                    why, got = "more than three numbers a token are sent", f"{made} bytes in {len(one.calls)} calls"
                    raise Wrong(f"the results are right, but {why}", f"rank {rank}, {about}", f"{fair} bytes", got)


CASES = [  # ranks, words, tokens, dtype, size of logits, what is new in it
    (4, 8, 6, F64, 1, ""),
    (4, 10, 12, F64, 1, "it works where 4 divides the vocabulary, but not for 10 words"),
    (4, 10, 12, F32, 1000, "it works for small logits, but not for logits in the thousands"),
    (3, 7, 9, F64, 1, "it works with 4 ranks, but not with 3 (is a 4 written into it?)"),
    (2, 5, 5, F32, 30, "it works with 4 ranks, but not with 2 (is a 4 written into it?)"),
]
OTHER_CALLS = {
    "all_gather": "it calls all_gather: all logits would be on every rank, and three numbers a token are enough",
    "": "it calls {op}: all_reduce of one number a token, three times, is all that is needed",
}


def _inputs(vocabulary, tokens, dtype, scale):
    """Logits of every word, and targets in which every word comes."""
    target = torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens)) % vocabulary
    return values((tokens, vocabulary), dtype, vocabulary) * scale, target


def _cross(answer, vocabulary, tokens, dtype, scale):
    logits, target = _inputs(vocabulary, tokens, dtype, scale)
    part = logits.tensor_split(dist.get_world_size(), 1)[dist.get_rank()].clone()
    return call(answer, {"logits": part, "target": target}, vocabulary)


FIRST_WORD = "a rank's first word is left out: it owns the words from first on, so >=, not >"


def _judge_loss(losses, grads, logits, target, scale, about):
    n, (tokens, vocabulary), x, rows = len(losses), logits.shape, logits.double(), torch.arange(len(target))
    parts = parts_of(vocabulary, n)
    local, owned = [x[:, a:b] for a, b in parts], [(target >= a) & (target < b) for a, b in parts]
    wanted, total, greatest, tops = x[rows, target], x.logsumexp(1), x.amax(1), [part.amax(1) for part in local]
    loss = (total - wanted).mean()
    _finite_numbers(losses, grads, loss, logits, scale, about)

    scaled = sum((part - top[:, None]).exp().sum(1) for part, top in zip(local, tops, strict=True)).log()
    owners_top = sum(mine * top for mine, top in zip(owned, tops, strict=True))
    edge = sum(part[rows, (target - a).clamp(0, b - a - 1)] for part, (a, b) in zip(local, parts, strict=True))
    first = (greatest - wanted) * (sum(target == a for a, _ in parts) == 0)
    off = "each token's loss has the greatest logit in it: what is taken off the logits comes off the target's, too"
    own_top = "each rank takes off its own greatest, the sums of exp are scaled differently: MAX over the ranks first"
    own_sum = "the sum of exp goes over this rank's words only: the sum over the ranks is missing"
    no_target = "the target's logit is missing where another rank owns it: it has to be summed over the ranks"
    not_zero = "ranks that do not own the target add a logit, too (at the edge of their shard): they have to add 0"
    mistakes = [
        ("the sum of the losses: their mean over the tokens is asked for", loss * tokens),
        (off, loss - greatest.mean()),
        (off, loss + greatest.mean()),
        (own_top, [(scaled - wanted + top).mean() for top in tops]),
        (own_top, (scaled - wanted + owners_top).mean()),
        (own_sum, [(part.logsumexp(1) - wanted).mean() for part in local]),
        (no_target, [(total - greatest + mine * (greatest - wanted)).mean() for mine in owned]),
        (not_zero, (total - greatest - (edge - n * greatest)).mean()),
        (FIRST_WORD, (total - greatest + first).mean()),
        ("the sign is the wrong way round: -log, not log, of the probability", -loss),
        ("log2 instead of the natural logarithm", loss / math.log(2)),
        (f"the sum over the {n} ranks of a loss that every rank has whole", loss * n),
        (f"divided by {n}: every rank has the whole mean already", loss / n),
    ]
    _same(losses, loss, "the loss", about, mistakes, logits.dtype)


def _finite_numbers(losses, grads, right, logits, scale, about):
    """Make tensors of Python's numbers in `losses`; raise Wrong where one is no finite number of the logits' dtype."""
    for rank, loss in enumerate(losses):
        where = f"rank {rank}, {about}"
        if isinstance(loss, (int, float)) and not isinstance(loss, bool):
            losses[rank] = loss = torch.tensor(float(loss), dtype=logits.dtype)
        if isinstance(loss, torch.Tensor) and loss.shape == (len(logits),):
            raise Wrong("one loss for each token: their mean, one number, is asked for", where)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            continue
        if loss.dim():
            why = "the loss is a list of one number: a number alone has no dimensions"
            raise Wrong(why, where, "shape ()", f"shape {tuple(loss.shape)}")
        if loss.dtype != logits.dtype:
            asked, got = (str(t.dtype)[6:] for t in (logits, loss))
            raise Wrong(f"the loss is {got}, where the logits are {asked}", where, asked, got)
        if not loss.isfinite():
            why = "exp of a large logit is infinite: take the greatest of the row off first"
            if not loss.isnan() and scale < 100:
                why = "the loss is infinite"
            elif loss == torch.inf and isinstance(grads[rank], torch.Tensor) and grads[rank].isfinite().all():
                why = "the probability of a far target is too small for any number, so it is 0, and log(0) infinite: "
                why += "the loss is log(total) - (target's logit - greatest), without a probability in between"
            elif loss == -torch.inf:
                why = "the sum of exp is 0: what was taken off is no logit of this row; each row has its own greatest"
            raise Wrong(why, where, f"{right:.6g}", f"{loss}")


def _judge_gradient(grads, logits, target, about):
    n, (tokens, vocabulary), x = len(grads), logits.shape, logits.double()
    parts, softmax, one = parts_of(vocabulary, n), x.softmax(1), F.one_hot(target, vocabulary).double()
    right = [((softmax - one) / tokens)[:, a:b] for a, b in parts]

    def minus_one(place, mine=lambda a, b: torch.ones(tokens)):
        """The ranks' gradients where 1 is subtracted in another column, or for other tokens."""
        for a, b in parts:
            g = softmax[:, a:b].clone()
            g[torch.arange(tokens), place(a, b)] -= mine(a, b).double()
            yield g / tokens

    def nearest(a, b):
        return (target - a).clamp(0, b - a - 1)

    first = minus_one(nearest, lambda a, b: (target > a) & (target < b))
    own = [(x[:, a:b].softmax(1) - one[:, a:b]) / tokens for a, b in parts]
    everywhere, summed = "every rank subtracts 1, also where another one owns the target", "that of the summed loss"
    mistakes = [
        (f"the gradient is {summed}: the mean divides it by the number of tokens", [g * tokens for g in right]),
        ("only softmax: the gradient has 1 less at the target", [softmax[:, a:b] / tokens for a, b in parts]),
        (FIRST_WORD, [*first]),
        ("softmax goes over this rank's words only: divide by the sum over all ranks", own),
        (everywhere, [*minus_one(nearest)]),
        (everywhere, [*minus_one(lambda a, b: (target - a) * ((target >= a) & (target < b)))]),
        ("the gradient has the wrong sign: softmax minus 1 at the target", [-g for g in right]),
        (f"divided by {n}: nothing is averaged over the ranks", [g / n for g in right]),
        (f"{n} times too large: each rank has its whole gradient already", [g * n for g in right]),
    ]
    _same(grads, right, "the gradient", about, mistakes, logits.dtype)


def _same(got, expected, what, about, mistakes, dtype):
    """`same`, for what was found in float64."""

    def cast(would):
        return [t.to(dtype) for t in would] if isinstance(would, list) else would.to(dtype)

    same(got, cast(expected), what, about, [(why, cast(would)) for why, would in mistakes])


why = (
    "A softmax needs of the others only the greatest logit and the sum of exponentials, and the loss the "
    "target's logit: three numbers a token. Megatron's vocab_parallel_cross_entropy sends these three, and "
    "keeps the softmax for backward."
)
exercise = Exercise(hints, check, minutes=20, level="hard", why=why)
