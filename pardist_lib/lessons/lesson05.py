"""The exercises of lesson 05: hints, and how an answer is checked."""

import itertools

import torch
import torch.distributed as dist

from pardist_lib.ranks.report import plural

from .cases import F32, F64, values
from .judge import Wrong, by_hand, equal, only_calls, peers, same, sent, show, type_of
from .lesson00 import PAIRS, Sample
from .watch import Other, Seen, group_of, watched

OTHER_CALLS = {
    "broadcast": "it broadcasts one rank's parameters: the others' training is lost, a mean needs all_reduce",
    "reduce": "it calls reduce, which brings the sum to one rank only: all_reduce brings it to all",
    "all_gather": "it calls all_gather, which brings every rank's tensor to every rank, n times as many bytes: "
    "all_reduce adds up on the way",
    "": "it calls {op}: all_reduce is all that is needed",
}


def parameters_of(named):
    return {name: p.detach().clone() for name, p in named.items()}


def gradients_of(named):
    return {name: None if p.grad is None else p.grad.clone() for name, p in named.items()}


def replaced(named, model, trained):
    """A sentence where the model has other Parameters than before, or others are frozen, else an empty one."""
    now = dict(model.named_parameters())
    for name, p in named.items():
        if now.get(name) is not p:
            return f"the model has another {name} now: write into the one that is there, the optimizer holds on to it"
        if p.requires_grad != (name in trained):
            state = "takes no gradient any more" if name in trained else "takes a gradient now"
            return f"{name} {state}: leave requires_grad as it was, p.data and torch.no_grad() do without"
    return ""


def alike(a, b):
    return a is None and b is None or a is not None and b is not None and torch.equal(a, b)


# ---- average_by_rows ------------------------------------------------------------------------------------------


EARLIER = [3, 4]  # rows in a call before


def _average_by_rows(answer, seed, dtype, rows, in_pairs=False):
    """On a rank: a model of its own, with gradients, averaged by the answer."""
    rank = dist.get_rank()
    model = Sample(seed + rank, dtype)
    model.fc1.bias.requires_grad_(len(rows) != 3)  # what is frozen is not told by its name
    model.register_buffer("statistics", torch.full((8,), float(rank), dtype=dtype))
    model(torch.ones(2, 6, dtype=dtype)).sum().backward()
    named = dict(model.named_parameters())
    before, gradients = parameters_of(named), gradients_of(named)
    trained = {name: p.numel() * p.element_size() for name, p in named.items() if p.requires_grad}
    groups = [group_of([0, 2]), group_of([1, 3])] if in_pairs else []
    if len(rows) == 2:  # not the first call in this process
        watched(answer, Sample(seed, dtype), EARLIER[rank])
    seen = watched(answer, model, rows[rank], **({"group": groups[rank % 2]} if in_pairs else {}))
    touched = [name for name, g in gradients_of(named).items() if not alike(g, gradients[name])]
    seen.kept = {"before": before, "after": parameters_of(named), "touched": touched, "trained": trained}
    seen.kept |= {"replaced": replaced(named, model, trained), "buffer": bool((model.statistics == rank).all())}
    return seen


class average_by_rows:
    hints = (
        "A mean of means is not the mean of all rows where some ranks have more rows than others: multiply each rank's "
        "parameters by its rows, add up, divide by all rows.",
        "Nobody knows all rows yet: all_reduce a tensor with this rank's number gives their sum.",
        "Multiply p.data by rows / total in place, then dist.all_reduce(p.data, group=group): the shares add up to 1.",
    )

    @staticmethod
    def check(run):
        cases = [  # rows, dtype, in pairs
            ([300, 40, 15, 5], F64, False),
            ([7, 7, 7, 7], F32, False),
            ([1000, 0, 3, 200], F32, False),
            ([90, 6, 10, 50], F64, True),
            ([11, 2, 5], F64, False),
            ([1, 4], F32, False),
        ]
        for seed, (rows, dtype, in_pairs) in enumerate(cases):
            n = len(rows)
            about = f"{'two groups of 2' if in_pairs else n} ranks with {', '.join(map(str, rows))} rows"
            stuck = "the ranks do not make the same calls: a rank without rows has to take part too, it counts as 0"
            seen = run(_average_by_rows, 10 * seed, dtype, rows, in_pairs, n=n, about=about, stuck=stuck)
            for members in PAIRS if in_pairs else [range(n)]:
                _judge_by_rows(seen, list(members), rows, about)


