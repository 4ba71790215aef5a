"""Reference solutions of lesson 05. Their signatures and docstrings are the blanks of the notebook."""

import torch
import torch.distributed as dist


def average_by_rows(model: torch.nn.Module, rows: int, group=None) -> None:
    """Replace every trainable parameter by its mean over the ranks, weighted by their rows.

    model: the same shapes on every rank, each rank's own values. rows: how many rows this rank has
    trained on, 0 or more; each rank knows its own number only. group: the ranks that average; None
    means all. In place: θ = Σ rows·θ / Σ rows, for each `p` of `model.parameters()` that is not
    frozen. Frozen parameters and the gradients stay as they are.
    Sends: one dist.all_reduce of each parameter, or one of all laid end to end, and one of a single
    number; nothing else.
    """
    total = torch.tensor([float(rows)], dtype=torch.float64)
    dist.all_reduce(total, group=group)  # now everybody's rows
    for p in model.parameters():
        if p.requires_grad:
            p.data *= rows / total.item()
            dist.all_reduce(p.data, group=group)


def local_sgd_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    k: int,
) -> None:
    """One step of local SGD, on every rank: a step by oneself, every k-th time the mean of all.

    model: each rank's own, with its gradients; optimizer: a torch optimizer of its parameters, its
    own too. step: the number of this step, from 0. The parameters are averaged at the end of steps
    k - 1, 2k - 1, … In place: the trainable parameters. The optimizer's state is not exchanged, and
    the gradients stay.
    Sends: nothing in the other steps; in those, one dist.all_reduce of each trainable parameter, or
    one of all laid end to end.
    """
    optimizer.step()
    if (step + 1) % k == 0:
        for p in model.parameters():
            if p.requires_grad:
                dist.all_reduce(p.data)
                p.data /= dist.get_world_size()


def server_round(theta: torch.Tensor, gradient: torch.Tensor, lr: float, server: int = 0) -> None:
    """One synchronous step of a parameter server. On every rank: `server` serves, all others work.

    theta: the parameters as one tensor, contiguous. The server's are those that count; a worker's
    are old. gradient: on a worker the gradient of its own rows, like theta; on the server None. It
    is not changed.
    In place: afterwards every rank's theta holds θ - lr · (mean of the workers' gradients), θ being
    the server's.
    Sends: dist.send and dist.recv (or isend, irecv) only. Each worker sends one tensor to the
    server and receives one from it; workers do not talk to each other.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    if rank != server:
        dist.send(gradient, server)  # push
        dist.recv(theta, server)  # pull
        return
    workers = [r for r in range(n) if r != server]
    total, arrived = torch.zeros_like(theta), torch.empty_like(theta)
    for worker in workers:
        dist.recv(arrived, worker)
        total += arrived
    theta -= lr * total / len(workers)
    for worker in workers:
        dist.send(theta, worker)


def may_proceed(clocks: list, worker: int, staleness: int | None) -> bool:
    """Whether a worker may begin its next step, under bounded staleness (Ho et al. 2013).

    clocks: how many steps each worker has made; clocks[i] is worker i's. worker: who asks.
    staleness: a worker that is more than this many steps ahead of the slowest one has to wait;
    None: nobody waits.
    Returns True or False. clocks is not changed.
    """
    return staleness is None or clocks[worker] - min(clocks) <= staleness


def apply_stale(
    theta: torch.Tensor,
    gradient: torch.Tensor,
    computed_at: int,
    version: int,
    lr: float,
    limit: int,
) -> int:
    """What an asynchronous server does with one gradient that may be stale.

    theta: the server's parameters, which have reached `version`. gradient: computed by a worker
    from the parameters of version `computed_at`; its staleness is how many versions theta has moved
    on since. It is not changed.
    In place: a gradient staler than `limit` is dropped, theta stays. Any other one is applied, the
    more carefully the staler it is: theta - lr / (1 + staleness) · gradient.
    Returns the version that theta has now: one more for every gradient applied.
    """
    stale = version - computed_at
    if stale > limit:
        return version
    theta -= lr / (1 + stale) * gradient
    return version + 1
