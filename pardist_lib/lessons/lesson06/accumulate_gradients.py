"""The exercise accumulate_gradients."""

import weakref

import torch
import torch.distributed as dist

from pardist_lib.ranks.report import plural

from ..exercises.cases import F32, F64
from ..exercises.exercise import Exercise
from ..exercises.gradients import OTHER_CALLS, PAIRS, Sample, gradients, judge_traffic, loss_of, rows_of_rank
from ..exercises.judge import Wrong, only_calls, same
from ..exercises.watch import watched
from .shared import group, in_their_group

hints = (
    "backward() adds to p.grad what it computes. So several backwards in a row give a sum of gradients, as long as "
    "nobody sets them to zero in between.",
    "The mean over k micro-batches: divide each loss by k before its backward. That over ranks: afterwards, once.",
    "Start with model.zero_grad(), or an old gradient is counted.",
)


def check(run):
    for n, k, dtype, in_pairs in ((4, 3, F64, False), (4, 1, F32, False), (3, 2, F64, False), (4, 2, F64, True)):
        about = f"{k} micro-batch{'es' * (k > 1)} on " + ("two groups of 2 ranks" if in_pairs else f"{n} ranks")
        seen = run(_accumulated, k, dtype, in_pairs, n=n, about=about)
        groups = PAIRS if in_pairs else [list(range(n))]
        for members in groups:
            _judge_accumulated([seen[r] for r in members], members, k, dtype, seen, about)


def _accumulated(answer, k, dtype, in_pairs):
    rank, model = dist.get_rank(), Sample(3, dtype)
    loss_of(model, rows_of_rank(99, rank, dtype)).backward()  # an old gradient
    batches, given, before = [(rows_of_rank(10 + i, rank, dtype), i) for i in range(k)], [], []
    old, weights, saved = model.fc1.weight.grad.clone(), [p.detach().clone() for p in model.parameters()], []
    asked, alive = list(batches), []

    def loss_fn(model, x, y):
        given.append((y, len(x)))
        before.append(None if model.fc1.weight.grad is None else model.fc1.weight.grad.detach().clone())
        alive.append(any(one() is not None for one in saved))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept(Box(t)), lambda box: box.t):
            return loss_of(model, x)

    class Box:  # stands for a tensor that autograd keeps, and is gone when backward has let go of it
        def __init__(self, t):
            self.t = t

    def kept(box):
        saved.append(weakref.ref(box))
        return box

    seen = watched(answer, model, batches, loss_fn, **group(in_pairs))
    changed = [
        name for name, p, weight in zip(dict(model.named_parameters()), model.parameters(), weights, strict=True)
        if not torch.equal(p, weight)
    ]  # fmt: skip
    same_rows = all(torch.equal(x, rows_of_rank(10 + i, rank, dtype)) for x, i in asked)
    moved = [g is not None and bool(g.any()) and not torch.equal(g, old) for g in before]
    trainable = {name: p.numel() * p.element_size() for name, p in model.named_parameters() if p.requires_grad}
    seen.kept = {"after": gradients(model), "given": given, "moved": moved, "trainable": trainable, "alive": alive}
    seen.kept |= {
        "touched": changed,
        "training": model.training,
        "batches": same_rows and [i for _, i in batches] == list(range(k)),
    }
    return seen


def _micro_gradient(seed, rank, dtype):
    model = Sample(3, dtype)
    loss_of(model, rows_of_rank(seed, rank, dtype)).backward()
    return gradients(model)