def _judge_by_rows(seen, members, rows, about):
    mine, n = [seen[r] for r in members], len(members)
    only_calls(mine, ("all_reduce",), OTHER_CALLS)
    own_rows = [rows[r] for r in members]
    total = sum(own_rows)
    for rank, one in zip(members, mine, strict=True):
        if one.kept["replaced"]:
            raise Wrong(one.kept["replaced"], f"rank {rank}, {about}")
        if one.kept["touched"]:
            why = f"the gradient of {one.kept['touched'][0]} has changed: average the parameters, not the gradients"
            raise Wrong(why, f"rank {rank}, {about}")
        for name in one.kept["before"]:
            if name not in one.kept["trained"] and not torch.equal(one.kept["before"][name], one.kept["after"][name]):
                why = f"{name} is frozen and has changed: leave out what does not require a gradient"
                raise Wrong(why, f"rank {rank}, {about}")
        if not one.kept["buffer"]:
            why = "`statistics` has changed, which is a buffer: only model.parameters() are averaged"
            raise Wrong(why, f"rank {rank}, {about}")
        for call in one.calls:
            if call.dtype in ("float16", "bfloat16", "int8", "uint8"):
                why = f"rows are added up as {call.dtype}, which cannot hold the number of rows of a real data set"
                if call.bytes > 2:
                    why = f"the parameters are added up as {call.dtype}: add them up in their own dtype"
                raise Wrong(why, f"rank {rank}, {about}")
    for place, name in enumerate(mine[0].kept["trained"]):
        never = "a mean was made but never reached the model: it went into a copy (p = p * … only makes a new tensor)"
        if place:
            never = f"{name} is not averaged, as the parameters before it are: all that are not frozen have to be"
        own = [one.kept["before"][name] for one in mine]
        mean = sum(r / total * p.double() for r, p in zip(own_rows, own, strict=True)).to(own[0].dtype)
        everyone = [one.kept["before"][name] for one in seen]
        shares = [torch.tensor(r) / total for r in own_rows], [torch.tensor(total).reciprocal() * r for r in own_rows]
        in_f32 = [sum(w.double() * p.double() for w, p in zip(by, own, strict=True)).to(own[0].dtype) for by in shares]
        mistakes = [(why, list(would) if isinstance(would, list) else [would] * n) for why, would in (
            ("the plain mean: a mean of means counts a rank with few rows as much as one with many",
             torch.stack(own).mean(0)),
            ("the sum of the ranks' parameters: it has to be divided", torch.stack(own).sum(0)),
            (f"multiplied by the rows, but divided by the {n} ranks: divide by all {total} rows", mean * (total / n)),
            (f"multiplied by the rows and never divided: divide by all {total} rows", mean * total),
            ("divided by all rows of an earlier call: they may be others in each call",
             mean * (total / sum(EARLIER)) if n == 2 else None),
            (f"divided by {n} once too often: the rows' shares add up to 1 already", mean / n),
            (f"divided twice by {total}, the number of all rows", mean / total),
            (f"{name} is not averaged: no loss has reached it, but it is trainable, and each rank has its own",
             own if name.startswith("unused") else None),
            *(("the share of the rows is a float32 number here, as a quotient with an integer tensor is: take "
               "total.item()", mean_in_f32) for mean_in_f32 in in_f32),
            ("a rank without rows has to take the mean over, too: it counts as 0, and goes on from where all are",
             [p if r == 0 else None for r, p in zip(own_rows, own, strict=True)]),
            (never, own),
            ("each rank multiplied its own parameters by its share, and nothing was added up after that",
             [r / total * p for r, p in zip(own_rows, own, strict=True)]),
            ("the weights are upside down: a rank with more rows has to count more",
             _upside_down(own, own_rows)),
            ("the group argument is ignored: this is the mean over all ranks",
             sum(r / sum(rows) * p for r, p in zip(rows, everyone, strict=True)) if n < len(rows) else None),
            ("the group argument is ignored where the rows are added up: these are all ranks' rows",
             mean * (total / sum(rows)) if n < len(rows) else None),
        )]  # fmt: skip
        after = [one.kept["after"][name] for one in mine]
        same(after, [mean] * n, name, about, mistakes, own, members)
    size = sum(mine[0].kept["trained"].values())
    for rank, one in zip(members, mine, strict=True):
        made = sum(call.bytes for call in one.calls)
        if made > size + 8 or len(one.calls) > len(one.kept["trained"]) + 1:
            shared = made - size - 8 <= mine[0].kept["trained"]["fc2.weight"] < made - size
            why = "a weight that two layers share comes up twice in modules()" if shared else "each once is enough"
            raise Wrong(
                f"the result is right, but {made:,} bytes in {len(one.calls)} calls are all-reduced for {size:,} bytes "
                f"of parameters and one number: {why}",
                f"rank {rank}, {about}",
                f"at most {size + 8:,} bytes in {len(one.kept['trained']) + 1} calls",
                f"{made:,} bytes in {len(one.calls)} calls",
            )


