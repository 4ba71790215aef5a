"""Training with a parameter server, on the ranks and in one process."""

import torch
import torch.distributed as dist

from pardist_lib.mechanisms.parameter_server import ParameterServer
from tests.mechanisms.nets import OPTIMIZERS, Net, gradient_of, loss_of, state


def rows_of(worker, step, dtype=torch.float64):
    """Uneven batches, one of them empty now and then."""
    count = 0 if (worker + step) % 7 == 6 else 1 + (worker + step) % 3
    generator = torch.Generator().manual_seed(1000 * worker + step)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64).to(dtype)


def train(steps, optimizer, dtype=torch.float64, server=0, group=None, extra_on=(), **options):
    """On a rank: everything from the start to the end; every rank begins with weights of its own."""
    rank = dist.get_rank(group)
    net = Net(rank, dtype)
    with ParameterServer(net, OPTIMIZERS[optimizer](net.parameters()), server=server, group=group, **options) as ps:
        if ps.serving:
            ps.serve()
        else:
            for step in range(steps):
                x = rows_of(rank, step, dtype)
                gradient_of(net, x, rank in extra_on)
                ps.step(rows=len(x))
    return state(net), ps.log, ps.version


def alone(steps, optimizer, workers, seed, dtype=torch.float64, extra_on=()):
    """The same in one process, on the whole batch."""
    net = Net(seed, dtype)
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    for step in range(steps):
        batches = [(rows_of(w, step, dtype), w in extra_on) for w in workers]
        total = sum(len(x) for x, _ in batches)
        optimizer.zero_grad()
        if total:
            sum(len(x) / total * loss_of(net, x, extra) for x, extra in batches if len(x)).backward()
        optimizer.step()
    return state(net)
