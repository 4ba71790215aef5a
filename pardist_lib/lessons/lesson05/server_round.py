"""The exercise server_round."""

import torch
import torch.distributed as dist

from pardist_lib.ranks.report import plural

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, by_hand, peers, same, sent
from ..exercises.watch import watched

hints = (
    "Two roles in one function: if rank == server … else …. A worker's part is two lines: send the gradient, "
    "receive theta.",
    "The server receives one gradient after the other, each into a buffer of its own or added up at once, before "
    "it changes theta; then it sends theta to each worker.",
    "The mean is over the workers: all ranks but the server, dist.get_world_size() - 1 of them.",
)


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


def _round(answer, shape, dtype, lr, server, seed):
    """On a rank: one round; a worker begins with other parameters than the server's."""
    rank = dist.get_rank()
    theta, gradient = values(shape, dtype, rank, seed), values(shape, dtype, 50 + rank, seed)
    kept = gradient.clone()
    seen = watched(answer, theta, None if rank == server else gradient, lr, server)
    seen.kept = {"theta": theta, "gradient changed": not torch.equal(kept, gradient)}
    return seen


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


exercise = Exercise(hints, check)