def _upside_down(own, rows):
    if 0 in rows or len(set(rows)) == 1:
        return None
    inverse = [1 / r for r in rows]
    return sum(i / sum(inverse) * p for i, p in zip(inverse, own, strict=True))


# ---- local_sgd_step -------------------------------------------------------------------------------------------


class Toy(torch.nn.Module):
    """Small enough that many steps are quick; with a weight used twice, a frozen one, and one that nobody uses, of
    which each rank has its own."""

    def __init__(self, dtype, rank):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for name in ("fc1", "fc2", "again", "frozen", "unused"):
            if name == "unused":
                generator.manual_seed(50 + rank)
            layer = torch.nn.Linear(3, 3, dtype=dtype)
            for p in layer.parameters():
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            self.add_module(name, layer)
        self.again.weight = self.fc2.weight
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.again(torch.tanh(self.fc2(torch.tanh(self.fc1(x))))))


def _toy(dtype, rank, begin):
    """A `Toy` in training since `begin` steps: then with another parameter frozen, which its name does not tell."""
    model = Toy(dtype, rank)
    model.fc1.bias.requires_grad_(not begin)
    return model


OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "Adam, two parameter groups": lambda ps: torch.optim.Adam(_two_groups(list(ps)), lr=0.05),
}


def _two_groups(ps):
    return [{"params": ps[:2]}, {"params": ps[2:], "lr": 0.02}]


def _toy_gradients(model, rank, step, dtype):
    generator = torch.Generator().manual_seed(100 * rank + step)
    model.zero_grad()
    model(torch.randn(4, 3, generator=generator, dtype=torch.float64).to(dtype)).square().mean().backward()


def _local_steps(answer, optimizer, steps, k, dtype, begin):
    """On a rank: several steps by the answer; the parameters, and the traffic, after each one."""
    rank, all_seen = dist.get_rank(), Seen()
    model = _toy(dtype, rank, begin)
    named, optimizer = dict(model.named_parameters()), OPTIMIZERS[optimizer](model.parameters())
    kept = {"start": parameters_of(named), "after": [], "calls": [], "touched": [], "replaced": []}
    kept["trained"] = {name: p.numel() * p.element_size() for name, p in named.items() if p.requires_grad}
    for step in range(begin, begin + steps):
        _toy_gradients(model, rank, step, dtype)
        before = gradients_of(named)
        seen = watched(answer, model, optimizer, step, k)
        for one in ("reference", "torchs"):
            setattr(all_seen, one, getattr(all_seen, one) or getattr(seen, one))
        all_seen.unwaited += seen.unwaited
        all_seen.hidden += seen.hidden
        all_seen.calls += seen.calls
        kept["calls"].append(seen.calls)
        kept["after"].append(parameters_of(named))
        kept["touched"].append([name for name, g in gradients_of(named).items() if not alike(g, before[name])])
        kept["replaced"].append(replaced(named, model, kept["trained"]))
        for name, p in named.items():
            p.requires_grad_(name in kept["trained"])
    all_seen.kept = kept
    return all_seen


def _local_sgd(optimizer, steps, k, n, dtype, begin, when=None, what="mean", made=lambda due: 1, first=False, state="",
               only=""):  # fmt: skip
    """All ranks in one process: each one's parameters after each step, [step][rank]; with a mistake, if asked for."""
    takes = {"used": lambda p, _: p.grad is not None, "first group": lambda p, o: id(p) in _first_group(o)}.get(only)
    models = [_toy(dtype, rank, begin) for rank in range(n)]
    optimizers = [OPTIMIZERS[optimizer](m.parameters()) for m in models]
    history = []
    for step in range(begin, begin + steps):
        for rank, model in enumerate(models):
            _toy_gradients(model, rank, step, dtype)
        due = (step + 1) % k == 0 if when is None else when(step)
        trained = [[p for p in m.parameters() if p.requires_grad and (not takes or takes(p, o))]
                   for m, o in zip(models, optimizers, strict=True)]  # fmt: skip
        if due and first:
            _take_mean([[p.data for p in ps] for ps in trained])
        if due and what == "gradients":
            _take_mean([[p.grad for p in ps if p.grad is not None] for ps in trained])
        for one in optimizers:
            for _ in range(made(due)):
                one.step()
        if due and not first and what != "gradients":
            _take_mean([[p.data for p in ps] for ps in trained], what)
        if due and state == "lost":
            for one in optimizers:
                one.state.clear()
        if due and state == "mean":
            kept = [[v for p in ps for key, v in sorted(o.state[p].items()) if torch.is_tensor(v) and key != "step"]
                    for o, ps in zip(optimizers, trained, strict=True)]  # fmt: skip
            _take_mean(kept)
        history.append([parameters_of(dict(m.named_parameters())) for m in models])
    return history


