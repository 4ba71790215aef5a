"""The exercise local_sgd_step."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, only_calls, same
from ..exercises.watch import Seen, watched
from .shared import OTHER_CALLS, alike, gradients_of, parameters_of, replaced

hints = (
    "First what one process would do: optimizer.step(). It changes this rank's parameters only.",
    "step counts from 0: with k = 4 the fourth step is step 3. (step + 1) % k == 0 is true there, and at 7, 11, …",
    "To average: for each p that requires a gradient, dist.all_reduce(p.data); p.data /= dist.get_world_size().",
)


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
    for copies in zip(*tensors, strict=True):
        total = sum(copies[1:], copies[0].clone())
        value = {"mean": total / len(copies), "sum": total, "first": copies[0].clone()}[what]
        for t in copies:
            t.copy_(value)


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


exercise = Exercise(hints, check)
