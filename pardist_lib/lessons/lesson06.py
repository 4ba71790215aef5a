"""The exercises of lesson 06: hints, and how an answer is checked."""

import random
import sys
import weakref

import torch
import torch.distributed as dist
from torch.distributed import Work

from pardist_lib.ranks.report import plural

from .cases import F32, F64, values
from .judge import Wrong, only_calls, same
from .lesson00 import OTHER_CALLS, PAIRS, Sample, _gradients, _judge_average, _judge_traffic, _loss, _rows
from .watch import Other, _sequence, group_of, watched


def _group(in_pairs):
    groups = [group_of([0, 2]), group_of([1, 3])] if in_pairs else []
    return {"group": groups[dist.get_rank() % 2]} if in_pairs else {}


def _in_their_group(members, mine, about):
    for rank, one in zip(members, mine, strict=True):
        if strange := [call.op for call in one.calls if call.group and set(call.group) != set(members)]:
            raise Wrong(f"{strange[0]} goes over all ranks: `group` is missing from it", f"rank {rank}, {about}")


# ---- equal starts ---------------------------------------------------------------------------------------------


class Starting(torch.nn.Module):
    """Parameters (one used twice, two frozen) and buffers: a BatchNorm's, and one that state_dict() leaves out."""

    def __init__(self, seed, dtype=F32):
        super().__init__()
        self.fc, self.norm = torch.nn.Linear(3, 4, dtype=dtype), torch.nn.BatchNorm1d(4, dtype=dtype)
        self.tied, self.frozen = torch.nn.Linear(3, 4, dtype=dtype), torch.nn.Linear(2, 2, dtype=dtype)
        self.tied.weight = self.fc.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("mask", torch.zeros(3, dtype=dtype), persistent=False)
        for i, t in enumerate([*self.parameters(), *self.buffers()]):
            t.data = values(t.shape, t.dtype, seed, i)

    def tensors(self):
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


class broadcast_model:
    hints = (
        "dist.broadcast(t, src) overwrites t on every rank by what rank src has. What does a model's state consist of?",
        "model.parameters() has the frozen ones, too, and a shared one once; model.buffers() has what is state but no "
        "parameter: a BatchNorm's running mean, for one.",
        "src counts all ranks of the world. The first of a group is dist.get_global_rank(group, 0); or say "
        "group_src=0 instead of src.",
    )

    @staticmethod
    def check(run):
        for in_pairs, n, dtype in ((False, 4, F32), (True, 4, F64), (False, 3, F64)):
            members = PAIRS if in_pairs else [list(range(n))]
            about = "two groups of 2 ranks" if in_pairs else f"{n} ranks"
            stuck = "the ranks do not make the same calls: each has to broadcast the same tensors in the same order"
            try:
                seen = run(_start, dtype, in_pairs, n=n, about=about, stuck=stuck)
            except Wrong as wrong:
                if "not part of" in wrong.diagnosis:
                    wrong.diagnosis = (
                        "src counts all ranks, and the first one of ranks 1, 3 is not rank 0: "
                        "dist.get_global_rank(group, 0), or group_src=0"
                    )
                raise
            for ranks in members:
                _judge_start([seen[r] for r in ranks], ranks, about)


def _start(answer, dtype, in_pairs):
    model = Starting(dist.get_rank(), dtype)
    before = {name: t.detach().clone() for name, t in model.tensors().items()}
    objects = {name: (id(t), t.requires_grad) for name, t in model.tensors().items()}
    seen = watched(answer, model, **_group(in_pairs))
    now = model.tensors()
    kinds = {name: (id(t), t.requires_grad) for name, t in now.items()}  # a weight that is tied no more has a name, too
    replaced = [name for name in {**objects, **kinds} if kinds.get(name) != objects.get(name)]
    after = {name: now[name].detach().clone() for name in before if name in now}
    left = ["eval() was called"] if not model.training else ["parameters have gradients now"] * any(
        p.grad is not None for p in model.parameters())  # fmt: skip
    seen.kept = {"before": before, "after": after, "replaced": replaced, "left": left}
    return seen


