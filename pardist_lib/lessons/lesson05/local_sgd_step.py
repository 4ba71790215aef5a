"""A step, and each k-th time a mean; typically a step too early or too late, or of the gradients, or of the state."""

import torch
import torch.distributed as dist

from ..exercises.bench import refuse
from ..exercises.cases import F32, F64
from ..exercises.exercise import Exercise
from ..exercises.gradients import Sample
from ..exercises.judge import Wrong, equal, only_calls, same
from ..exercises.watch import Seen, watched
from .shared import OTHER_CALLS, gradients_of, no_more_than, spoilt, values_of

hints = (
    "First what one process would do: optimizer.step(). It changes this rank's parameters only.",
    "step counts from 0: with k = 4 the fourth step is step 3. (step + 1) % k == 0 is true there, and at 7, 11, …",
    "To average: for each p that requires a gradient, dist.all_reduce(p.data); p.data /= dist.get_world_size().",
)


def check(run):
    stuck = "the ranks do not make the same calls: when to average depends on step and k, the same on all ranks"
    for case in CASES:
        optimizer, _, k, n, _, begin = case
        about = f"{optimizer}, k = {k}, {n} ranks" + (f", training goes on at step {begin}" if begin else "")
        seen = run(_steps, *case, n=n, about=about, stuck=stuck)
        steps = list(zip(*(one.kept["steps"] for one in seen), strict=True))  # of each step the ranks
        for ranks in steps:
            refuse(ranks)
            only_calls(ranks, ("all_reduce",), OTHER_CALLS)
        _judge_values(seen, steps, case, about)
        for step, ranks in enumerate(steps, begin):
            for rank, one in enumerate(ranks):
                where, made = f"rank {rank}, step {step}, {about}", sum(call.bytes for call in one.calls)
                if one.calls and (step + 1) % k:
                    why = f"the parameters are right, but step {step} sends {made:,} bytes: only every k-th step has to"
                    raise Wrong(why, where, "nothing", f"{len(one.calls)} calls")
                no_more_than(seen[0].kept["trained"], one, where)


CASES = [  # optimizer, steps, k, ranks, dtype, the first step's number
    ("SGD", 7, 3, 4, F64, 0),
    ("Adam with two groups", 5, 2, 2, F64, 0),
    ("SGD with momentum", 5, 1, 4, F32, 0),
    ("SGD with momentum", 6, 2, 3, F64, 3),
    ("SGD", 3, 5, 4, F64, 0),
]
OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "SGD with momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "Adam with two groups": lambda ps: torch.optim.Adam([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.02}], 0.05),
}


def _in_training(optimizer, dtype, rank, begin):
    """A rank's own model and optimizer; where training goes on, another parameter is frozen: no name tells that."""
    model = Sample(50 + rank, dtype)
    model.fc1.bias.requires_grad_(not begin)
    return model, OPTIMIZERS[optimizer](list(model.parameters()))


def _find_gradients(model, rank, step, dtype):
    generator = torch.Generator().manual_seed(100 * rank + step)
    model.zero_grad()
    model(torch.randn(4, 6, generator=generator, dtype=F64).to(dtype)).square().mean().backward()


def _steps(answer, optimizer, steps, k, n, dtype, begin):
    """On a rank: several steps by the answer, each watched by itself."""
    rank, made = dist.get_rank(), []
    model, optimizer = _in_training(optimizer, dtype, rank, begin)
    named = dict(model.named_parameters())
    start, trained = values_of(named), {name: p.nbytes for name, p in named.items() if p.requires_grad}
    for step in range(begin, begin + steps):
        _find_gradients(model, rank, step, dtype)
        gradients = gradients_of(named)
        seen = watched(answer, model, optimizer, step, k)
        seen.kept = {"after": values_of(named), "spoilt": spoilt(model, named, trained, start, gradients)}
        made.append(seen)
        for name, p in named.items():
            p.requires_grad_(name in trained)
    return Seen(kept={"start": start, "trained": trained, "steps": made})


def _judge_values(seen, steps, case, about):
    (_, _, k, _, dtype, begin), right = case, _local_sgd(*case)
    got, before = [[one.kept["after"] for one in ranks] for ranks in steps], [one.kept["start"] for one in seen]
    mistakes = {} if _alike(got, right) else {why: _local_sgd(*case, *how) for why, how in _mistakes(k, begin).items()}
    mistakes = sorted(mistakes.items(), key=lambda mistake: not _alike(got, mistake[1]))
    tolerance = {F32: (1e-4, 1e-5), F64: (1e-9, 1e-11)}[dtype]
    for i, ranks in enumerate(steps):
        for rank, one in enumerate(ranks):
            if one.kept["spoilt"]:
                raise Wrong(one.kept["spoilt"], f"rank {rank}, step {begin + i}, {about}")
        for name in seen[0].kept["trained"]:
            after, wanted, start = ([held[name] for held in values] for values in (got[i], right[i], before))
            plausible = [(why, [held[name] for held in would[i]]) for why, would in mistakes]
            if any(equal(g, w, tolerance) for g, w in zip(after, wanted, strict=True)):
                some = "no step was made here, only on other ranks: every rank calls optimizer.step()"
                plausible = [(some, start), *plausible]
            same(after, wanted, name, f"after step {begin + i}, {about}", plausible, start, tolerance=tolerance)
        before = got[i]


