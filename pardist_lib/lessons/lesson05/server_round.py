"""A synchronous round by send and receive; typically answers before all gradients, sums, a 0 written into it."""

import torch
import torch.distributed as dist

from pardist_lib.ranks.report import plural

from ..exercises.cases import F32, F64, values, what_is_new
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
    for seed, (n, shape, dtype, lr, server, new) in enumerate(CASES):
        about = f"{n} ranks, rank {server} serves, theta of shape {shape}"
        with what_is_new(new):
            seen = run(_round, shape, dtype, lr, server, seed, n=n, about=about)
            by_hand(seen)
            for rank, one in enumerate(seen):
                if one.kept["changed"]:
                    raise Wrong("the worker's `gradient` was changed: it is only to be sent", f"rank {rank}, {about}")
            _judge(seen, lr, server, about)


CASES = [  # ranks, shape, dtype, lr, server, what is new in it
    (4, (6,), F64, 0.5, 0, ""),
    (4, (3, 5), F32, 0.1, 0, ""),
    (4, (5,), F64, 0.1, 2, "it works where rank 0 serves, but not where rank 2 does (is a 0 written into it?)"),
    (3, (7,), F64, 0.25, 2, ""),
    (2, (4,), F64, 2.0, 1, ""),
    (4, (), F64, 0.3, 3, ""),
]


def _round(answer, shape, dtype, lr, server, seed):
    """On a rank: one round; a worker begins with other parameters than the server's."""
    rank = dist.get_rank()
    theta, gradient = values(shape, dtype, rank, seed), values(shape, dtype, 50 + rank, seed)
    given = {"start": theta.clone(), "gradient": gradient.clone()}
    seen = watched(answer, theta, None if rank == server else gradient, lr, server)
    seen.kept = given | {"theta": theta, "changed": not torch.equal(gradient, given["gradient"])}
    return seen


def _judge(seen, lr, server, about):
    n, start = len(seen), [one.kept["start"] for one in seen]
    gradients = {rank: one.kept["gradient"] for rank, one in enumerate(seen) if rank != server}
    workers, theta, total = list(gradients), start[server], sum(gradients.values())
    mean = total / len(workers)
    new = theta - lr * mean

    def workers_have(value):
        """What the ranks have when the server's theta is right, and a worker's is value, or value(worker)."""
        return [new if r == server else value(r) if callable(value) else value for r in range(n)]

    def one_by_one(parts):
        """What they have when the server steps at each gradient as it comes, divided by parts, and answers at once."""
        held, now = list(start), theta
        for r in workers:
            held[r] = now = now - lr * gradients[r] / parts
        held[server] = now
        return held

    written_in = "workers: is that number written into it?"
    divided = f"divided by {n}, where there are {n - 1} {written_in}"
    if n == 4:
        divided = f"divided by all {n} ranks: the server has no gradient, the mean is over the {n - 1} workers"
    old = "the workers get the parameters of before the step: first all gradients, then the step, then the answers"
    lost = "the workers do not get the new parameters: theta is received into something else, or not at all"
    stays = "the server sends new parameters, but its own stay as they were: theta -= … changes them in place"
    own = "this is the mean of the workers' parameters after a step of their own, from old ones: the server is to step"
    early = "each worker is answered before the others' gradients are in: synchronous means that all wait for all"
    each = "each gradient is applied by itself with the full lr, and each worker answered at once: that is asynchronous"
    last = "gradient is applied: each one overwrites what came before, add them up"
    one = f"gradient arrives, and it counts as one of {n - 1}"
    mistakes = {
        old: workers_have(theta),
        lost: workers_have(lambda r: start[r]),
        stays: [theta if r == server else new for r in range(n)],
        "the workers' theta holds the mean gradient: the server sends back parameters": workers_have(mean),
        "the workers' theta holds the sum of the gradients: the server sends back parameters": workers_have(total),
        "the sum of the gradients is applied: divide by the number of workers": theta - lr * total,
        divided: theta - lr * total / n,
        f"divided by 3, where there are {n - 1} {written_in}": theta - lr * total / 3,
        own: sum(start[r] - lr * gradients[r] for r in workers) / len(workers),
        "the sign is wrong: a step goes against the gradient": theta + lr * mean,
        "lr is missing": theta - mean,
        "this is the mean gradient itself: theta has to make a step with it": mean,
        "this is lr times the mean gradient: subtract it from theta": lr * mean,
        **{f"only worker {r}'s {last}": theta - lr * gradients[r] for r in (workers[-1], workers[0])},
        **{f"only worker {r}'s {one}": theta - lr * gradients[r] / (n - 1) for r in (workers[-1], workers[0])},
        "each worker has stepped from its own old parameters: the server's count": [held - lr * mean for held in start],
        "each worker has made a step with its own gradient": workers_have(lambda r: start[r] - lr * gradients[r]),
        early: one_by_one(n - 1),
        each: one_by_one(1),
        "lr is applied twice": theta - lr * lr * mean,
        f"divided twice by {n - 1}": theta - lr * mean / (n - 1),
    }
    same([one.kept["theta"] for one in seen], new, "theta", about, mistakes.items(), start)
    for rank in workers:
        if others := peers(seen)[rank] - {server}:
            why = f"worker {rank} sends to {plural(sorted(others))}: workers talk to the server only"
            raise Wrong(f"the result is right, but {why}", about)
    made, wanted = sent(seen), [theta.nbytes * (n - 1 if r == server else 1) for r in range(n)]
    for rank, (size, fair) in enumerate(zip(made, wanted, strict=True)):
        if size != fair:
            why = f"rank {rank} sends {size:,} bytes where {fair:,} are enough: one tensor up, one down for each worker"
            shown = f"{wanted} bytes, rank by rank", f"{made} bytes"
            raise Wrong(f"the result is right, but {why}", about, *shown)


why = (
    "The server answers nobody before all gradients are in, so its step is that of one process with all rows. "
    "Real parameter servers (ps-lite, torch's RPC tutorials) cut the parameters over several servers, so that "
    "no one link carries 2·N·S."
)
exercise = Exercise(hints, check, minutes=15, level="medium", why=why)
