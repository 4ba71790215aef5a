"""The exercise sample_indices."""

import random
import sys

import torch
import torch.distributed as dist

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong
from ..exercises.watch import Other, watched

hints = (
    "If all ranks shuffle all samples in the same way, each can take its own part of the same order.",
    "torch.randperm(length, generator=torch.Generator().manual_seed(…)) gives the same order on every rank, and "
    "leaves the global random numbers alone. What has to be in the seed, and what must not?",
    "order[rank::n] takes every n-th one: some ranks get one more, none gets one twice.",
)


def check(run):
    cases = [(12, 4, 0, 0), (12, 4, 1, 0), (10, 4, 0, 0), (7, 3, 2, 5), (40, 2, 0, 0), (40, 2, 1, 0), (40, 2, 2, 0),
             (40, 2, 0, 9), (40, 2, 1, 9), (5, 5, 0, 0), (6, 1, 3, 1)]  # fmt: skip
    seen = run(_sampled, cases)
    if calls := [call for one in seen for call in one.calls]:
        raise Wrong(f"it calls {calls[0].op}: every rank can work out its part without asking")
    dealt, touched, _ = seen[0].kept
    for case, (lists, again) in zip(cases, dealt, strict=True):
        try:
            _judge_samples(*case, lists, again)
        except Wrong as wrong:
            if case == cases[3]:  # the first without 4 ranks
                said = wrong.diagnosis.partition(" (")[0]
                wrong.diagnosis = f"it works with 4 ranks, but not with 3 (is a 4 written into it?): {said}"
            raise
    for rank, one in enumerate(seen):
        if one.kept[0] != dealt:
            why = "what it gives differs from process to process: nothing but the arguments may go into the seed"
            raise Wrong(why, f"rank {rank} against rank 0, called with the same arguments")
    orders = {case: lists for case, (lists, _) in zip(cases, dealt, strict=True)}
    product = "in a product of the two a zero hides the other, so combine them otherwise"
    if orders[40, 2, 0, 0] == orders[40, 2, 1, 0]:
        why = "every epoch has the same order: the epoch belongs into the seed"
        if orders[40, 2, 0, 9] != orders[40, 2, 1, 9]:
            why = f"with seed 0 every epoch has the same order: {product}"
        raise Wrong(why, "40 samples on 2 ranks")
    if orders[40, 2, 0, 0] == orders[40, 2, 0, 9]:
        why = "every seed gives the same order: seed is not used"
        if orders[40, 2, 1, 0] != orders[40, 2, 1, 9]:
            why = f"in epoch 0 every seed gives the same order: {product}"
        raise Wrong(why, "40 samples on 2 ranks")
    if orders[40, 2, 2, 0] in (orders[40, 2, 0, 0], orders[40, 2, 1, 0]):
        raise Wrong("epoch 2 has the order of an earlier one: another epoch deals them out anew",
                    "40 samples on 2 ranks")  # fmt: skip
    if set(orders[40, 2, 0, 0][0]) == set(orders[40, 2, 1, 0][0]) == set(orders[40, 2, 2, 0][0]):
        raise Wrong("a rank has the same samples in every epoch, only in another order: shuffle, then deal out",
                    "rank 0, 40 samples on 2 ranks")  # fmt: skip
    first, second = orders[40, 2, 0, 0], orders[40, 2, 1, 0]
    if {frozenset(one) for one in first} == {frozenset(one) for one in second}:
        raise Wrong("the ranks only exchange their parts: the same samples stay together in every epoch, so "
                    "shuffle all of them anew, then deal out", "40 samples on 2 ranks")  # fmt: skip
    neighbours = [{pair for one in lists for pair in zip(one, one[1:], strict=False)} for lists in (first, second)]
    if len(neighbours[0] & neighbours[1]) > 19:
        raise Wrong("the next epoch's order is the same, begun at another place (rolled?): shuffle anew",
                    "40 samples on 2 ranks")  # fmt: skip
    if seen[0].kept[2] != orders[40, 2, 0, 0]:
        raise Wrong("hash() of a text is another number in every process, so the ranks would shuffle differently: "
                    "make the seed of numbers", "the same arguments in another process")  # fmt: skip
    if touched:
        raise Wrong(f"it changes {touched}: give the shuffle a generator of its own")


