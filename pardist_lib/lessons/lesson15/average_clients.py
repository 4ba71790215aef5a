"""The exercise average_clients."""

import copy

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from ..exercises.watch import watched
from .shared import ALONE, OTHER_CALLS, PAIRS, named, nearly_equal

hints = (
    "If one process had all clients: sum(rows[c] * update for c, update in updates.items()) / sum(rows.values()). "
    "Both sums can be taken over the ranks too.",
    "Each rank adds up rows · update over its own clients; dist.all_reduce(…, group=group) makes it the sum over "
    "all. The rows, one number, need an all_reduce of their own.",
    "Divide at the very end, once, by all rows: a mean taken on each rank and then over the ranks would count a "
    "client that is alone on its rank as much as five on another.",
)


def check(run):
    cases = [  # who is where; rows; d; dtype; groups
        ([[0, 1, 2], [3], [4, 5], [6, 7]], [5, 90, 2, 40, 8, 8, 1, 300], 7, F64, ()),
        ([[0], [1], [2], [3]], [6, 6, 6, 6], 5, F32, ()),
        ([[7, 1], [3], [5, 6, 9], [2]], dict(zip([7, 1, 3, 5, 6, 9, 2], [1, 2, 40, 3, 9, 100, 17], strict=True)),
         3, F64, PAIRS),
        ([[0, 3], [1], [2, 4, 5]], [1, 20, 3, 30, 5, 70], 6, F64, ()),
        ([[0, 1, 2], [3], [4], [5]], [4, 1, 15, 2, 3, 4], 4, F32, ALONE),
    ]  # fmt: skip
    for seed, (hosted, rows, d, dtype, groups) in enumerate(cases):
        n = len(hosted)
        about = f"clients {', '.join(map(str, hosted))} on {named(groups, n)}"
        stuck = "the ranks do not make the same calls: how many there are must not depend on a rank's own clients"
        seen = run(_average_clients, hosted, rows, d, dtype, seed, groups, n=n, about=about, stuck=stuck)
        for members in groups or [list(range(n))]:
            _judge_clients([seen[r] for r in members], [hosted[r] for r in members], hosted, rows, d, dtype, seed,
                           members, about)  # fmt: skip


def _average_clients(answer, hosted, rows, d, dtype, seed, groups):
    rank = dist.get_rank()
    mine = {c: values((d,), dtype, c, seed) for c in hosted[rank]}
    counts = {c: rows[c] for c in reversed(hosted[rank])}  # a dict is asked by its keys, not by its order
    given = copy.deepcopy((mine, counts))
    seen = watched(answer, *given, **mine(groups))
    seen.kept = not nearly_equal((mine, counts), given)
    return seen


def _judge_clients(seen, hosted, everywhere, rows, d, dtype, seed, members, about):
    only_calls(seen, ("all_reduce",), OTHER_CALLS)
    for rank, one in zip(members, seen, strict=True):
        if one.kept:
            raise Wrong("updates or rows have changed: work on new tensors", f"rank {rank}, {about}")
    n, all_of_us = len(seen), [c for one in hosted for c in one]
    update = {c: values((d,), F64, c, seed).to(dtype).double() for one in everywhere for c in one}

    def weighted(clients):
        return sum(rows[c] * update[c] for c in clients) / sum(rows[c] for c in clients)

    own = [weighted(one) for one in hosted]
    plain_means = [torch.stack([update[c] for c in one]).mean(0) for one in hosted]
    total = sum(rows[c] for c in all_of_us)
    mean, elsewhere = weighted(all_of_us), [c for one in everywhere for c in one]
    outside = len(elsewhere) > len(all_of_us)
    mistakes = [
        ("every client counts the same: a client with more rows has to count more",
         torch.stack([update[c] for c in all_of_us]).mean(0)),
        ("a mean of means: it averages the ranks' means, so that a rank with few rows counts as much as one with many",
         torch.stack(own).mean(0)),
        ("a mean of means, twice: neither the rows nor how many clients a rank has is counted",
         torch.stack(plain_means).mean(0)),
        ("the sum of the ranks' means: one division by all rows, at the end", torch.stack(own).sum(0)),
        ("the mean of each rank's clients, weighted by its rows: within a rank every client counts the same",
         sum(sum(rows[c] for c in one) * m for one, m in zip(hosted, plain_means, strict=True)) / total),
        ("multiplied by the rows and never divided", mean * total),
        (f"divided by the {n} ranks, not by all {total} rows", mean * total / n),
        (f"divided by the {len(all_of_us)} clients, not by all {total} rows", mean * total / len(all_of_us)),
        (f"divided by the {n} ranks once too often", mean / n),
        ("divided by this rank's rows only: the others' rows have to be added up too",
         [mean * total / sum(rows[c] for c in one) for one in hosted]),
        ("nothing was exchanged: this is the mean of the rank's own clients", own),
        ("rows and updates were paired by their order: look both up by the client",
         sum(rows[a] * update[c] for one in hosted for a, c in zip(reversed(one), one, strict=True)) / total),
        ("a client's weight is upside down: more rows have to count more", _upside_down(update, rows, all_of_us)),
        ("the group argument is ignored: this is the mean over all ranks' clients",
         weighted(elsewhere) if outside else None),
        ("the group argument is ignored where the rows are added up",
         mean * total / sum(rows[c] for c in elsewhere) if outside else None),
    ]  # fmt: skip
    mistakes = [(why, [None if t is None else t.to(dtype) for t in (would if isinstance(would, list) else [would] * n)])
                for why, would in mistakes]  # fmt: skip
    same([one.result for one in seen], [mean.to(dtype)] * n, "the result", about, mistakes, labels=members)
    item = torch.finfo(dtype).bits // 8
    for rank, one in zip(members, seen, strict=True):
        made = sum(call.bytes for call in one.calls)
        if n > 1 and (made > d * item + 8 or len(one.calls) > 2):
            raise Wrong(
                f"the result is right, but {made} bytes in {len(one.calls)} calls are all-reduced: {d} numbers and one",
                f"rank {rank}, {about}", f"at most {d * item + 8} bytes in 2 calls", f"{made} bytes",
            )  # fmt: skip


def _upside_down(update, rows, clients):
    if len({rows[c] for c in clients}) == 1:
        return None
    return sum(update[c] / rows[c] for c in clients) / sum(1 / rows[c] for c in clients)


exercise = Exercise(hints, check)