def _first_group(optimizer):
    return {id(p) for p in optimizer.param_groups[0]["params"]}


def _take_mean(tensors, what="mean"):
    for alike in zip(*tensors, strict=True):
        total = sum(alike[1:], alike[0].clone())
        value = {"mean": total / len(alike), "sum": total, "first": alike[0].clone()}[what]
        for t in alike:
            t.copy_(value)


class local_sgd_step:
    hints = (
        "First what one process would do: optimizer.step(). It changes this rank's parameters only.",
        "step counts from 0: with k = 4 the fourth step is step 3. (step + 1) % k == 0 is true there, and at 7, 11, …",
        "To average: for each p that requires a gradient, dist.all_reduce(p.data); p.data /= dist.get_world_size().",
    )

    @staticmethod
    def check(run):
        cases = [  # optimizer, steps, k, ranks, dtype, the first step's number
            ("SGD", 7, 3, 4, F64, 0),
            ("Adam, two parameter groups", 5, 2, 2, F64, 0),
            ("SGD with momentum", 5, 1, 4, F32, 0),
            ("SGD with momentum", 6, 2, 3, F64, 3),
            ("SGD", 3, 5, 4, F64, 0),
        ]
        for optimizer, steps, k, n, dtype, begin in cases:
            about = f"{optimizer}, k = {k}, {n} ranks" + (f", training goes on at step {begin}" if begin else "")
            stuck = "the ranks do not make the same calls: when to average depends on step and k, the same on all ranks"
            seen = run(_local_steps, optimizer, steps, k, dtype, begin, n=n, about=about, stuck=stuck)
            _judge_local(seen, (optimizer, steps, k, n, dtype, begin), about)


def _alike_all_along(got, would):
    """Whether the answer did what this mistake does in all steps, and not just in the first ones."""
    pairs = [
        (g[name], w[name]) for a, b in zip(got, would, strict=True) for g, w in zip(a, b, strict=True) for name in g
    ]
    return all(equal(g, w, (1e-4, 1e-5)) for g, w in pairs)


def _judge_local(seen, case, about):
    _, steps, k, n, _, begin = case
    only_calls(seen, ("all_reduce",), OTHER_CALLS)
    right = _local_sgd(*case)
    mistakes = {"the calls are counted, where `step` says which one it is: training may go on from a checkpoint":
                {"when": lambda s: (s - begin + 1) % k == 0}} if begin % k else {}  # fmt: skip
    mistakes |= {
        "the parameters are averaged at steps 0, k, 2k …: the k-th step is step k - 1, as they are counted from 0":
            {"when": lambda s: s % k == 0},
        "the parameters are averaged after every step, whatever k is": {"when": lambda s: True},
        "the parameters are never averaged": {"when": lambda s: False},
        "averaged one step too late: steps are counted from 0": {"when": lambda s: s and s % k == 0},
        "averaged only once, at step k - 1: after every k-th step": {"when": lambda s: s == k - 1},
        "averaged at step k itself, and only there": {"when": lambda s: s == k},
        "averaged at the beginning of the step after the k-th: at the end of the k-th one, when it has stepped":
            {"when": lambda s: s and s % k == 0, "first": True},
        "averaged first, then stepped: the ranks leave the step with different parameters again": {"first": True},
        "the gradients are averaged, not the parameters: what the ranks did in the other steps stays apart":
            {"what": "gradients"},
        "the sum was not divided by the number of ranks": {"what": "sum"},
        "rank 0's parameters are taken over by all: the others' training is lost": {"what": "first"},
        "optimizer.step() is called twice in the steps that average": {"made": lambda due: 1 + due},
        "optimizer.step() is called twice in every step": {"made": lambda due: 2},
        "optimizer.step() is called only in the steps that average": {"made": lambda due: due},
        "no step was made: call optimizer.step()": {"made": lambda due: 0},
        "the optimizer's state is averaged too: only the parameters were asked for": {"state": "mean"},
        "the optimizer's state is thrown away where the ranks average: it goes on as it is": {"state": "lost"},
        "optimizer.step() is not called in the steps that average: first step, then average":
            {"made": lambda due: not due},
        "only the parameters that have a gradient are averaged: each rank has its own of the other trainable ones, too":
            {"only": "used"},
        "only the optimizer's first parameter group is averaged": {"only": "first group"},
    }  # fmt: skip
    mistakes = {why: _local_sgd(*case, **how) for why, how in mistakes.items()}
    got = [[one.kept["after"][i] for one in seen] for i in range(steps)]
    mistakes = dict(sorted(mistakes.items(), key=lambda m: not _alike_all_along(got, m[1])))
    size = sum(seen[0].kept["trained"].values())
    for i, step in enumerate(range(begin, begin + steps)):
        before = [one.kept["after"][i - 1] if i else one.kept["start"] for one in seen]
        for rank, one in enumerate(seen):
            where = f"rank {rank}, step {step}, {about}"
            if one.kept["replaced"][i]:
                raise Wrong(one.kept["replaced"][i], where)
            if one.kept["touched"][i]:
                raise Wrong("the gradients have changed: the parameters are to be averaged, not the gradients", where)
            for name, p in one.kept["start"].items():
                if name not in one.kept["trained"] and not torch.equal(one.kept["after"][i][name], p):
                    raise Wrong(f"{name} is frozen and has changed", where)
        for name in seen[0].kept["trained"]:
            got, start = [one.kept["after"][i][name] for one in seen], [held[name] for held in before]
            plausible = [(why, [rank[name] for rank in all_steps[i]]) for why, all_steps in mistakes.items()]
            expected = [rank[name] for rank in right[i]]
            tolerance = {F32: (1e-4, 1e-5), F64: (1e-9, 1e-11)}[got[0].dtype]
            if any(equal(g, e, tolerance) for g, e in zip(got, expected, strict=True)):
                some = "no step was made here, only on other ranks: every rank calls optimizer.step()"
                plausible = [(some, start), *plausible]
            same(got, expected, name, f"after step {step}, {about}", plausible, start, tolerance=tolerance)
    for i, step in enumerate(range(begin, begin + steps)):  # values first: they tell more
        due = (step + 1) % k == 0
        for rank, one in enumerate(seen):
            made, calls = sum(c.bytes for c in one.kept["calls"][i]), len(one.kept["calls"][i])
            where, most = f"rank {rank}, step {step}, {about}", len(one.kept["trained"])
            if not due and calls:
                why = f"the parameters are right, but step {step} sends {made:,} bytes: only every k-th step has to"
                raise Wrong(why, where, "nothing", f"{calls} calls")
            if due and (made > size or calls > most):
                why = f"the result is right, but {made:,} bytes are all-reduced for {size:,} bytes of parameters"
                raise Wrong(why, where, f"{size:,} bytes in up to {most} calls", f"{made:,} bytes in {calls} calls")


