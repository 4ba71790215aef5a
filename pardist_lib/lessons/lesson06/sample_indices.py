"""Samples shuffled and dealt out. Typical: the rank in the seed, the epoch not in it, some repeated or dropped."""

import random
import sys
from collections import Counter
from itertools import pairwise

import torch
import torch.distributed as dist

from ..exercises.cases import what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls
from ..exercises.watch import Other, told, watched

hints = (
    "If all ranks shuffle all samples in the same way, each can take its own part of the same order.",
    "torch.randperm(length, generator=torch.Generator().manual_seed(…)) gives the same order on every rank, and "
    "leaves the global random numbers alone. What has to be in the seed, and what must not?",
    "order[rank::n] takes every n-th one: some ranks get one more, none gets one twice.",
)
# length, n, epoch, seed
CASES = [(12, 4, 0, 0), (12, 4, 1, 0), (10, 4, 0, 0), (7, 3, 2, 5), (5, 5, 0, 0), (6, 1, 3, 1)]
CASES += [(40, 2, epoch, seed) for epoch, seed in ((0, 0), (1, 0), (2, 0), (0, 9), (1, 9))]


def check(run):
    seen = run(_sampled)
    only_calls(seen, (), {"": "it calls {op}: every rank can work out its part without asking"})
    dealt = seen[0].kept["dealt"]
    for case, (lists, again) in dealt.items():
        with what_is_new("it works with 4 ranks, but not with 3 (is a 4 written into it?)" * (case[1] == 3)):
            _judge_deal(*case, lists, again)
    for rank, one in enumerate(seen):
        if one.kept["dealt"] != dealt:
            why = "what it gives differs from process to process: nothing but the arguments may go into the seed"
            raise Wrong(why, f"rank {rank} against rank 0, called with the same arguments")
    _judge_orders({case[2:]: lists for case, (lists, _) in dealt.items() if case[0] == 40}, seen[0].kept["elsewhere"])
    if touched := seen[0].kept["touched"]:
        why = f"it changes {touched} own random numbers (seeds them, or draws from them)"
        raise Wrong(f"{why}: give the shuffle a generator of its own")


def _sampled(answer):
    numpy = sys.modules.get("numpy")

    def states():
        numpys = repr(numpy.random.get_state()) if numpy else ""
        return {"torch's": torch.get_rng_state().tolist(), "Python's": random.getstate(), "numpy's": numpys}

    def all_ranks(length, n, epoch, seed):
        return [_as_list(told(answer, length, rank, n, epoch, seed)) for rank in range(n)]

    def elsewhere():  # as in another process, where texts have other hashes
        names = getattr(answer, "__globals__", {})
        names["hash"], own = lambda value: hash(value) + _has_text(value), names.get("hash")
        try:
            return all_ranks(40, 2, 0, 0)
        finally:
            names["hash"] = own or hash

    # other numbers on every rank; an answer that was checked before may have left its own seed here
    own = torch.get_rng_state()
    torch.manual_seed(torch.initial_seed() % 2**32 + 1 + dist.get_rank())
    random.random(), numpy and numpy.random.random()
    before, dealt = states(), {}
    try:
        seen = watched(lambda: dealt.update({case: (all_ranks(*case), all_ranks(*case)) for case in CASES}))
        touched = next((whose for whose, state in states().items() if state != before[whose]), "")
    finally:
        torch.set_rng_state(own)
    seen.kept = {"dealt": dealt, "touched": touched, "elsewhere": elsewhere()}
    return seen


def _has_text(value):
    return isinstance(value, (str, bytes)) or isinstance(value, (tuple, frozenset)) and any(map(_has_text, value))


def _as_list(value):
    if isinstance(value, (list, tuple, range)):
        whole = [hasattr(v, "__index__") and not isinstance(v, bool) for v in value]
        return [int(v) if fits else Other(type(v).__name__) for v, fits in zip(value, whole, strict=True)]
    return Other(type(value).__name__)


