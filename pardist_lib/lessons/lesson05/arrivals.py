"""In which order workers of different speeds would reach an asynchronous server: a run that can be repeated."""


def arrival_order(seconds, steps, staleness=None, workers=None):
    """The workers' pushes in the order of their arrival, as a list of ranks: a `schedule` for `ParameterServer`.

    seconds: how long each worker computes for one step; messages take no time. steps: how many each one makes.
    staleness: a worker that is more steps than this ahead of the slowest waits for it; None: nobody waits.
    workers: their ranks, by default 1, 2, …, as rank 0 serves. Of two that arrive at once the lower rank goes first.
    """
    workers = list(range(1, len(seconds) + 1)) if workers is None else list(workers)
    done, order = dict.fromkeys(workers, 0), []
    ready = dict(zip(workers, seconds, strict=True)) if steps else {}  # when each one's next push arrives
    waiting = []
    while ready:
        worker = min(ready, key=lambda w: (ready[w], w))
        now = ready.pop(worker)
        order.append(worker)
        done[worker] += 1
        waiting.append(worker)
        slowest = min((done[w] for w in workers if done[w] < steps), default=steps)
        for free in [w for w in waiting if staleness is None or done[w] - slowest <= staleness]:
            waiting.remove(free)
            if done[free] < steps:
                ready[free] = now + seconds[workers.index(free)]
    return order