# ---- server_round ---------------------------------------------------------------------------------------------


def _round(answer, shape, dtype, lr, server, seed):
    """On a rank: one round; a worker begins with other parameters than the server's."""
    rank = dist.get_rank()
    theta, gradient = values(shape, dtype, rank, seed), values(shape, dtype, 50 + rank, seed)
    kept = gradient.clone()
    seen = watched(answer, theta, None if rank == server else gradient, lr, server)
    seen.kept = {"theta": theta, "gradient changed": not torch.equal(kept, gradient)}
    return seen


class server_round:
    hints = (
        "Two roles in one function: if rank == server … else …. A worker's part is two lines: send the gradient, "
        "receive theta.",
        "The server receives one gradient after the other, each into a buffer of its own or added up at once, before "
        "it changes theta; then it sends theta to each worker.",
        "The mean is over the workers: all ranks but the server, dist.get_world_size() - 1 of them.",
    )

    @staticmethod
    def check(run):
        cases = [  # n, shape, dtype, lr, server
            (4, (6,), F64, 0.5, 0),
            (4, (3, 5), F32, 0.1, 0),
            (4, (5,), F64, 0.1, 2),
            (3, (7,), F64, 0.25, 2),
            (2, (4,), F64, 2.0, 1),
            (4, (), F64, 0.3, 3),
        ]
        for seed, (n, shape, dtype, lr, server) in enumerate(cases):
            about = f"{n} ranks, rank {server} serves, theta of shape {shape}"
            try:
                seen = run(_round, shape, dtype, lr, server, seed, n=n, about=about)
                _judge_round(seen, shape, dtype, lr, server, seed, about)
            except Wrong as wrong:
                if seed == 2:  # the first case in which another rank serves
                    works = "it works where rank 0 serves, but not where rank 2 does (is a 0 written into it?)"
                    wrong.diagnosis = f"{works}: {wrong.diagnosis}"
                raise


