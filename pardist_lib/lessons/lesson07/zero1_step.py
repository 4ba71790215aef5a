"""SGD with sharded momentum (ZeRO-1). Typical: nothing divided, gathered too early, everything all-reduced."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, values, what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from ..exercises.watch import watched
from .shared import NOT_FOUR, counted, moves_at_most

hints = (
    "Three parts: dist.reduce_scatter(mean, list(gradients.chunk(n))) leaves the sum of everybody's rank-th n-th "
    "in `mean`; then the optimizer's rule on that n-th; then an all_gather of the parameters.",
    "reduce_scatter gives a sum: divide by n. The rule in place: momentum.mul_(beta).add_(mean), then "
    "parameters.chunk(n)[rank] -= lr * momentum.",
    "chunk gives views, so dist.all_gather(list(parameters.chunk(n)), mine.clone()) writes into parameters.",
)
STEPS = 2
RATES = [(0.1, 0.9), *[(0.3, 0.6)] * 4]  # lr and beta of each case; who writes the first down is seen in the second
OTHER_CALLS = {
    "all_reduce": "it calls all_reduce, which brings the whole mean to every rank: a rank needs its own n-th, and "
    "reduce_scatter brings that for half the bytes",
    "broadcast": "it broadcasts: one all_gather brings every rank's shard to all",
    "": "it calls {op}: one reduce_scatter and one all_gather do it",
}


def check(run):
    for seed, (n, k, dtype) in enumerate([(4, 8, F32), (4, 20, F64), (3, 9, F64), (2, 6, F32), (4, 4096, F32)]):
        about = f"{STEPS} steps with {k} parameters, {str(dtype)[6:]}, on {n} ranks"
        seen = run(_take_steps, k, dtype, seed, n=n, about=about)
        only_calls(seen, ("reduce_scatter", "all_gather", "all_to_all", "send", "recv"), OTHER_CALLS)
        with what_is_new(NOT_FOUR * (n == 3)):
            _judge(seen, _start(k, n, dtype, seed), *RATES[seed], about)


def _start(k, n, dtype, seed):
    """(parameters, whole momentum, [gradients of each rank, for each step])"""
    gradients = [[values((k,), dtype, rank, seed + 10 * (step + 1)) for rank in range(n)] for step in range(STEPS)]
    return values((k,), dtype, 0, seed), values((k,), dtype, 77, seed), gradients


def _take_steps(answer, k, dtype, seed):
    rank, n = dist.get_rank(), dist.get_world_size()
    parameters, momentum, gradients = _start(k, n, dtype, seed)
    momentum, own = momentum.chunk(n)[rank].clone(), [g[rank].clone() for g in gradients]
    seen = watched(lambda: [answer(parameters, g, momentum, *RATES[seed]) for g in own])
    read_only = all(torch.equal(g, before[rank]) for g, before in zip(own, gradients, strict=True))
    seen.kept = {"parameters": parameters, "momentum": momentum, "read_only": read_only}
    return counted(seen, n)


def _judge(seen, start, lr, beta, about):
    n, (before, momentum, gradients), (lr_0, beta_0) = len(seen), start, RATES[0]

    def after(rule=lambda m, g, new: (new, new), mean=lambda g: sum(g) / n, lr=lr, beta=beta, steps=STEPS):
        """The parameters after some steps. rule: what momentum becomes, and along what the step goes."""
        parameters, m = before, momentum
        for g in map(mean, gradients[:steps]):
            m, along = rule(m, g, beta * m + g)
            parameters = parameters - lr * along
        return parameters

    def own_of(those, others):
        """On each rank its own n-th of `those`, and the others' of `others`."""
        pairs = list(zip(those.chunk(n), others.chunk(n), strict=True))
        return [torch.cat([that if r == rank else other for r, (that, other) in enumerate(pairs)]) for rank in range(n)]

    right, unlike = after(), f"it is right where they are {lr_0} and {beta_0}, and here {lr} and {beta}"
    mistakes = [
        (f"the sum was not divided by {n}, the number of ranks", after(mean=sum)),
        (f"divided twice by {n}", after(mean=lambda g: sum(g) / n**2)),
        ("nothing was reduced: each shard is updated with its owner's gradient alone",
         after(mean=lambda g: torch.cat([own.chunk(n)[rank] for rank, own in enumerate(g)]))),
        ("the shards were not gathered: a rank has updated its own n-th only", own_of(right, before)),
        ("the shards are gathered before the step: the others have this rank's old one",
         own_of(right, after(steps=STEPS - 1))),
        ("the sign is wrong: parameters go down along the momentum", after(lambda m, g, new: (new, -new))),
        ("the step uses the gradient instead of the new momentum", after(lambda m, g, new: (new, g))),
        ("the parameters are updated before the momentum: the step uses the old one",
         after(lambda m, g, new: (new, m))),
        ("the gradient is multiplied by 1 - beta: momentum is beta * momentum + gradient",
         after(lambda m, g, new: (new - beta * g, new - beta * g))),
        ("the momentum is never kept: write it into `momentum`, the next step needs it",
         after(lambda m, g, new: (m, new))),
        ("the old momentum is lost: momentum is beta * momentum + gradient", after(lambda m, g, new: (g, g))),
        ("this is Nesterov's step, gradient + beta * momentum: the momentum alone is asked for",
         after(lambda m, g, new: (new, g + beta * new))),
        ("lr is multiplied into the momentum: it belongs to the step, parameters - lr * momentum",
         after(lambda m, g, new: (beta * m + lr * g, beta * m / lr + g))),
        (f"lr is not used: {unlike}", after(lr=lr_0)),
        (f"beta is not used: {unlike}", after(beta=beta_0)),
        (f"lr and beta are not used: {unlike}", after(lr=lr_0, beta=beta_0)),
        (f"beta is not used: here it is {beta}, and not 1 - lr", after(beta=1 - lr)),
        ("the shards are in the wrong order: shard r is rank r's", torch.cat(right.chunk(n)[::-1])),
        ("parameters are as they were: write the new shard into them, and those that are gathered", before),
    ]  # fmt: skip
    same([one.kept["parameters"] for one in seen], right, "parameters", about, mistakes)
    mistakes = [("the momentum is never kept: write it into `momentum`", momentum.chunk(n))]
    for g in gradients:
        momentum = beta * momentum + sum(g) / n
    same([one.kept["momentum"] for one in seen], momentum.chunk(n), "momentum", about, mistakes)
    for rank, one in enumerate(seen):
        if not one.kept["read_only"]:
            why = "the result is right, but `gradients` was changed: work on what reduce_scatter gives"
            raise Wrong(why, f"rank {rank}, {about}")
    moves_at_most(seen, STEPS * before.nbytes, 2, about)


why = (
    "A reduce-scatter and an all-gather move what one all-reduce does, and between them each rank steps its n-th. "
    "Megatron's distributed optimizer and DeepSpeed's stage 1 do it by buckets, and start both halves beside the "
    "computing."
)
exercise = Exercise(hints, check, minutes=20, level="medium", why=why)