def _judge_start(mine, ranks, about):
    because = {
        "all_reduce": "it calls all_reduce: a mean of random starts is no longer what one of them was drawn to be (and "
        "all of them near zero); one rank's values are asked for",
        "": "it calls {op}: dist.broadcast of each tensor is all that is needed",
    }
    only_calls(mine, ("broadcast",), because)
    first, *others = mine
    for rank, one in zip(ranks, mine, strict=True):
        if one.kept["replaced"]:
            raise Wrong(
                f"{one.kept['replaced'][0]} is another tensor than before (or trainable where it was not): the "
                "optimizer still holds the old one, so write into it",
                f"rank {rank}, {about}",
            )
    _in_their_group(ranks, mine, about)
    wanted = first.kept["before"]
    stale = [name for name, t in wanted.items()
             if all(torch.equal(o.kept["after"][name], o.kept["before"][name]) for o in others)]  # fmt: skip
    buffers = [name for name in wanted if name.startswith(("norm.running", "norm.num", "mask"))]
    if stale:
        if stale == list(wanted):
            talked = any(one.calls for one in mine)
            why = "the values arrived in a copy: write them into the model's own" if talked else "nothing was sent"
        elif stale == ["mask"]:
            why = "mask is a buffer that state_dict() leaves out (persistent=False): buffers() has it"
        elif stale == buffers:
            why = "the buffers are left out: the running statistics of a BatchNorm are state, too"
        elif set(stale) <= set(buffers):
            why = f"{stale[0]} is a buffer and left out: all of model.buffers() are state, the whole numbers, too"
        elif set(stale) <= {"frozen.weight", "frozen.bias", *buffers}:
            why = f"{stale[0]} is left out: a frozen parameter does not change, but it has to be equal as well"
        else:
            why = f"{', '.join(stale[:3])}{' …' * (len(stale) > 3)} still hold each rank's own values"
        raise Wrong(why, f"{plural(ranks[1:])}, {about}")
    for name, t in wanted.items():
        mistakes = []
        for rank, one in zip(ranks, mine, strict=True):
            why = f"every rank has what rank {rank} had: the group's first, rank {ranks[0]}, is asked for"
            mistakes.append((why, [one.kept["before"][name]] * len(mine)))
        same([one.kept["after"][name] for one in mine], [t] * len(mine), name, about, mistakes, None, ranks)
    size = sum(t.numel() * t.element_size() for t in wanted.values())
    twice = wanted["fc.weight"].numel() * wanted["fc.weight"].element_size()  # state_dict() names it twice
    for rank, one in zip(ranks, mine, strict=True):
        if sum(call.bytes for call in one.calls) > size + twice:
            raise Wrong("the values are right, but tensors are sent more than once", f"rank {rank}, {about}",
                        f"{size:,} bytes", f"{sum(call.bytes for call in one.calls):,} bytes")  # fmt: skip
        for what in one.kept["left"]:
            raise Wrong(f"the values are right, but {what}: nothing else is to change", f"rank {rank}, {about}")


# ---- averaging in hooks ---------------------------------------------------------------------------------------