def _judge_round(seen, shape, dtype, lr, server, seed, about):
    n = len(seen)
    by_hand(seen)
    workers = [r for r in range(n) if r != server]
    start = [values(shape, dtype, r, seed) for r in range(n)]
    gradients = {r: values(shape, dtype, 50 + r, seed) for r in workers}
    theta, total = start[server], sum(gradients.values())
    mean = total / len(workers)

    def all_ranks(value):
        return [value] * n

    mistakes = [
        ("the workers get the parameters of before the step: first all gradients, then the step, then the answers",
         [theta - lr * mean if r == server else theta for r in range(n)]),
        ("the workers do not get the new parameters: theta is received into something else, or not at all",
         [theta - lr * mean if r == server else start[r] for r in range(n)]),
        ("the server sends new parameters, but its own stay as they were: theta -= … changes them in place",
         [theta if r == server else theta - lr * mean for r in range(n)]),
        ("the workers' theta holds the mean gradient: the server sends back parameters",
         [theta - lr * mean if r == server else mean for r in range(n)]),
        ("the workers' theta holds the sum of the gradients: the server sends back parameters",
         [theta - lr * mean if r == server else total for r in range(n)]),
        ("the sum of the gradients is applied: divide by the number of workers", all_ranks(theta - lr * total)),
        (f"divided by all {n} ranks: the server has no gradient, the mean is over the {n - 1} workers" if n == 4 else
         f"divided by {n}, where there are {n - 1} workers: is that number written into it?",
         all_ranks(theta - lr * total / n)),
        (f"divided by 3, where there are {n - 1} workers: is that number written into it?",
         all_ranks(theta - lr * total / 3)),
        ("this is the mean of the workers' parameters after a step of their own, from old ones: push gradients, and "
         "step from the server's", all_ranks(sum(start[r] - lr * gradients[r] for r in workers) / len(workers))),
        ("the sign is wrong: a step goes against the gradient", all_ranks(theta + lr * mean)),
        ("lr is missing", all_ranks(theta - mean)),
        ("this is the mean gradient itself: theta has to make a step with it", all_ranks(mean)),
        ("this is lr times the mean gradient: subtract it from theta", all_ranks(lr * mean)),
        *((f"only worker {r}'s gradient is applied: each one overwrites what came before, add them up",
           all_ranks(theta - lr * gradients[r])) for r in (workers[-1], workers[0])),
        *((f"only worker {r}'s gradient arrives, and it counts as one of {n - 1}",
           all_ranks(theta - lr * gradients[r] / len(workers))) for r in (workers[-1], workers[0])),
        ("each worker has stepped from its own old parameters: the server's are the ones that count",
         [start[r] - lr * mean for r in range(n)]),
        ("each worker has made a step with its own gradient",
         [theta - lr * mean if r == server else start[r] - lr * gradients[r] for r in range(n)]),
        ("each worker is answered before the others' gradients are in: synchronous means that all wait for all",
         _one_by_one(start, gradients, lr, server, workers, len(workers))),
        ("each gradient is applied by itself with the full lr, and each worker answered at once: that is the "
         "asynchronous server", _one_by_one(start, gradients, lr, server, workers, 1)),
        ("lr is applied twice", all_ranks(theta - lr * lr * mean)),
        (f"divided twice by {n - 1}", all_ranks(theta - lr * mean / (n - 1))),
    ]  # fmt: skip
    for rank, one in enumerate(seen):
        if one.kept["gradient changed"]:
            raise Wrong("the worker's `gradient` was changed: it is only to be sent", f"rank {rank}, {about}")
    same([one.kept["theta"] for one in seen], all_ranks(theta - lr * mean), "theta", about, mistakes, start)
    size, made, to = theta.numel() * theta.element_size(), sent(seen), peers(seen)
    for rank in workers:
        if to[rank] - {server}:
            why = f"worker {rank} sends to {plural(sorted(to[rank]))}: workers talk to the server only"
            raise Wrong(f"the result is right, but {why}", about)
    wanted = [size * len(workers) if r == server else size for r in range(n)]
    if made != wanted:
        rank = next(r for r in range(n) if made[r] != wanted[r])
        why = f"the result is right, but rank {rank} sends {made[rank]:,} bytes where {wanted[rank]:,} are enough"
        raise Wrong(f"{why}: one tensor up and one down for each worker", about, f"{wanted} bytes, rank by rank",
                    f"{made} bytes")  # fmt: skip


def _one_by_one(start, gradients, lr, server, workers, parts):
    held, now = list(start), start[server]
    for r in workers:
        now = now - lr * gradients[r] / parts
        held[r] = now
    held[server] = now
    return held


# ---- may_proceed ----------------------------------------------------------------------------------------------


def _asked(answer, inputs):
    def all_of_them():
        results = []
        for clocks, worker, staleness in inputs:
            given = list(clocks)
            try:
                results.append((answer(given, worker, staleness), given == list(clocks)))
            except Exception as error:
                error.args = (", ".join([*map(str, error.args), _call(clocks, worker, staleness)]),)
                raise
        return results

    return watched(all_of_them)


def _call(clocks, worker, staleness):
    return f"may_proceed({list(clocks)}, {worker}, {staleness})"


