"""Federated averaging: the data stay with the clients that own them, models travel.

A round: some clients are drawn; each takes the common model, trains it for a few epochs on its own rows and returns the
result; the new common model is the mean of these, weighted by the clients' rows. Each rank hosts any number of clients
and trains them one after the other, so that a hundred clients need four ranks, or one.

    one local step on all rows    the mean of the models is a step along the mean gradient: one process (FedSGD)
    several local steps           fewer rounds, but not the same training: clients pull to where their own data are

The mean trusts everybody: one client that lies can put it anywhere. The coordinate-wise median and the trimmed mean
stay among the honest values as long as liars are few. The price: they are not weighted, and where clients' data differ
they hear rare ones less than the mean does.

Sources: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data" (2017), algorithm
1; Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (2018), definitions 1 and 2.
"""

import torch
import torch.distributed as dist

from ..averaging import average_parameters
from .checks import check_round


def federated_round(model, clients, chosen, train, *, aggregate=None, group=None):
    """One round, in place: afterwards every rank's model is the new common one. Returns this rank's updates.

    model      the common model, equal on all ranks. Trainable parameters take part; buffers and frozen parameters stay
               as they were (BatchNorm's statistics say a lot about one client's data: use GroupNorm)
    clients    {client: (x, y)} of the clients that this rank hosts, any or none; each is on exactly one rank
    chosen     the clients that take part, the same list on every rank (`draw_clients`)
    train      train(model, x, y, client) trains the model it is given, in place
    aggregate  None: the mean weighted by rows. Or a function from all chosen clients' updates, (clients, d), to one,
               (d,): `coordinate_median`, `trimmed_mean`. An update is the model after training minus before, flat.

    Returns {client: update} of this rank's own. With S bytes of parameters and k chosen clients all-reduces 4·k bytes
    to see who hosts whom, and S + 8 for the weighted mean, or k·S for `aggregate`.

    Raises ValueError for a client without rows, and where not every chosen client is on exactly one rank.
    """
    mine = [c for c in chosen if c in clients]
    check_round(clients, chosen, group)
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [t.detach().clone() for t in model.buffers()]
    start = _flat(parameters)
    updates = {}
    for client in mine:
        x, y = clients[client]
        train(model, x, y, client)
        updates[client] = _flat(parameters) - start
        _write(parameters, start)
        for buffer, before in zip(model.buffers(), kept, strict=True):
            buffer.data.copy_(before)
    if aggregate is None:
        rows = sum(len(clients[c][0]) for c in mine)
        for client, update in updates.items():
            start = start + len(clients[client][0]) / rows * update
        _write(parameters, start)
        average_parameters(model, rows, group)  # this rank's mean weighs as much as its clients have rows
    else:
        table = start.new_zeros(len(chosen), start.numel())
        for client, update in updates.items():
            table[chosen.index(client)] = update
        dist.all_reduce(table, group=group)  # each row is filled by one rank, and zeros on the others
        _write(parameters, start + aggregate(table))
    return updates


def _flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


def _write(parameters, flat):
    with torch.no_grad():
        for p, values in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.copy_(values.view_as(p))


def draw_clients(clients, share, round, seed=0):
    """The clients of one round: max(1, ⌊share · clients⌋) different ones, in order; the same on every rank.

    share: C of the paper, above 0 and at most 1. round, seed: whole numbers; another round draws others.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of clients in a round is above 0 and at most 1, not {share}")
    if clients < 1:
        raise ValueError(f"{clients} clients: there is nobody to draw")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + round)
    many = max(1, int(share * clients + 1e-9))
    return sorted(torch.randperm(clients, generator=generator)[:many].tolist())


def train_locally(model, loss, x, y, *, epochs=1, batch=None, lr=0.1, generator=None):
    """ClientUpdate of the paper, in place: `epochs` passes of plain SGD over a client's rows, in mini-batches.

    loss       loss(model(x), y), a mean over its rows
    batch      rows in a mini-batch (the last may be smaller); None: all rows at once
    generator  torch.Generator that shuffles the rows before each epoch; None: they stay in order

    Sends nothing. Raises ValueError for a client without rows.
    """
    rows = len(x)
    if not rows:
        raise ValueError("a client with no data cannot train: leave it out of the round")
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(epochs):
        order = torch.arange(rows) if generator is None else torch.randperm(rows, generator=generator)
        for some in order.split(batch or rows):
            value = loss(model(x[some]), y[some])
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    if g is not None:
                        p -= lr * g


def trimmed_mean(updates, trim):
    """(k, d) -> (d,): in each coordinate the mean without the `trim` largest and the `trim` smallest values.

    Stands up to `trim` clients that lie. Raises ValueError where nothing would be left, or trim is negative.
    """
    if not 0 <= 2 * trim < len(updates):
        raise ValueError(f"{trim} cut off at either end of {len(updates)} updates: it has to be fewer than half")
    return updates.sort(0)[0][trim : len(updates) - trim].mean(0)


def coordinate_median(updates):
    """(k, d) -> (d,): in each coordinate the middle value, of an even number the mean of the two in the middle.

    (torch.median takes the lower of the two.) Stands up to liars as long as they are fewer than half of the clients.
    """
    return trimmed_mean(updates, (len(updates) - 1) // 2)
