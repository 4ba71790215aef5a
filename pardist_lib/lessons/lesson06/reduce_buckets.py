"""Full buckets reduced while others fill. Typical: each as it arrives, all at the end, one for each arrival."""

import torch
import torch.distributed as dist
from torch.distributed import Work

from ..exercises.cases import F32, F64, groups_of, own_group, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, only_within, same
from ..exercises.watch import calls_so_far, watched

hints = (
    "An all_reduce meets the other ranks' all_reduce that was called in the same place of their sequence, whatever "
    "is in it. So the order of calls must not depend on what arrives first here.",
    "Keep arrived buckets in a dict by number, and remember which number is next. After an arrival, start the next "
    "one while it is there: one arrival may set free several.",
    "dist.all_reduce(…, async_op=True) returns a work; call its wait() after the loop, and divide then.",
)


def check(run):
    cases = [  # sizes of the buckets, order of arrival on each rank, in pairs
        ([4, 4, 4], [[0, 1, 2]] * 4, False),
        ([4, 4, 4], [[2, 0, 1]] * 4, False),
        ([4, 4, 4], [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]], False),
        ([5, 2, 7, 3, 1], [[0, 1, 2, 3, 4], [4, 2, 3, 1, 0], [3, 0, 4, 1, 2]], False),
        ([3, 3], [[1, 0], [0, 1], [0, 1], [1, 0]], True),
        ([6], [[0]] * 2, False),
    ]
    stuck = "the ranks do not start the same buckets in the same order: what is full first differs from rank to rank"
    because = {"": "it calls {op}: one all_reduce of each bucket is all that is needed"}
    for sizes, orders, in_pairs in cases:
        n, dtype = len(orders), F64 if len(sizes) % 2 else F32
        about = f"{len(sizes)} buckets on " + ("two groups of 2 ranks" if in_pairs else f"{n} ranks")
        seen = run(_reduced, sizes, orders, dtype, in_pairs, n=n, about=about, stuck=stuck, raises=RAISES)
        only_calls(seen, ("all_reduce",), because)
        for members in groups_of(in_pairs, n):
            mine, own_orders = [seen[r] for r in members], [orders[r] for r in members]
            only_within(members, mine, about)
            _judge_means(members, mine, sizes, own_orders, dtype, about)
            _judge_starts(members, mine, own_orders, about)


RAISES = [
    (r"'generator' object|'generator' has no len", "buckets come while a loop runs: for number, bucket in arriving"),
    (r"'NoneType' object has no attribute 'wait'", "all_reduce returns a work to wait for only with async_op=True"),
]


def _reduced(answer, sizes, orders, dtype, in_pairs):
    rank, begun, waits, started, waited = dist.get_rank(), calls_so_far(), [], [], []
    buckets = [values((size,), dtype, rank, number) for number, size in enumerate(sizes)]
    plain = Work.wait, torch._C.Future.wait

    def noted(wait):
        return lambda *args, **options: waits.append(wait) or wait(*args, **options)

    def arriving():
        for number in orders[rank]:
            yield number, buckets[number]
            started.append(calls_so_far() - begun)
            waited.append(bool(waits))

    Work.wait, torch._C.Future.wait = map(noted, plain)
    try:
        seen = watched(answer, arriving(), **own_group(in_pairs))
    finally:
        Work.wait, torch._C.Future.wait = plain
    seen.kept = {"after": buckets, "started": started, "waited": any(waited)}
    return seen


def _judge_means(members, mine, sizes, orders, dtype, about):
    n = len(members)
    inputs = [[values((size,), dtype, rank, number) for rank in members] for number, size in enumerate(sizes)]
    why = f"the sum was not divided by {n}, the number of ranks"
    if mine[0].ops & {"div", "mul"}:
        why = f"the sum was divided by {n} into a new tensor that is not the bucket: divide in place, bucket /= n"
    never = "one arrival may set free several buckets, so start while there is a next one"
    if all(len(one.calls) == len(sizes) for one in mine):
        never = "what was reduced is a copy"
    for number, own in enumerate(inputs):
        mistakes = [
            (why, sum(own)),
            (f"bucket {number} was never reduced: {never}", own),
            (f"divided by the number of all ranks, 4, where the group has {n}", sum(own) / 4),
            (f"divided twice by {n}", sum(own) / n**2),
        ]
        if len(set(sizes)) == 1:
            place = [order.index(number) for order in orders]  # when this bucket arrived on each rank
            mixed = [sum(inputs[order[at]][r] for r, order in enumerate(orders)) for at in place]
            mixed_up = "different buckets were added up: each rank reduces what is full first, and that differs"
            mistakes += [(mixed_up, [m / n for m in mixed]), (mixed_up, mixed)]
        after = [one.kept["after"][number] for one in mine]
        same(after, sum(own) / n, f"bucket {number}", about, mistakes, own, members)


def _judge_starts(members, mine, orders, about):
    """Raise Wrong unless each bucket is started once, as soon as those before it are here, and none is waited for."""
    for rank, one, order in zip(members, mine, orders, strict=True):
        where, started = f"rank {rank}, {about}, which arrive in the order {order}", one.kept["started"]
        count = range(1, len(order) + 1)
        ready = [next(i for i in (0, *count) if i not in order[:arrived]) for arrived in count]
        if len(one.calls) != len(order):
            raise Wrong(f"all_reduce is called {len(one.calls)} times for {len(order)} buckets", where)
        if started != ready:
            why = "a bucket is started later than it could be"
            if any(a > b for a, b in zip(started, ready, strict=False)):
                why = "a bucket is started before its turn: on another rank another one may be full first"
            elif not any(started[:-1]):
                why = "nothing is started before the last bucket is here: backward and communication do not overlap"
            raise Wrong(why, where, f"started after each arrival: {ready}", f"{started}")
        if one.kept["waited"]:
            why = "meanwhile backward stands still (an all_reduce without async_op=True waits, too)"
            raise Wrong(f"it waits for a bucket before the last one is here: {why}", where)


WHY = (
    "Collectives meet in the order of their calls, so all ranks have to start in one order. DDP keeps it in C++, "
    "and after the first step deals buckets out anew, as gradients really came."
)

exercise = Exercise(hints, check, minutes=20, level="hard", why=WHY)