class may_proceed:
    hints = (
        "Who holds a worker back is the slowest of all: min(clocks). How far ahead of it is this one?",
        "More than staleness steps ahead has to wait; exactly staleness steps ahead may still go on. And staleness "
        "may be None.",
    )

    @staticmethod
    def check(run):
        some = itertools.product(((3, 3, 3), (5, 3, 4), (3, 6, 4), (0, 1, 0), (7, 7, 2)), range(3), (None, 0, 1, 2, 3))
        inputs = [*some, ((4,), 0, 0), ((10, 3), 0, 6), ((10, 3), 0, 7), ((2, 2, 0, 1), 1, 1), ((2, 2, 0, 1), 3, 1)]
        [seen] = run(_asked, inputs, n=1)
        if seen.calls:
            raise Wrong(f"it calls {seen.calls[0].op}: this one is plain arithmetic, in one process")
        _judge_proceed(inputs, seen.result)


def _judge_proceed(inputs, results):
    expected = [s is None or c[w] - min(c) <= s for c, w, s in inputs]
    labels = [_call(*one) for one in inputs]
    got = []
    for (value, kept), label in zip(results, labels, strict=True):
        if not isinstance(value, bool):
            raise Wrong(f"it returns {value!r:.40} ({type_of(value)}): True or False is asked for", label)
        if not kept:
            raise Wrong("clocks was changed: only look at it", label)
        got.append(value)
    mistakes = [
        ("exactly `staleness` steps ahead may still go on: only more than that has to wait",
         lambda c, w, s: c[w] - min(c) < s),
        ("the wrong way round: it holds the slow worker back, who is the one that all wait for",
         lambda c, w, s: max(c) - c[w] <= s),
        ("True and False are swapped: the question is whether it may go on", lambda c, w, s: not c[w] - min(c) <= s),
        ("compared with the fastest: the slowest is the one that holds the others back",
         lambda c, w, s: max(c) - min(c) <= s),
        ("compared with the mean of the clocks: the slowest is the one that counts",
         lambda c, w, s: c[w] - sum(c) / len(c) <= s),
        ("the clock itself is compared: it is how far ahead of the slowest it is that counts",
         lambda c, w, s: c[w] <= s),
        ("one step too generous: staleness + 1 steps ahead has to wait", lambda c, w, s: c[w] - min(c) <= s + 1),
        ("only workers exactly `staleness` ahead, or level, are looked at: any lead up to it may go on",
         lambda c, w, s: c[w] - min(c) in (0, s)),
        ("compared with worker 0's clock: the slowest may be another one", lambda c, w, s: c[w] - c[0] <= s),
        ("compared with the next worker's clock: the slowest may be another one",
         lambda c, w, s: c[w] - c[(w + 1) % len(c)] <= s),
        ("0 is a bound like any other, not None: `if not staleness` takes it for that",
         lambda c, w, s: s == 0 or c[w] - min(c) <= s),
        ("workers that have not begun are left out: they are the slowest",
         lambda c, w, s: c[w] - min((x for x in c if x), default=0) <= s),
        ("only the slowest may go on", lambda c, w, s: c[w] == min(c)),
    ]  # fmt: skip
    if got == expected:
        return
    no_bound = [i for i, (*_, s) in enumerate(inputs) if s is None]
    first = next(i for i in range(len(got)) if got[i] != expected[i])
    if all(not got[i] for i in no_bound) and all(got[i] == expected[i] for i in range(len(got)) if i not in no_bound):
        why = "staleness None means that nobody waits"
    else:
        why = "the worker is let go" if got[first] else "the worker is held back"
        clocks, worker, _ = inputs[first]
        ahead = clocks[worker] - min(clocks)
        why += f", {ahead} step{'s' * (ahead != 1)} ahead of the slowest"
        for said, rule in mistakes:
            if all(s is None or rule(c, w, s) == g for (c, w, s), g in zip(inputs, got, strict=True)):
                why = said
                break
    raise Wrong(why, labels[first], str(expected[first]), str(got[first]))


# ---- apply_stale ----------------------------------------------------------------------------------------------


def _applied(answer, inputs):
    """In one process: each case with tensors of its own."""
    kept = []

    def all_of_them():
        results = []
        for theta, gradient, *rest in inputs:
            theta, given = theta.clone(), gradient.clone()
            results.append(answer(theta, given, *rest))
            kept.append((theta, torch.equal(given, gradient)))
        return results

    seen = watched(all_of_them)
    seen.kept = kept
    return seen


