"""When workers of different speeds would reach an asynchronous server: a run that can be repeated."""

import math


def arrivals(seconds, steps=math.inf, staleness=None, workers=None, until=math.inf):
    """The workers' pushes as they arrive: a list of (when, rank), until all have made their steps, or time is up.

    seconds: how long each worker computes for one step; messages take no time. steps: how many each one makes.
    staleness: a worker that is more steps than this ahead of the slowest waits for it; None: nobody waits.
    workers: their ranks, by default 1, 2, …, as rank 0 serves. Of two that arrive at once the lower rank goes first.
    Raises ValueError where neither steps nor until ends it.
    """
    if math.isinf(steps) and math.isinf(until):
        raise ValueError("arrivals: give steps or until, else it never ends")
    workers = list(range(1, len(seconds) + 1)) if workers is None else list(workers)
    done, found = dict.fromkeys(workers, 0), []
    ready = dict(zip(workers, seconds, strict=True)) if steps else {}  # when each one's next push arrives
    waiting = []
    while ready:
        worker = min(ready, key=lambda w: (ready[w], w))
        now = ready.pop(worker)
        if now > until + 1e-9:  # sums of 2.3 and 6.1 are not exact
            break
        found.append((now, worker))
        done[worker] += 1
        waiting.append(worker)
        slowest = min((done[w] for w in workers if done[w] < steps), default=steps)
        for free in [w for w in waiting if staleness is None or done[w] - slowest <= staleness]:
            waiting.remove(free)
            if done[free] < steps:
                ready[free] = now + seconds[workers.index(free)]
    return found


def arrival_order(seconds, steps, staleness=None, workers=None):
    """The ranks alone of `arrivals`, in their order: a `schedule` for `ParameterServer`."""
    return [worker for _, worker in arrivals(seconds, steps, staleness, workers)]
