"""Micro-batches added up, exchanged once. Typical: divided by the ranks only, zero_grad between, an exchange each."""

import weakref

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, groups_of, own_group
from ..exercises.exercise import Exercise
from ..exercises.gradients import OTHER_CALLS, Sample, gradients, judge_traffic, loss_of, rows_of_rank
from ..exercises.judge import Wrong, only_calls, only_within, same
from .shared import each_gradient, watched_on

hints = (
    "backward() adds to p.grad what it computes. So several backwards in a row give a sum of gradients, as long as "
    "nobody sets them to zero in between.",
    "The mean over k micro-batches: divide each loss by k before its backward. That over ranks: afterwards, once.",
    "Start with model.zero_grad(), or an old gradient is counted.",
)
ROWS = 2  # of a micro-batch: another number than that of micro-batches, so that dividing by the wrong one shows
OLD = 99  # the rows of the gradient that is there before the call; the micro-batches have 10, 11, …


def check(run):
    for n, k, dtype, in_pairs in ((4, 3, F64, False), (4, 1, F32, False), (3, 2, F64, False), (4, 2, F64, True)):
        about = f"{k} micro-batch{'es' * (k > 1)} on " + ("two groups of 2 ranks" if in_pairs else f"{n} ranks")
        seen = run(_accumulated, k, dtype, in_pairs, n=n, about=about)
        only_calls(seen, ("all_reduce",), OTHER_CALLS)
        for members in groups_of(in_pairs, n):
            mine = [seen[r] for r in members]
            only_within(members, mine, about)
            means = _judge_means(members, mine, k, dtype, n, about)
            _judge_way(members, mine, k, sum(mean.nbytes for [mean] in means.values()), about)
            judge_traffic(members, mine, means, about, False)


def _accumulated(answer, k, dtype, in_pairs):
    rank, model = dist.get_rank(), Sample(3, dtype)
    loss_of(model, rows_of_rank(OLD, rank, dtype)).backward()
    asked = [(_rows(i, rank, dtype), i) for i in range(k)]
    batches, given, came_back, in_turn, alive, saved = list(asked), [], [], [], [], []

    class Box:  # stands for a tensor that autograd keeps, and is gone when backward has let go of it
        def __init__(self, t):
            self.t = t
            saved.append(weakref.ref(self))

    def loss_fn(model, x, y):
        in_turn.append(len(came_back) >= len(given))
        given.append((y, len(x)))
        alive.append(any(box() is not None for box in saved))
        with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.t):
            loss = loss_of(model, x)
        if loss.requires_grad:
            loss.register_hook(came_back.append)
        return loss

    seen = watched_on(model, lambda: answer(model, batches, loss_fn, **own_group(in_pairs)))
    as_given = [i for _, i in batches] == list(range(k))
    as_given = as_given and all(torch.equal(x, _rows(i, rank, dtype)) for x, i in asked)
    seen.kept |= {"given": given, "in turn": all(in_turn), "alive": any(alive), "as given": as_given}
    seen.kept["training"] = model.training
    return seen


def _rows(micro, rank, dtype):
    return rows_of_rank(10 + micro, rank, dtype)[:ROWS]


def _gradients_of(micro, rank, dtype):
    model = Sample(3, dtype)
    loss_of(model, _rows(micro, rank, dtype)).backward()
    return gradients(model)


def _judge_means(members, mine, k, dtype, everyone, about):
    """Raise Wrong unless p.grad is the mean over ranks and micro-batches. Returns {name: (mean,)}."""
    n, means = len(members), {}
    parts = [[_gradients_of(i, rank, dtype) for i in range(k)] for rank in members]
    by_rows = "loss_of gives a mean over its rows already: divide by the number of micro-batches"
    early = "the ranks' mean is made before the last micro-batch is in: add up first, exchange once at the end"
    for name, old, after in each_gradient(members, mine, about):
        first, last = (sum(rank[at][name] for rank in parts) for at in (0, -1))
        sums, old = [sum(micro[name] for micro in rank) for rank in parts], sum(old) / n
        mean, others = sum(sums) / (k * n), (sum(sums) - last) / (k * n)
        means[name] = (mean,)
        mistakes = [
            (f"{k} times too large: {k} micro-batches are added up, divide each loss by {k}", mean * k),
            (f"the sum over the ranks was not divided by {n}", mean * n),
            (f"neither divided by {k}, the micro-batches, nor by {n}, the ranks", mean * n * k),
            ("it is divided twice by the number of ranks", mean / n),
            (f"it is divided twice by {k}, the number of micro-batches", mean / k),
            ("only the last micro-batch is in it: zero_grad between them throws the others away", last / n),
            (f"only the last micro-batch is in it, divided by {k}: zero_grad between them throws the others away",
             last / n / k),
            (f"divided by the {ROWS} rows of a micro-batch: {by_rows}", mean * k / ROWS),
            (f"divided by all rows, {k * ROWS}: {by_rows}", mean / ROWS),
            ("the old gradient is still in it: zero_grad() first", mean + old),
            ("the old gradient is still in it: zero_grad() first", mean * k + old),
            (f"divided by the number of all ranks, {everyone}, where the group has {n}", mean * n / everyone),
            ("the last micro-batch is left out", others),
            ("only the first micro-batch is in it", first / n),
            (early, [others + rank[-1][name] / k for rank in parts]),
            (early, [first / (k * n) + (s - rank[0][name]) / k for s, rank in zip(sums, parts, strict=True)]),
            ("the ranks' losses are averaged, not their gradients: an all_reduce of a loss changes no gradient",
             [s / (k * n) for s in sums]),
            ("the ranks' gradients are not exchanged", [s / k for s in sums]),
            ("the ranks' gradients are not exchanged, and not divided", sums),
        ]  # fmt: skip
        mistakes = [m for m in mistakes if k > 1 or "micro" not in m[0]]
        same(after, mean, f"the gradient of {name}", about, mistakes, labels=members)
    return means


def _judge_way(members, mine, k, size, about):
    """Raise Wrong where the gradients are right, and the way there is not."""
    for rank, one in zip(members, mine, strict=True):
        made, given, where = sum(call.bytes for call in one.calls), one.kept["given"], f"rank {rank}, {about}"
        if k > 1 and made == k * size:
            why = f"the result is right, but it sends {k} times: once, after the last micro-batch, is enough"
            raise Wrong(why, where, f"{size:,} bytes", f"{made:,} bytes")
        if sorted(given) != [(i, ROWS) for i in range(k)]:
            why = "one forward of each is enough" if len(given) > k else "together they do not fit in memory"
            shown = f"loss_of for each of {k} micro-batches", f"{len(given)} calls"
            raise Wrong(f"loss_of has to see each micro-batch once, as it is: {why}", where, *shown)
        if not one.kept["in turn"]:
            raise Wrong("no backward in between: the activations of all of them are in memory at once", where)
        if one.kept["alive"]:
            why = "the activations of a micro-batch are still in memory when the next one begins: backward lets go of "
            raise Wrong(f"{why}them, unless it is told to keep them (retain_graph=True)", where)
        if not one.kept["training"]:
            raise Wrong("the result is right, but eval() was called: dropout and BatchNorm would differ", where)
        if not one.kept["as given"]:
            raise Wrong("the result is right, but `batches` was changed: others may use them too", where)


WHY = (
    "Gradients add up, so only their sum has to be averaged, once. DDP and FSDP have no_sync for it, Megatron "
    "waits for the last micro-batch in the same way."
)

exercise = Exercise(hints, check, minutes=10, level="medium", why=WHY)