class average_in_hooks:
    hints = (
        "p.register_post_accumulate_grad_hook(f) calls f(p) in every backward, once p.grad is complete. What it is "
        "given is the parameter: its gradient is p.grad.",
        "Define one function of p that does to p.grad what average_gradients of lesson 0 did, and register it with "
        "each parameter whose requires_grad is True.",
        "A lambda in a loop that uses the loop's variable sees its last value: use the hook's own argument.",
    )

    @staticmethod
    def check(run):
        cases = [
            (4, F64, False, False, False), (4, F32, True, False, False), (4, F64, True, True, False),
            (3, F64, True, False, False), (4, F64, True, False, True), (4, F64, True, False, False, True),
            (4, F64, True, False, False, False, 1),
        ]  # fmt: skip
        for n, dtype, same_weights, in_pairs, second, *more in cases:
            placed, zero = any(more[:1]), len(more) > 1
            about = "two groups of 2 ranks" if in_pairs else f"{n} ranks"
            about += ", the second backward" if second else ", a parameter added to a layer's result" if placed else ""
            about += ", all gradients of rank 1 zero" if zero else ""
            stuck = "rank 1 does not make the calls that the others make: its gradients are zero here, and count" * zero
            seen = run(_hooked, dtype, same_weights, in_pairs, second, *more, n=n, about=about, stuck=stuck)
            try:
                _judge_average(seen, PAIRS if in_pairs else [list(range(n))], about)
            except Wrong as wrong:
                if wrong.diagnosis.startswith("the weights have changed"):
                    wrong.diagnosis = f"a hook is given the parameter p, not its gradient p.grad: {wrong.diagnosis}"
                elif wrong.diagnosis.startswith("only extra.bias is averaged"):
                    wrong.diagnosis += ". Does the hook use the loop's variable, which is the last parameter by then?"
                elif placed:
                    wrong.diagnosis = (
                        "register_hook is given a gradient on its way: the layers below are computed from the same "
                        f"tensor, so average a copy of it ({wrong.diagnosis})"
                    )
                raise
            for rank, one in enumerate(seen):
                if one.kept["early"]:
                    raise Wrong(
                        f"{one.kept['early']} calls are made before there is any gradient: average in the hooks only",
                        f"rank {rank}, {about}",
                    )
                if one.kept["made"]:
                    why = f"{one.kept['made'][0]} has a gradient before any backward: what no rank uses would keep it"
                    raise Wrong(why, f"rank {rank}, {about}")
                if not one.kept["within"]:
                    raise Wrong(
                        "the means are made after backward, not in it: each gradient's hook makes its own",
                        f"rank {rank}, {about}",
                    )


class Placed(Sample):
    """Sample with a parameter added to what a layer gives: backward hands one tensor to both."""

    def __init__(self, seed, dtype):
        super().__init__(seed, dtype)
        self.place = torch.nn.Parameter(values((3, 8), dtype, seed, 5))

    def forward(self, x):
        return self.extra(torch.tanh(self.fc2(torch.tanh(self.fc1(x)) + self.place)))


def _hooked(answer, dtype, same_weights, in_pairs, second, placed=False, zero_on=None):
    rank, kept, kind = dist.get_rank(), {}, Placed if placed else Sample
    model, twin = (kind(1 if same_weights else 1 + rank, dtype) for _ in range(2))
    scale = float(rank != zero_on)
    (_loss(twin, _rows(1 + second, rank, dtype)) * scale).backward()
    before, weights = _gradients(twin), {name: p.detach().clone() for name, p in model.named_parameters()}

    trainable = {name: p.numel() * p.element_size() for name, p in model.named_parameters() if p.requires_grad}

    def first_layer(gradient):  # the last one to be computed
        kept["within"] = _sequence() > kept["started"]

    def everything():
        sequence = _sequence()
        answer(model, **_group(in_pairs))
        kept["early"] = _sequence() - sequence
        kept["made"] = [name for name, p in model.named_parameters() if p.grad is not None]
        model.fc1.weight.register_hook(first_layer)
        for backward in range(1 + second):
            model.zero_grad()
            kept["started"], kept["earlier calls"] = _sequence(), _sequence() - sequence
            (_loss(model, _rows(1 + backward, rank, dtype)) * scale).backward()

    seen = watched(everything)
    seen.calls = seen.calls[kept["earlier calls"] :] if second else seen.calls
    seen.ops = set()  # backward's own divisions are among them
    touched = [name for name, p in model.named_parameters() if not torch.equal(p, weights[name])]
    turned = [name for name, p in model.named_parameters() if p.requires_grad != (name in trainable)]
    seen.kept = {"before": before, "after": _gradients(model), "touched": touched, "turned": turned, **kept}
    seen.kept["trainable"] = trainable
    return seen


# ---- the order of buckets -------------------------------------------------------------------------------------