def _judge_deal(length, n, epoch, seed, lists, again):
    """Raise Wrong unless each sample is dealt out once, and evenly."""
    about = f"{length} samples on {n} rank{'s' * (n > 1)}, epoch {epoch}"
    for rank, one in enumerate(lists):
        where = f"rank {rank}, {about}"
        if isinstance(one, Other):
            tolist = ", which its .tolist() makes" * (one.type in ("Tensor", "ndarray"))
            raise Wrong(f"it returns a {one.type}: a list of numbers is asked for{tolist}", where)
        if strange := [i.type for i in one if isinstance(i, Other)]:
            raise Wrong(f"a {strange[0]} is in the list: a sample's number is a whole number (int)", where)
        if bad := [i for i in one if not 0 <= i < length]:
            raise Wrong(f"there is no sample {bad[0]}", where)
    times, sizes = Counter(i for one in lists for i in one), [len(one) for one in lists]
    missing, twice = sorted(set(range(length)) - set(times)), [i for i in times if times[i] > 1]
    overlap = "the ranks shuffle differently, so their parts overlap: the rank must not be in the seed"
    again_seen = f"sample {min(twice, default=0)} is seen twice: nothing is to be repeated, ranks may differ by one"
    lost = f"sample {min(missing, default=0)} is seen by no rank"
    if n == 4 and len(missing) == length % n:  # what drops the remainder of 4 does not come to 3 ranks
        lost += f" ({length} % {n} of them: the remainder is dropped)"
    alike, repeated = n > 1 and all(one == lists[0] for one in lists), any(len(set(one)) < len(one) for one in lists)
    for bad, why in (
        (lists != again, "two calls with the same arguments give different lists: seed the shuffle"),
        (alike, "every rank gets the same samples: rank is not used to deal them out"),
        (repeated and missing, "a rank sees a sample twice: it draws with replacement, where a shuffle is asked for"),
        (twice and sum(sizes) == length, overlap),
        (twice and not missing, again_seen),
        (missing, lost),
        (max(sizes) - min(sizes) > 1, f"sizes {', '.join(map(str, sizes))} are more than 1 apart"),
        (length == 40 and any(one == sorted(one) for one in lists), "the samples are in order: shuffle them"),
    ):
        if bad:
            shown = "each sample once, sizes at most 1 apart", "; ".join(str(one)[:40] for one in lists[:4])
            raise Wrong(why, about, *shown)


def _judge_orders(orders, elsewhere):
    """Raise Wrong unless 40 samples on 2 ranks are shuffled anew by epoch and seed. orders: {(epoch, seed): lists}."""
    first, second, third = (orders[epoch, 0] for epoch in range(3))
    by_epoch, by_seed = orders[0, 9] != orders[1, 9], second != orders[1, 9]
    hidden = "in a product of the two a zero hides the other, so combine them otherwise"
    parts = [[frozenset(one) for one in lists] for lists in (first, second, third)]
    kept, exchanged = parts[0][0] == parts[1][0] == parts[2][0], set(parts[0]) == set(parts[1])
    followers = [{pair for one in lists for pair in pairwise(one)} for lists in (first, second)]
    rolled = len(followers[0] & followers[1]) > 19
    for bad, why in (
        (first == second and by_epoch, f"with seed 0 every epoch has the same order: {hidden}"),
        (first == second, "every epoch has the same order: the epoch belongs into the seed"),
        (first == orders[0, 9] and by_seed, f"in epoch 0 every seed gives the same order: {hidden}"),
        (first == orders[0, 9], "every seed gives the same order: seed is not used"),
        (third in (first, second), "epoch 2 has the order of an earlier one: another epoch deals them out anew"),
        (kept, "a rank has the same samples in every epoch, only in another order: shuffle, then deal out"),
        (exchanged, "the ranks only exchange their parts: in every epoch shuffle all samples anew, then deal out"),
        (rolled, "the next epoch's order is the same, begun at another place (rolled?): shuffle anew"),
        (elsewhere != first, "hash() of a text is another number in every process: make the seed of numbers"),
    ):
        if bad:
            raise Wrong(why, "40 samples on 2 ranks")


WHY = (
    "One shuffle on all ranks, dealt out like cards: nothing twice, nothing missing. torch's DistributedSampler "
    "repeats or drops samples, so that all ranks have as many."
)

exercise = Exercise(hints, check, minutes=10, level="easy", why=WHY)