def _judge_accumulated(mine, members, k, dtype, seen, about):
    n = len(members)
    only_calls(mine, ("all_reduce",), OTHER_CALLS)
    in_their_group(members, mine, about)
    parts = [[_micro_gradient(10 + i, rank, dtype) for i in range(k)] for rank in members]
    old = [_micro_gradient(99, rank, dtype) for rank in members]
    means = {}
    for name, g in parts[0][0].items():
        after = [one.kept["after"][name] for one in mine]
        if g is None:
            if any(a is not None for a in after):
                raise Wrong(f"{name} had no gradient on any rank and now has one", about)
            continue
        sums = [sum(micro[name] for micro in rank) for rank in parts]
        mean, stale = sum(sums) / (k * n), [o[name] for o in old]
        means[name] = mean, sums, sums
        firsts, lasts = ([rank[at][name] for rank in parts] for at in (0, -1))
        last = sum(lasts) / n
        without_last = (sum(sums) - sum(lasts)) / (k * n)
        early = "the ranks' mean is made before the last micro-batch is in: add up first, exchange once at the end"
        mistakes = [
            (f"{k} times too large: {k} micro-batches are added up, divide each loss by {k}", mean * k),
            (f"the sum over the ranks was not divided by {n}", mean * n),
            (f"neither divided by {k}, the micro-batches, nor by {n}, the ranks", mean * n * k),
            ("it is divided twice by the number of ranks", mean / n),
            (f"it is divided twice by {k}, the number of micro-batches", mean / k),
            ("only the last micro-batch is in it: zero_grad between them throws the others away", last),
            ("only the last micro-batch is in it, and divided once too often", last / k),
            ("the old gradient is still in it: zero_grad() first", mean + sum(stale) / n),
            ("the old gradient is still in it: zero_grad() first", mean * k + sum(stale) / n),
            (f"divided by the number of all ranks, {len(seen)}, where the group has {n}", mean * n / len(seen)),
            ("the last micro-batch is left out", without_last),
            ("only the first micro-batch is in it", sum(firsts) / n),
            (early, [without_last + g / k for g in lasts]),
            (early, [sum(firsts) / (k * n) + (s - g) / k for s, g in zip(sums, firsts, strict=True)]),
            ("the ranks' losses are averaged, not their gradients: an all_reduce of a loss changes no gradient",
             [s / (k * n) for s in sums]),
            ("the ranks' gradients are not exchanged", [s / k for s in sums]),
            ("the ranks' gradients are not exchanged, and not divided", sums),
        ]  # fmt: skip
        if k == 1:
            mistakes = [m for m in mistakes if "micro" not in m[0]]
        mistakes = [(why, would if isinstance(would, list) else [would] * n) for why, would in mistakes]
        if any(a is None for a in after):
            raise Wrong(f"no gradient is left for {name}", f"{plural(members)}, {about}")
        same(after, [mean] * n, f"the gradient of {name}", about, mistakes, None, members)
    size = sum(mean.numel() * mean.element_size() for mean, *_ in means.values())
    for rank, one in zip(members, mine, strict=True):
        made, where = sum(call.bytes for call in one.calls), f"rank {rank}, {about}"
        if k > 1 and made == k * size:
            raise Wrong(f"the result is right, but it sends {k} times: once, after the last micro-batch, is enough",
                        where, f"{size:,} bytes", f"{made:,} bytes")  # fmt: skip
        if sorted(one.kept["given"]) != [(i, 3) for i in range(k)]:
            shown = {"expected": f"loss_of for each of {k} micro-batches", "got": f"{len(one.kept['given'])} calls"}
            more = len(one.kept["given"]) > k
            why = "one forward of each is enough" if more else "together they do not fit in memory"
            raise Wrong(f"loss_of has to see each micro-batch once, as it is: {why}", where, **shown)
        if not all(one.kept["moved"][1:]):
            raise Wrong("the next micro-batch begins before backward of the one before: the activations of all of them "
                        "are in memory at once", where)  # fmt: skip
        if any(one.kept["alive"]):
            raise Wrong("the activations of a micro-batch are still in memory when the next one begins: backward lets "
                        "go of them, unless it is told to keep them (retain_graph=True)", where)  # fmt: skip
        if one.kept["touched"]:
            raise Wrong(f"the weights have changed ({one.kept['touched'][0]} is the first): only gradients are to "
                        "change, steps are the optimizer's", where)  # fmt: skip
        if not one.kept["training"]:
            raise Wrong(
                "the result is right, but eval() was called: dropout and BatchNorm would do something else", where
            )
        if not one.kept["batches"]:
            raise Wrong("the result is right, but `batches` was changed: others may use them too", where)
    judge_traffic(members, mine, means, about, False)


exercise = Exercise(hints, check)
