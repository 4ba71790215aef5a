"""The exercise zero1_step."""

import torch
import torch.distributed as dist

from ..exercises.cases import values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from ..exercises.watch import watched
from .shared import F32, F64, counted, judge_moved

hints = (
    "Three parts: dist.reduce_scatter(mean, list(gradients.chunk(n))) leaves the sum of everybody's rank-th n-th "
    "in `mean`; then the optimizer's rule on that n-th; then an all_gather of the parameters.",
    "reduce_scatter gives a sum: divide by n. The rule in place: momentum.mul_(beta).add_(mean), then "
    "parameters.chunk(n)[rank] -= lr * momentum.",
    "chunk gives views, so dist.all_gather(list(parameters.chunk(n)), mine.clone()) writes into parameters.",
)


def check(run):
    for seed, (n, k, dtype) in enumerate([(4, 8, F32), (4, 20, F64), (3, 9, F64), (2, 6, F32), (4, 4096, F32)]):
        about = f"{STEPS} steps with {k} parameters, {str(dtype)[6:]}, on {n} ranks"
        seen = run(_take_steps, k, dtype, seed, n=n, about=about)
        only_calls(seen, ("reduce_scatter", "all_gather", "all_to_all", "send", "recv"), ONLY_SHARDS)
        try:
            _judge_step(seen, n, k, dtype, seed, about)
        except Wrong as wrong:
            if seed == 2:
                wrong.diagnosis = f"it works with 4 ranks, but not with 3 (is a 4 written into it?): {wrong.diagnosis}"
            raise


STEPS = 2


def _rates(seed):
    """(lr, beta): others in the second case, in case somebody writes them down."""
    return (0.1, 0.9) if seed == 0 else (0.3, 0.6)


def _start(k, n, dtype, seed):
    """(parameters, whole momentum, [gradients of each rank, for each step])"""
    gradients = [[values((k,), dtype, rank, seed + 10 * (step + 1)) for rank in range(n)] for step in range(STEPS)]
    return values((k,), dtype, 0, seed), values((k,), dtype, 77, seed), gradients


def _take_steps(answer, k, dtype, seed):
    rank, n = dist.get_rank(), dist.get_world_size()
    parameters, momentum, gradients = _start(k, n, dtype, seed)
    parameters, momentum = parameters.clone(), momentum.chunk(n)[rank].clone()
    own = [g[rank].clone() for g in gradients]
    seen = watched(lambda: [answer(parameters, g, momentum, *_rates(seed)) for g in own][-1])
    read_only = all(torch.equal(g, before[rank]) for g, before in zip(own, gradients, strict=True))
    seen.kept = {"parameters": parameters, "momentum": momentum, "read_only": read_only}
    return counted(seen, n)


def _by_rule(k, n, dtype, seed, mean=None, rule=None, gathered=True, rates=None, steps=STEPS):
    """(every rank's parameters, every rank's momentum) after the steps, by the right rule or a mistaken one."""
    parameters, momentum, gradients = _start(k, n, dtype, seed)
    mean = mean or (lambda g, rank: sum(g) / n)
    lr, beta = rates or _rates(seed)
    rule = rule or (lambda p, m, g: (p - lr * (beta * m + g), beta * m + g))
    shards = [list(parameters.chunk(n)) for _ in range(n)]
    momenta = list(momentum.chunk(n))
    for g in gradients[:steps]:
        for rank in range(n):
            own = mean(g, rank).chunk(n)[rank]
            shards[rank][rank], momenta[rank] = rule(shards[rank][rank], momenta[rank], own)
        if gathered:
            shards = [[shards[owner][owner] for owner in range(n)]] * n
            shards = [list(s) for s in shards]
    return [torch.cat(s) for s in shards], momenta


ONLY_SHARDS = {
    "all_reduce": "it calls all_reduce, which brings the whole mean to every rank: a rank needs its own n-th, and "
    "reduce_scatter brings that for half the bytes",
    "broadcast": "it broadcasts: one all_gather brings every rank's shard to all",
    "": "it calls {op}: one reduce_scatter and one all_gather do it",
}