class apply_stale:
    hints = (
        "staleness = version - computed_at: 0 for a gradient that was computed from the newest parameters.",
        "Staler than limit: return version, and nothing has happened. Otherwise theta -= …, and version + 1.",
        "theta -= lr / (1 + staleness) * gradient changes theta in place; theta = theta - … makes a new tensor that "
        "nobody sees.",
    )

    @staticmethod
    def check(run):
        ages = [(5, 5, 3), (4, 5, 3), (2, 5, 3), (1, 5, 3), (0, 9, 3), (7, 7, 0), (6, 7, 0), (3, 13, 100)]
        inputs = [
            (values(shape, dtype, i, 1), values(shape, dtype, i, 2), computed_at, version, lr, limit)
            for i, (computed_at, version, limit) in enumerate(ages)
            for shape, dtype, lr in (((5,), F64, 0.5), ((2, 3), F32, 0.1))
        ]
        [seen] = run(_applied, inputs, n=1)
        if seen.calls:
            raise Wrong(f"it calls {seen.calls[0].op}: this happens on the server alone")
        _judge_stale(inputs, seen.result, seen.kept)


def _judge_stale(inputs, returned, kept):
    labels = [f"computed_at {c}, version {v}, limit {limit}, lr {lr}" for _, _, c, v, lr, limit in inputs]
    for (_, intact), label in zip(kept, labels, strict=True):
        if not intact:
            raise Wrong("`gradient` was changed: it is the worker's", label)

    def with_rule(rule, drop=lambda stale, limit: stale > limit):
        return [
            theta if drop(v - c, limit) else (theta - rule(v - c, lr) * gradient).to(theta.dtype)
            for theta, gradient, c, v, lr, limit in inputs
        ]

    def scaled(stale, lr):
        return lr / (1 + stale)

    expected, got = with_rule(scaled), [theta for theta, _ in kept]
    said_so = [type(value) is int and value == v for value, (_, _, _, v, *_) in zip(returned, inputs, strict=True)]
    mistakes = [
        ("the gradient is applied with the full lr: the staler it is, the smaller a step", with_rule(lambda s, lr: lr)),
        ("limit 0 drops whatever is stale: `if limit` takes it for no limit at all",
         with_rule(scaled, lambda s, limit: limit and s > limit)),
        ("nothing is dropped: a gradient staler than limit is not to be applied",
         with_rule(scaled, lambda s, limit: False)),
        ("a gradient exactly as stale as limit is dropped: only staler ones are",
         with_rule(scaled, lambda s, limit: s >= limit)),
        ("a gradient staler than limit is applied as if it were limit versions old: it has to be dropped",
         [(theta - lr / (1 + min(v - c, limit)) * g).to(theta.dtype) for theta, g, c, v, lr, limit in inputs]),
        ("neither dropped nor scaled", with_rule(lambda s, lr: lr, lambda s, limit: False)),
        ("the sign is wrong: a step goes against the gradient", with_rule(lambda s, lr: -lr / (1 + s))),
        ("the step grows with staleness: divide by 1 + staleness", with_rule(lambda s, lr: lr * (1 + s))),
        ("lr is missing", with_rule(lambda s, lr: 1 / (1 + s))),
        ("divided by staleness itself: a gradient of staleness 1 gets half a step",
         with_rule(lambda s, lr: lr / max(s, 1))),
        ("staleness has the wrong sign: version - computed_at", with_rule(lambda s, lr: lr / (1 - s) if s != 1 else
         float("inf"), lambda s, limit: -s > limit)),
        ("theta is as it was before the call: write into it with -= (theta = theta - x makes a new tensor)",
         [None if dropped else theta for (theta, *_), dropped in zip(inputs, said_so, strict=True)]),
        ("dropped, though it is not staler than limit: staleness is version - computed_at",
         [theta for theta, *_ in inputs]),
        ("every gradient that is stale at all is dropped", with_rule(scaled, lambda s, limit: s > 0)),
        ("lr to the power of staleness: divide by 1 + staleness", with_rule(lambda s, lr: lr ** (1 + s))),
    ]  # fmt: skip
    same(got, expected, "theta", "", mistakes, [theta for theta, *_ in inputs], [f"theta, {text}" for text in labels])
    for value, (*_, c, v, _, limit), label in zip(returned, inputs, labels, strict=True):
        want = v + (v - c <= limit)
        if isinstance(value, bool) or not isinstance(value, int):
            raise Wrong(f"it returns {_said(value)}: the version that theta has now is asked for", label, str(want))
        if value != want:
            dropped = v - c > limit
            why = "a dropped gradient makes no new version" if dropped else "each gradient applied makes a new version"
            if value == v - c:
                why = "it returns the staleness: the version that theta has now is asked for"
            raise Wrong(why, label, str(want), str(value))


def _said(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor {show(value)}"
    return "nothing (None)" if value is None else f"a {value.type}" if isinstance(value, Other) else repr(value)[:40]