class reduce_buckets:
    hints = (
        "An all_reduce meets the other ranks' all_reduce that was called in the same place of their sequence, whatever "
        "is in it. So the order of calls must not depend on what arrives first here.",
        "Keep arrived buckets in a dict by number, and remember which number is next. After an arrival, start the next "
        "one while it is there: one arrival may set free several.",
        "dist.all_reduce(…, async_op=True) returns a work; call its wait() after the loop, and divide then.",
    )

    @staticmethod
    def check(run):
        stuck = (
            "the ranks do not start the same buckets in the same order: what is full first differs from rank to rank"
        )
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
    given, started, waited, begun, waits = list(buckets), [], [], _sequence(), [0]
    plain = Work.wait, torch._C.Future.wait

    def counted(wait):
        def waiting(*args, **kwargs):
            waits[0] += 1
            return wait(*args, **kwargs)

        return waiting

    def arriving():
        for number in orders[rank]:
            yield number, buckets[number]
            started.append(_sequence() - begun)
            waited.append(waits[0])

    Work.wait, torch._C.Future.wait = map(counted, plain)
    try:
        seen = watched(answer, arriving(), **_group(in_pairs))
    finally:
        Work.wait, torch._C.Future.wait = plain
    seen.kept = {"after": given, "started": started, "waited": waited}
    return seen


def _judge_buckets(mine, members, sizes, orders, dtype, about):
    n = len(members)
    only_calls(mine, ("all_reduce",), {"": "it calls {op}: one all_reduce of each bucket is all that is needed"})
    _in_their_group(members, mine, about)
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


# ---- accumulation ---------------------------------------------------------------------------------------------


class accumulate_gradients:
    hints = (
        "backward() adds to p.grad what it computes. So several backwards in a row give a sum of gradients, as long as "
        "nobody sets them to zero in between.",
        "The mean over k micro-batches: divide each loss by k before its backward. That over ranks: afterwards, once.",
        "Start with model.zero_grad(), or an old gradient is counted.",
    )

    @staticmethod
    def check(run):
        for n, k, dtype, in_pairs in ((4, 3, F64, False), (4, 1, F32, False), (3, 2, F64, False), (4, 2, F64, True)):
            about = f"{k} micro-batch{'es' * (k > 1)} on " + ("two groups of 2 ranks" if in_pairs else f"{n} ranks")
            seen = run(_accumulated, k, dtype, in_pairs, n=n, about=about)
            groups = PAIRS if in_pairs else [list(range(n))]
            for members in groups:
                _judge_accumulated([seen[r] for r in members], members, k, dtype, seen, about)


def _accumulated(answer, k, dtype, in_pairs):
    rank, model = dist.get_rank(), Sample(3, dtype)
    _loss(model, _rows(99, rank, dtype)).backward()  # an old gradient
    batches, given, before = [(_rows(10 + i, rank, dtype), i) for i in range(k)], [], []
    old, weights, saved = model.fc1.weight.grad.clone(), [p.detach().clone() for p in model.parameters()], []
    asked, alive = list(batches), []

    def loss_of(model, x, y):
        given.append((y, len(x)))
        before.append(None if model.fc1.weight.grad is None else model.fc1.weight.grad.detach().clone())
        alive.append(any(one() is not None for one in saved))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept(Box(t)), lambda box: box.t):
            return _loss(model, x)

    class Box:  # stands for a tensor that autograd keeps, and is gone when backward has let go of it
        def __init__(self, t):
            self.t = t

    def kept(box):
        saved.append(weakref.ref(box))
        return box

    seen = watched(answer, model, batches, loss_of, **_group(in_pairs))
    changed = [
        name for name, p, weight in zip(dict(model.named_parameters()), model.parameters(), weights, strict=True)
        if not torch.equal(p, weight)
    ]  # fmt: skip
    same_rows = all(torch.equal(x, _rows(10 + i, rank, dtype)) for x, i in asked)
    moved = [g is not None and bool(g.any()) and not torch.equal(g, old) for g in before]
    trainable = {name: p.numel() * p.element_size() for name, p in model.named_parameters() if p.requires_grad}
    seen.kept = {"after": _gradients(model), "given": given, "moved": moved, "trainable": trainable, "alive": alive}
    seen.kept |= {
        "touched": changed,
        "training": model.training,
        "batches": same_rows and [i for _, i in batches] == list(range(k)),
    }
    return seen


def _micro_gradient(seed, rank, dtype):
    model = Sample(3, dtype)
    _loss(model, _rows(seed, rank, dtype)).backward()
    return _gradients(model)