def _sampled(answer, cases):
    numpy = sys.modules.get("numpy")

    def states():
        state = numpy.random.get_state() if numpy else ()
        return {"torch's own random numbers (torch.manual_seed?)": torch.get_rng_state().tolist(),
                "Python's own random numbers (random.seed?)": random.getstate(),
                "numpy's own random numbers (numpy.random.seed?)": repr(state)}  # fmt: skip

    def all_ranks(length, n, epoch, seed):
        return [_as_list(answer(length, rank, n, epoch, seed)) for rank in range(n)]

    def elsewhere():  # as in another process, where texts have other hashes
        names = getattr(answer, "__globals__", {})
        names["hash"], own = lambda value: hash(value) + _has_text(value), names.get("hash")
        try:
            return all_ranks(40, 2, 0, 0)
        finally:
            names["hash"] = own or hash

    if numpy:
        numpy.random.random()
    # other numbers on every rank; an answer that was checked before may have left its own seed here
    own, dealt = torch.get_rng_state(), []
    torch.manual_seed(torch.initial_seed() % 2**32 + 1 + dist.get_rank()), random.random()
    before = states()
    try:
        seen = watched(lambda: dealt.extend((all_ranks(*case), all_ranks(*case)) for case in cases))
        touched = next((what for what, state in states().items() if state != before[what]), "")
    finally:
        torch.set_rng_state(own)
    seen.kept = dealt, touched, elsewhere()
    return seen


def _has_text(value):
    return isinstance(value, (str, bytes)) or isinstance(value, (tuple, frozenset)) and any(map(_has_text, value))


def _as_list(value):
    if isinstance(value, torch.Tensor) and value.dim() == 1:
        return value.tolist()
    if isinstance(value, (list, tuple, range)):
        whole = [hasattr(v, "__index__") and not isinstance(v, bool) for v in value]
        return [int(v) if fits else Other(type(v).__name__) for v, fits in zip(value, whole, strict=True)]
    return Other(type(value).__name__)


def _judge_samples(length, n, epoch, seed, lists, again):
    about = f"{length} samples on {n} rank{'s' * (n > 1)}, epoch {epoch}"
    for rank, one in enumerate(lists):
        if not isinstance(one, list):
            raise Wrong(f"it returns a {one.type}: a list of numbers is asked for", f"rank {rank}, {about}")
        if strange := [i.type for i in one if not isinstance(i, int)]:
            raise Wrong(f"a {strange[0]} is in the list: a sample's number is a whole number (int)",
                        f"rank {rank}, {about}")  # fmt: skip
        if bad := [i for i in one if not 0 <= i < length]:
            raise Wrong(f"there is no sample {bad[0]}", f"rank {rank}, {about}")
    if lists != again:
        raise Wrong("two calls with the same arguments give different lists: seed the shuffle", about)
    shown = {
        "expected": "each sample once, sizes at most 1 apart",
        "got": "; ".join(str(one)[:40] for one in lists[:4]),
    }
    together = [i for one in lists for i in one]
    twice = sorted({i for i in together if together.count(i) > 1})
    missing = sorted(set(range(length)) - set(together))
    if n > 1 and all(one == lists[0] for one in lists):
        raise Wrong("every rank gets the same samples: rank is not used to deal them out", about, **shown)
    if any(len(set(one)) < len(one) for one in lists) and missing:
        raise Wrong("a rank sees a sample twice: it draws with replacement, where a shuffle is asked for", about,
                    **shown)  # fmt: skip
    if twice and len(together) == length:
        raise Wrong("the ranks shuffle differently, so their parts overlap: the rank must not be in the seed", about,
                    **shown)  # fmt: skip
    if twice and not missing:
        raise Wrong(f"sample {twice[0]} is seen twice: nothing is to be repeated, ranks may differ by one", about,
                    **shown)  # fmt: skip
    if missing:
        at_the_end = len(missing) == length % n
        why = f" ({length} % {n} of them: the remainder is dropped)" if at_the_end else ""
        raise Wrong(f"sample {missing[0]} is seen by no rank{why}", about, **shown)
    sizes = [len(one) for one in lists]
    if max(sizes) - min(sizes) > 1:
        raise Wrong(f"sizes {', '.join(map(str, sizes))} are more than 1 apart", about, **shown)
    if length == 40 and (any(one == sorted(one) for one in lists)):
        raise Wrong("the samples are in order: shuffle them", about, **shown)


exercise = Exercise(hints, check)
