"""average_clients: federated averaging by rows, several clients a rank; typically a mean of the ranks' means."""

from ..exercises.cases import F32, F64, PAIRS, values
from ..exercises.exercise import Exercise
from ..exercises.runs import ALONE, few_bytes, in_groups, named, only_all_reduce, same_mean
from .shared import OTHER_CALLS

hints = (
    "If one process had all clients: sum(rows[c] * update for c, update in updates.items()) / sum(rows.values()). "
    "Both sums can be taken over the ranks too.",
    "Each rank adds up rows · update over its own clients; dist.all_reduce(…, group=group) makes it the sum over "
    "all. The rows, one number, need an all_reduce of their own.",
    "Divide at the very end, once, by all rows: a mean taken on each rank and then over the ranks would count a "
    "client that is alone on its rank as much as five on another.",
)


def check(run):
    cases = [  # each rank's clients, {client: rows}, numbers, dtype, groups
        ([[0, 1, 2], [3], [4, 5], [6, 7]], [5, 90, 2, 40, 8, 8, 1, 300], 7, F64, ()),
        ([[0], [1], [2], [3]], [6, 6, 6, 6], 5, F32, ()),
        ([[7, 1], [3], [5, 6, 9], [2]], {7: 1, 1: 2, 3: 40, 5: 3, 6: 9, 9: 100, 2: 17}, 3, F64, PAIRS),
        ([[0, 3], [1], [2, 4, 5]], [1, 20, 3, 30, 5, 70], 6, F64, ()),
        ([[0, 1, 2], [3], [4], [5]], [4, 1, 15, 2, 3, 4], 4, F32, ALONE),
    ]
    stuck = "the ranks do not make the same calls: how many there are must not depend on a rank's own clients"
    for seed, (hosted, rows, d, dtype, groups) in enumerate(cases):
        about = f"clients {', '.join(map(str, hosted))} on {named(groups, len(hosted))}"
        update = {c: values((d,), dtype, c, seed) for one in hosted for c in one}
        # rows are in another order: a dict is asked by its keys
        given = [({c: update[c] for c in one}, {c: rows[c] for c in reversed(one)}) for one in hosted]
        for members, seen in in_groups(run, given, groups, about, stuck):
            _judge(members, seen, hosted, rows, update, dtype, about)


def _judge(members, seen, hosted, rows, update, dtype, about):
    only_all_reduce(members, seen, OTHER_CALLS, "updates or rows have", about)
    here = [hosted[r] for r in members]
    n, clients, everyone = len(members), sum(here, []), sum(hosted, [])

    def many(of):
        return sum(rows[c] for c in of)

    def mean(of, weight=lambda c: rows[c]):
        return sum(weight(c) * update[c].double() for c in of) / sum(weight(c) for c in of)

    right, total = mean(clients), many(clients)
    own, alike = [mean(one) for one in here], [mean(one, lambda c: 1) for one in here]
    paired = zip(sum((one[::-1] for one in here), []), clients, strict=True)
    mistakes = [
        ("every client counts the same: a client with more rows has to count more", mean(clients, lambda c: 1)),
        ("a mean of means: it averages the ranks' means, so that a rank with few rows counts as much as one with many",
         sum(own) / n),
        ("a mean of means, twice: neither the rows nor how many clients a rank has is counted", sum(alike) / n),
        ("the sum of the ranks' means: one division by all rows, at the end", sum(own)),
        ("the mean of each rank's clients, weighted by its rows: within a rank every client counts the same",
         sum(many(one) * m for one, m in zip(here, alike, strict=True)) / total),
        ("multiplied by the rows and never divided", right * total),
        (f"divided by the {n} ranks, not by all {total} rows", right * total / n),
        (f"divided by the {len(clients)} clients, not by all {total} rows", right * total / len(clients)),
        (f"divided by the {n} ranks once too often", right / n),
        ("divided by this rank's rows only: the others' rows have to be added up too",
         [right * total / many(one) for one in here]),
        ("nothing was exchanged: this is the mean of the rank's own clients", own),
        ("rows and updates were paired by their order: look both up by the client",
         sum(rows[a] * update[c].double() for a, c in paired) / total),
        ("a client's weight is upside down: more rows have to count more", mean(clients, lambda c: 1 / rows[c])),
        ("the group argument is ignored: this is the mean over all ranks' clients", mean(everyone)),
        ("the group argument is ignored where the rows are added up", right * total / many(everyone)),
    ]  # fmt: skip
    same_mean(members, [one.result for one in seen], right, dtype, about, mistakes)
    few_bytes(members, seen, right, dtype, about)


WHY = (
    "Rows and weighted updates are both added up over all ranks before the one division, so it does not matter "
    "which rank hosts whom. Flower's FedAvg weights by rows too, at a server that sees every update; DDP "
    "divides by the number of ranks, which is right only where all have equally many rows."
)
exercise = Exercise(hints, check, minutes=10, level="easy", why=WHY)