def _judge_accumulated(mine, members, k, dtype, seen, about):
    n = len(members)
    only_calls(mine, ("all_reduce",), OTHER_CALLS)
    _in_their_group(members, mine, about)
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
    _judge_traffic(members, mine, means, about, False)


# ---- the sampler ----------------------------------------------------------------------------------------------


class sample_indices:
    hints = (
        "If all ranks shuffle all samples in the same way, each can take its own part of the same order.",
        "torch.randperm(length, generator=torch.Generator().manual_seed(…)) gives the same order on every rank, and "
        "leaves the global random numbers alone. What has to be in the seed, and what must not?",
        "order[rank::n] takes every n-th one: some ranks get one more, none gets one twice.",
    )

    @staticmethod
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


# ---- unequal shards -------------------------------------------------------------------------------------------


class weighted_gradients:
    hints = (
        "The mean over all rows is Σ rows·gradient over the ranks, divided by all rows. Is that the mean of the means?",
        "First all-reduce the number of rows, in a tensor of one element. A rank's part is then rows / total.",
        "Multiply p.grad by that part, then add up over the ranks; nothing is left to divide by.",
    )

    @staticmethod
    def check(run):
        cases = [([5, 3, 2, 1], F64, False), ([3, 3, 3, 3], F32, False), ([4, 0, 1, 3], F64, False),
                 ([6, 1, 2], F64, False), ([2, 5, 4, 2], F64, True), ([2500, 3, 0, 2], F64, False),
                 ([1, 4, 2, 3], F64, False, "the second call, after one with a row each")]  # fmt: skip
        for sizes, dtype, in_pairs, *second in cases:
            n, stuck = len(sizes), "the ranks do not make the same calls, in the same order"
            stuck += ": a rank without rows has to take part, too" if 0 in sizes else ""
            about = f"{', '.join(map(str, sizes))} rows on " + ("two groups of 2 ranks" if in_pairs else f"{n} ranks")
            about = ", ".join([about, *second])
            seen = run(_weighed, sizes, dtype, in_pairs, bool(second), n=n, about=about, stuck=stuck)
            try:
                for members in PAIRS if in_pairs else [list(range(n))]:
                    _judge_weighed(seen, members, sizes, about)
            except Wrong as wrong:
                if max(sizes) > 2048 and ("16 bits" in wrong.diagnosis or "times as large" in wrong.diagnosis):
                    wrong.diagnosis = f"the number of rows does not survive the type it travels in: {wrong.diagnosis}"
                elif second:
                    wrong.diagnosis = f"it works once; is something kept from the first call? {wrong.diagnosis}"
                raise