def _judge_step(seen, n, k, dtype, seed, about):
    case, (lr, beta) = (k, n, dtype, seed), _rates(seed)
    parameters, momentum, _ = _start(*case)
    expected, momenta = _by_rule(*case)
    rules = {
        f"the sum was not divided by {n}, the number of ranks": _by_rule(*case, lambda g, _: sum(g)),
        f"divided twice by {n}": _by_rule(*case, lambda g, _: sum(g) / n**2),
        "nothing was reduced: each shard is updated with its owner's gradient alone": _by_rule(
            *case, lambda g, r: g[r]
        ),
        "the shards were not gathered: a rank has updated its own n-th only": _by_rule(*case, gathered=False),
        "the sign is wrong: parameters go down along the momentum": _by_rule(
            *case, rule=lambda p, m, g: (p + lr * (beta * m + g), beta * m + g)
        ),
        "the step uses the gradient instead of the new momentum": _by_rule(
            *case, rule=lambda p, m, g: (p - lr * g, beta * m + g)
        ),
        "the parameters are updated before the momentum: the step uses the old one": _by_rule(
            *case, rule=lambda p, m, g: (p - lr * m, beta * m + g)
        ),
        "the gradient is multiplied by 1 - beta: momentum is beta * momentum + gradient": _by_rule(
            *case, rule=lambda p, m, g: (p - lr * (beta * m + (1 - beta) * g), beta * m + (1 - beta) * g)
        ),
        "the momentum is never kept: write it into `momentum`, the next step needs it": _by_rule(
            *case, rule=lambda p, m, g: (p - lr * (beta * m + g), m)
        ),
        "the old momentum is lost: momentum is beta * momentum + gradient": _by_rule(
            *case, rule=lambda p, m, g: (p - lr * g, g)
        ),
        "this is Nesterov's step, gradient + beta * momentum: the momentum alone is asked for": _by_rule(
            *case, rule=lambda p, m, g: (p - lr * (g + beta * (beta * m + g)), beta * m + g)
        ),
    }
    rules["lr is multiplied into the momentum: it belongs to the step, parameters - lr * momentum"] = _by_rule(
        *case, rule=lambda p, m, g: (p - (beta * m + lr * g), beta * m + lr * g)
    )
    if seed:
        first = _rates(0)
        for what, rates in (("lr is", (first[0], beta)), ("beta is", (lr, first[1])), ("lr and beta are", first)):
            why = f"{what} not used: it is right where they are {first[0]} and {first[1]}, and here {lr} and {beta}"
            rules[why] = _by_rule(*case, rates=rates)
        rules[f"beta is not used: here it is {beta}, and not 1 - lr"] = _by_rule(*case, rates=(lr, 1 - lr))
    before = _by_rule(*case, steps=STEPS - 1)[0][0].chunk(n)
    stale = [torch.cat([p if o == r else before[o] for o, p in enumerate(whole.chunk(n))])
             for r, whole in enumerate(expected)]  # fmt: skip
    mistakes = [(why, would[0]) for why, would in rules.items()]
    mistakes.append(("the shards are gathered before the step: the others have this rank's old one", stale))
    backwards = torch.cat(list(expected[0].chunk(n))[::-1])
    mistakes.append(("the shards are in the wrong order: shard r is rank r's", [backwards] * n))
    idle = "parameters are as they were: write the new shard into them, and those that are gathered"
    mistakes.append((idle, [parameters] * n))
    same([s.kept["parameters"] for s in seen], expected, "parameters", about, mistakes)
    same([s.kept["momentum"] for s in seen], momenta, "momentum", about,
         [("the momentum is never kept: write it into `momentum`", list(momentum.chunk(n)))])  # fmt: skip
    for rank, one in enumerate(seen):
        if not one.kept["read_only"]:
            raise Wrong("the result is right, but `gradients` was changed: work on what reduce_scatter gives",
                        f"rank {rank}, {about}")  # fmt: skip
    judge_moved(seen, n, STEPS * parameters.nbytes, 2, about)


exercise = Exercise(hints, check)