def _alike(got, would):
    """Whether all ranks have these values after all steps, not just after the first ones."""
    ranks = [pair for pairs in zip(got, would, strict=True) for pair in zip(*pairs, strict=True)]
    return all(equal(g[name], w[name], (1e-4, 1e-5)) for g, w in ranks for name in g)


def _mistakes(k, begin):
    """{diagnosis: arguments of `_local_sgd` that make this mistake}"""
    counted = "the calls are counted, where `step` says which one it is: training may go on from a checkpoint"
    from_0 = "the parameters are averaged at steps 0, k, 2k …: the k-th step is step k - 1, as they are counted from 0"
    used = "only the parameters that have a gradient are averaged: the other trainable ones are each rank's own, too"

    def late(s):
        return s and s % k == 0

    return ({counted: (lambda s: (s - begin + 1) % k == 0,)} if begin % k else {}) | {
        from_0: (lambda s: s % k == 0,),
        "the parameters are averaged after every step, whatever k is": (lambda s: True,),
        "the parameters are never averaged": (lambda s: False,),
        "averaged one step too late: steps are counted from 0": (late,),
        "averaged only once, at step k - 1: after every k-th step": (lambda s: s == k - 1,),
        "averaged at step k itself, and only there": (lambda s: s == k,),
        "averaged at the beginning of the step after the k-th, not at the k-th's end": (late, "mean step"),
        "averaged first, then stepped: the ranks leave the step with different parameters again": (None, "mean step"),
        "the gradients are averaged, not the parameters: what other steps did stays apart": (None, "gradients step"),
        "the sum was not divided by the number of ranks": (None, "step sum"),
        "rank 0's parameters are taken over by all: the others' training is lost": (None, "step first"),
        "optimizer.step() is called twice in the steps that average": (None, "step step mean"),
        "optimizer.step() is called twice in every step": (None, "step step mean", "step step"),
        "optimizer.step() is called only in the steps that average": (None, "step mean", ""),
        "no step was made: call optimizer.step()": (None, "mean", ""),
        "the optimizer's state is averaged too: only the parameters were asked for": (None, "step mean state"),
        "the optimizer's state is thrown away where the ranks average: it goes on as it is": (None, "step mean forget"),
        "optimizer.step() is not called in the steps that average: first step, then average": (None, "mean"),
        used: (None, "step used"),
        "only the optimizer's first parameter group is averaged": (None, "step group"),
    }


def _local_sgd(optimizer, steps, k, n, dtype, begin, due=None, then="step mean", else_="step"):
    """All ranks in one process: each one's parameters after each step, [step][rank]; with a mistake, if asked for.

    due: in which steps what `then` says is done, instead of what `else_` says: see `_do`.
    """
    ranks, history = [_in_training(optimizer, dtype, rank, begin) for rank in range(n)], []
    for step in range(begin, begin + steps):
        for rank, (model, _) in enumerate(ranks):
            _find_gradients(model, rank, step, dtype)
        for what in (then if (due(step) if due else (step + 1) % k == 0) else else_).split():
            _do(what, ranks)
        history.append([values_of(dict(model.named_parameters())) for model, _ in ranks])
    return history


@torch.no_grad()
def _do(what, ranks):
    """All step, forget their optimizers' states, or take the mean (the sum, the first) of some of their tensors."""
    if what in ("step", "forget"):
        for _, optimizer in ranks:
            optimizer.step() if what == "step" else optimizer.state.clear()
        return
    everything = []
    for model, optimizer in ranks:
        trained = [p for p in model.parameters() if p.requires_grad]
        if what == "gradients":
            trained = [p.grad for p in trained if p.grad is not None]
        elif what == "used":
            trained = [p for p in trained if p.grad is not None]
        elif what == "group":
            trained = [p for p in optimizer.param_groups[0]["params"] if p.requires_grad]
        elif what == "state":
            states = [sorted(optimizer.state[p].items()) for p in trained]
            trained = [v for state in states for key, v in state if torch.is_tensor(v) and key != "step"]
        everything.append(trained)
    for copies in zip(*everything, strict=True):
        total = sum(copies[1:], copies[0].clone())
        value = {"sum": total, "first": copies[0].clone()}.get(what, total / len(copies))
        for t in copies:
            t.copy_(value)


why = (
    "All start alike, so k steps apart and a mean cost 1/k of the bytes. torch's PostLocalSGDOptimizer with a "
    "PeriodicModelAverager does this, its period counted from the first step; the optimizer's state stays "
    "each rank's own there, too."
)
exercise = Exercise(hints, check, minutes=10, level="easy", why=why)
