"""The exercise reduce_buckets."""

import torch
import torch.distributed as dist
from torch.distributed import Work

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.gradients import PAIRS
from ..exercises.judge import Wrong, only_calls, same
from ..exercises.watch import calls_so_far, watched
from .shared import group, in_their_group

hints = (
    "An all_reduce meets the other ranks' all_reduce that was called in the same place of their sequence, whatever "
    "is in it. So the order of calls must not depend on what arrives first here.",
    "Keep arrived buckets in a dict by number, and remember which number is next. After an arrival, start the next "
    "one while it is there: one arrival may set free several.",
    "dist.all_reduce(…, async_op=True) returns a work; call its wait() after the loop, and divide then.",
)


def check(run):
    stuck = "the ranks do not start the same buckets in the same order: what is full first differs from rank to rank"
    cases = [  # sizes of the buckets, order of arrival on each rank
        ([4, 4, 4], [[0, 1, 2]] * 4, False),
        ([4, 4, 4], [[2, 0, 1]] * 4, False),
        ([4, 4, 4], [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]], False),
        ([5, 2, 7, 3, 1], [[0, 1, 2, 3, 4], [4, 2, 3, 1, 0], [3, 0, 4, 1, 2]], False),
        ([3, 3], [[1, 0], [0, 1], [0, 1], [1, 0]], True),
        ([6], [[0]] * 2, False),
    ]
    for sizes, orders, in_pairs in cases:
        n, dtype = len(orders), F64 if len(sizes) % 2 else F32
        about = f"{len(sizes)} buckets on " + ("two groups of 2 ranks" if in_pairs else f"{n} ranks")
        seen = run(_reduced, sizes, orders, dtype, in_pairs, n=n, about=about, stuck=stuck)
        for members in PAIRS if in_pairs else [list(range(n))]:
            _judge_buckets([seen[r] for r in members], members, sizes, [orders[r] for r in members], dtype, about)


def _reduced(answer, sizes, orders, dtype, in_pairs):
    rank = dist.get_rank()
    buckets = [values((size,), dtype, rank, number) for number, size in enumerate(sizes)]
    given, started, waited, begun, waits = list(buckets), [], [], calls_so_far(), [0]
    plain = Work.wait, torch._C.Future.wait

    def counted(wait):
        def waiting(*args, **kwargs):
            waits[0] += 1
            return wait(*args, **kwargs)

        return waiting

    def arriving():
        for number in orders[rank]:
            yield number, buckets[number]
            started.append(calls_so_far() - begun)
            waited.append(waits[0])

    Work.wait, torch._C.Future.wait = map(counted, plain)
    try:
        seen = watched(answer, arriving(), **group(in_pairs))
    finally:
        Work.wait, torch._C.Future.wait = plain
    seen.kept = {"after": given, "started": started, "waited": waited}
    return seen


def _judge_buckets(mine, members, sizes, orders, dtype, about):
    n = len(members)
    only_calls(mine, ("all_reduce",), {"": "it calls {op}: one all_reduce of each bucket is all that is needed"})
    in_their_group(members, mine, about)
    inputs = [[values((size,), dtype, rank, number) for rank in members] for number, size in enumerate(sizes)]
    for number, own in enumerate(inputs):
        total = sum(own)
        never = "one arrival may set free several buckets, so start while there is a next one"
        if all(len(one.calls) == len(sizes) for one in mine):
            never = "what was reduced is a copy"
        rebound = mine[0].ops & {"div", "mul"}
        mistakes = [
            (f"the sum was divided by {n} into a new tensor that is not the bucket: divide in place, bucket /= n"
             if rebound else f"the sum was not divided by {n}, the number of ranks", [total] * n),
            (f"bucket {number} was never reduced: {never}", own),
            (f"divided by the number of all ranks, 4, where the group has {n}", [total / 4] * n),
            (f"divided twice by {n}", [total / n**2] * n),
        ]  # fmt: skip
        if len(set(sizes)) == 1:
            place = [order.index(number) for order in orders]  # when this bucket arrived on each rank
            mixed = [sum(inputs[o[at]][r] for r, o in enumerate(orders)) for at in place]
            why = "different buckets were added up: each rank reduces what is full first, and that differs"
            mistakes += [(why, [m / n for m in mixed]), (why, mixed)]
        after = [one.kept["after"][number] for one in mine]
        same(after, [total / n] * n, f"bucket {number}", about, mistakes, own, members)
    for rank, one, order in zip(members, mine, orders, strict=True):
        ready = [next((i for i in range(len(sizes) + 1) if i not in order[:k]), 0) for k in range(1, len(order) + 1)]
        shown = {"expected": f"started after each arrival: {ready}", "got": f"{one.kept['started']}"}
        where = f"rank {rank}, {about}, which arrive in the order {order}"
        if len(one.calls) != len(sizes):
            raise Wrong(f"all_reduce is called {len(one.calls)} times for {len(sizes)} buckets", where)
        if one.kept["started"] != ready[: len(one.kept["started"])] or len(one.kept["started"]) < len(order):
            early = any(a > b for a, b in zip(one.kept["started"], ready, strict=False))
            why = "a bucket is started later than it could be"
            if early:
                why = "a bucket is started before its turn: on another rank another one may be full first"
            elif not any(one.kept["started"][:-1]):
                why = "nothing is started before the last bucket is here: backward and communication do not overlap"
            raise Wrong(why, where, **shown)
        if any(one.kept["waited"]):
            raise Wrong("it waits for a bucket before the last one is here: meanwhile backward stands still", where)


exercise = Exercise(hints, check)
