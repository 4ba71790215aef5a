"""split_cross_entropy: wrong answers as people write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pardist_lib.mechanisms.tensor_parallel.vocabulary import vocab_parallel_cross_entropy
from tests.lessons.lesson04.shared import edges, me
from tests.lessons.planted import mistake, right


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


@mistake("split_cross_entropy", "`logits` was changed: += and calls ending in _ write into what was given")
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