def _weighed(answer, sizes, dtype, in_pairs, second):
    rank, model, earlier = dist.get_rank(), Sample(4, dtype), Sample(4, dtype)
    if second:
        _loss(earlier, _rows(19, rank, dtype)[:1]).backward()
        answer(earlier, 1, **_group(in_pairs))
    rows = torch.cat([_rows(20 + i, rank, dtype) for i in range(3)]).repeat(1 + sizes[rank] // 9, 1)[: sizes[rank]]
    _loss(model, rows).backward()
    before, weights = _gradients(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    seen = watched(answer, model, sizes[rank], **_group(in_pairs))
    touched = [name for name, p in model.named_parameters() if not torch.equal(p, weights[name])]
    turned = [name for name, p in model.named_parameters() if p.requires_grad != (name in trainable)]
    seen.kept = {"before": before, "after": _gradients(model), "touched": touched, "turned": turned}
    return seen


def _judge_weighed(seen, members, sizes, about):
    mine, rows, n = [seen[r] for r in members], [sizes[r] for r in members], len(members)
    for rank, one in zip(members, mine, strict=True):
        for call in one.calls:
            if call.op != "all_reduce" and 0 < call.bytes <= 8 * n:
                why = f"it calls {call.op} for the number of rows: an all_reduce adds it up, everywhere"
                raise Wrong(why, f"rank {rank}, {about}")
    only_calls(mine, ("all_reduce",), OTHER_CALLS)
    for rank, one in zip(members, mine, strict=True):
        if one.kept["touched"]:
            raise Wrong(f"the weights have changed ({one.kept['touched'][0]} is the first)", f"rank {rank}, {about}")
        if one.kept["turned"]:
            why = f"it changed requires_grad ({one.kept['turned'][0]} is the first): only the gradients are to change"
            raise Wrong(why, f"rank {rank}, {about}")
    size = total_rows = 0
    for name in mine[0].kept["before"]:
        own, after = ([one.kept[when][name] for one in mine] for when in ("before", "after"))
        if own[0] is None:
            if any(a is not None for a in after):
                raise Wrong(f"{name} had no gradient on any rank and now has one", about)
            continue
        if any(a is None for a in after):
            raise Wrong(f"no gradient is left for {name}", about)
        total_rows, size = sum(rows), size + own[0].numel() * own[0].element_size()
        right = sum(r * g for r, g in zip(rows, own, strict=True)) / total_rows
        everywhere = sum(r * one.kept["before"][name] for r, one in zip(sizes, seen, strict=True))
        with_rows = sum(r > 0 for r in rows)
        mistakes = [
            ("this is the mean of the ranks' means: a row on a rank with few rows counts more", sum(own) / n),
            ("the mean of the means, over the ranks that have rows: each row has to count alike", sum(own) / with_rows),
            (f"{n} times too small: the parts rows / total add up to 1, so nothing is left to divide by", right / n),
            ("not divided by all rows: it is the sum over all rows", right * total_rows),
            (f"divided by {n} ranks, not by {total_rows} rows", right * total_rows / n),
            ("the plain sum: rows are not used, and nothing is divided", sum(own)),
            (f"{n} times too large: n · rows / total wants the mean over the ranks, and this is the sum", right * n),
            ("the sum over the ranks is weighted, not each rank's part of it: multiply before all_reduce",
             [sum(own) * r / total_rows for r in rows]),
            ("the ranks' gradients are weighted, but not added up",
             [r * g / total_rows for r, g in zip(rows, own, strict=True)]),
            ("the rows are counted over all ranks of the world: the group is left out", everywhere / sum(sizes)),
            ("the rows are counted over all ranks of the world: the group is left out", right * sum(rows) / sum(sizes)),
            ("zero: rows // total is an integer division", 0 * right),
            ("the largest number of rows is divided by, not all of them", right * total_rows / max(rows)),
        ]  # fmt: skip
        if len(set(rows)) == 1:
            mistakes = mistakes[2:]
        mistakes = [(why, would if isinstance(would, list) else [would] * n) for why, would in mistakes]
        same(after, [right] * n, f"the gradient of {name}", about, mistakes, own, members)
    for rank, one in zip(members, mine, strict=True):
        made = sum(call.bytes for call in one.calls)
        if not size < made <= size + 8:
            raise Wrong("the result is right, but more travels than each gradient once and the number of rows",
                        f"rank {rank}, {about}", f"{size:,} bytes and up to 8 more", f"{made:,} bytes")  # fmt: skip


# ---- error feedback -------------------------------------------------------------------------------------------


class top_k_step:
    hints = (
        "wanted = gradient + residual is what this rank would like to add. wanted.abs().topk(k).indices are the "
        "places of its k largest elements; wanted[places] keeps their sign.",
        "Other ranks choose other places, so all_reduce cannot add them up: all_gather values and places, and add "
        "every rank's values in its own places.",
        "rest is wanted with zeros in the places that were sent. mean[places] += values / n adds; mean[places] = … "
        "would forget what another rank sent for the same place.",
    )

    @staticmethod
    def check(run):
        cases = [(4, 8, 2, F32, False), (4, 8, 2, F64, False), (3, 9, 1, F64, False), (2, 5, 5, F64, False),
                 (4, 6, 3, F64, True), (4, 4000, 9, F64, False)]  # fmt: skip
        for seed, (n, size, k, dtype, in_pairs) in enumerate(cases):
            about = f"k = {k} of {size} {str(dtype)[6:]} on " + ("two groups of 2 ranks" if in_pairs else f"{n} ranks")
            seen = run(_compressed, size, k, dtype, seed, in_pairs, n=n, about=about)
            for members in PAIRS if in_pairs else [list(range(n))]:
                _judge_compressed([seen[r] for r in members], members, size, k, dtype, seed, about)
        about = "k = 2 of 6 float64 on 4 ranks, all equally large"
        _judge_ties(run(_compressed, 6, 2, F64, TIES, False, n=4, about=about), 6, 2, about)


TIES = 100  # a seed for elements of one size: which ones are sent is free, how many is not


def _vectors(size, dtype, seed, rank):
    """This rank's gradient and residual; the ranks like some places alike. The first case begins without residual."""
    if seed == TIES:
        return values((size,), dtype, rank, 3).sign(), torch.zeros(size, dtype=dtype)
    shared = values((size,), dtype, 77, seed)
    gradient = shared + values((size,), dtype, rank, seed)
    return gradient, torch.zeros_like(gradient) if seed == 0 else 2 * values((size,), dtype, 50 + rank, seed)


def _compressed(answer, size, k, dtype, seed, in_pairs):
    gradient, residual = _vectors(size, dtype, seed, dist.get_rank())
    seen = watched(answer, gradient, residual, k, **_group(in_pairs))
    seen.kept = gradient, residual
    return seen


def _judge_ties(seen, size, k, about):
    given = [sum(_vectors(size, F64, TIES, rank)) for rank in range(len(seen))]
    for rank, (one, full) in enumerate(zip(seen, given, strict=True)):
        rest = one.result[1]
        if not bool(((rest == 0) | (rest == full)).all()) or int((rest != 0).sum()) != size - k:
            raise Wrong(f"exactly {k} elements are sent, and rest keeps all others: of equally large ones, too",
                        f"rank {rank}, rest, {about}", f"{size - k} elements of {full.tolist()} left",
                        f"{rest.tolist()}")  # fmt: skip
    mean = sum(full - one.result[1] for one, full in zip(seen, given, strict=True)) / len(seen)
    same([one.result[0] for one in seen], [mean] * len(seen), "mean", about)


def _chosen(values_, by, k):
    """`values_` where `by` is among its k largest, zero elsewhere."""
    return torch.zeros_like(values_).index_copy(0, by.topk(k).indices, values_[by.topk(k).indices])


def _judge_compressed(mine, members, size, k, dtype, seed, about):
    n, inputs = len(members), [_vectors(size, dtype, seed, rank) for rank in members]
    because = {
        "all_reduce": "it calls all_reduce, which sends all elements: all_gather what was chosen, with its places",
        "": "it calls {op}: all_gather brings every rank what the others have chosen",
    }
    only_calls(mine, ("all_gather",), because)
    _in_their_group(members, mine, about)
    for rank, one, given in zip(members, mine, inputs, strict=True):
        if not all(torch.equal(a, b) for a, b in zip(one.kept, given, strict=True)):
            raise Wrong("gradient or residual was changed: neither is to be", f"rank {rank}, {about}")
        if not isinstance(one.result, (tuple, list)) or len(one.result) != 2:
            raise Wrong("it does not return a pair (mean, rest)", f"rank {rank}, {about}")
    wanted = [g + e for g, e in inputs]
    sent = [_chosen(w, w.abs(), k) for w in wanted]
    mean = sum(sent) / n
    last = torch.zeros_like(mean)
    for s in sent:
        last = torch.where(s != 0, s, last)
    shortened = {}
    for bits, kind in ((8, torch.uint8), (16, torch.float16)):
        places = [w.abs().topk(k).indices for w in wanted]
        shortened[bits] = sum(
            torch.zeros_like(mean).index_put((p.to(kind).long().clamp(max=size - 1),), w[p] / n, accumulate=True)
            for p, w in zip(places, wanted, strict=True)
        )
    misplaced = []
    for w in wanted:
        places = w.abs().topk(k).indices
        misplaced.append(
            torch.zeros_like(mean).index_copy(0, places, sum(v[v.abs().topk(k).indices] for v in wanted) / n)
        )
    plain = [g for g, _ in inputs]
    two = min(2, size)
    mistakes = [
        *[("k is not used: 2 elements of each rank are sent", sum(_chosen(w, w.abs(), two) for w in wanted) / n)
          ] * (k != two),
        ("the residual is not added before choosing: what was left out never gets its turn",
         sum(_chosen(g, g.abs(), k) for g in plain) / n),
        ("chosen among gradient alone: what was left out grows, but never gets its turn",
         sum(_chosen(w, g.abs(), k) for w, g in zip(wanted, plain, strict=True)) / n),
        ("gradient is sent where gradient + residual was chosen: what was left out stays out",
         sum(_chosen(g, w.abs(), k) for w, g in zip(wanted, plain, strict=True)) / n),
        ("the largest elements are chosen, not the largest in absolute value: negative ones never travel",
         sum(_chosen(w, w, k) for w in wanted) / n),
        ("the absolute values are sent: the sign is lost", sum(s.abs() for s in sent) / n),
        ("the smallest elements are chosen", sum(_chosen(w, -w.abs(), k) for w in wanted) / n),
        (f"the sum was not divided by {n}, the number of ranks", mean * n),
        ("where several ranks send the same place, only the last one counts: add, do not assign", last / n),
        ("where several ranks send the same place, only the last one counts, and nothing is divided", last),
        ("each rank has only what it sent itself", [s / n for s in sent]),
        ("each rank has only what it sent itself, undivided", sent),
        ("every rank's values are put in this rank's own places: gather the places, too", misplaced),
        ("divided by the number of ranks that sent the place, not by all of them: the others sent zero",
         sum(sent) / sum((s != 0).to(dtype) for s in sent).clamp(min=1)),
        (f"divided by the number of all ranks, 4, where the group has {n}", mean * n / 4),
        *((f"the places go through {bits} bits, too few for {size} of them", would)
          for bits, would in shortened.items()),
        ("it returns (rest, mean): mean comes first", [w - s for w, s in zip(wanted, sent, strict=True)]),
        ("this is the mean of everything: only k elements of each rank are to be sent", sum(wanted) / n),
    ]  # fmt: skip
    if k == size:
        mistakes = [m for m in mistakes if "everything" not in m[0] and "absolute" not in m[0]]
    mistakes = [(why, would if isinstance(would, list) else [would] * n) for why, would in mistakes]
    same([one.result[0] for one in mine], [mean] * n, "mean", about, mistakes, None, members)
    rest = [w - s for w, s in zip(wanted, sent, strict=True)]
    mistakes = [
        ("rest is always zero: what was not sent is forgotten", [torch.zeros_like(mean)] * n),
        ("rest still holds what was sent: it would be sent again", wanted),
        ("rest leaves the old residual out: gradient + residual - sent is left",
         [g - s for g, s in zip(plain, sent, strict=True)]),
        ("rest leaves the old residual out where nothing was sent",
         [torch.where(s != 0, 0, g) for g, s in zip(plain, sent, strict=True)]),
        ("rest counts the old residual twice", [e + w - s for (_, e), w, s in zip(inputs, wanted, sent, strict=True)]),
        ("rest is what was sent: what was not sent is asked for", sent),
        ("rest subtracts the ranks' mean: each rank keeps what it has not sent itself", [w - mean for w in wanted]),
        ("rest is the old residual, unchanged", [e for _, e in inputs]),
        ("rest has zeros where any rank sent: this rank's own places only", [w * (mean == 0) for w in wanted]),
    ]  # fmt: skip
    same([one.result[1] for one in mine], rest, "rest", about, mistakes, None, members)
    for rank, one in zip(members, mine, strict=True):
        made, most = (
            sum(call.bytes for call in one.calls) // n,
            k * (mean.element_size() + 8),
        )  # what comes in is n times
        if made > most:
            raise Wrong("the result is right, but more travels than k elements and k places", f"rank {rank}, {about}",
                        f"at most {most:,} bytes", f"{made:,} bytes")  # fmt: skip
        if len(one.calls) > 2:
            raise Wrong(f"the result is right, but it takes {len(one.calls)} calls: one for the elements and one for "
                        "their places are enough", f"rank {rank}, {about}")  # fmt: skip
