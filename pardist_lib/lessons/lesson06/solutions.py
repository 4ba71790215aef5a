"""Reference solutions of lesson 06. Their signatures and docstrings are the blanks of the notebook."""

import torch
import torch.distributed as dist


def broadcast_model(model: torch.nn.Module, group=None) -> None:
    """Give every rank the parameters and buffers that the group's first rank has. Called before the
    first step.

    model: the same shapes on every rank, other values. Some parameters are frozen, some modules
    have buffers.
    group: the ranks that take part; None means all of them. Its first rank need not be rank 0.
    In place: an optimizer may have been made of these parameters already.
    Sends: dist.broadcast of each parameter and each buffer; nothing else.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), group=group, group_src=0)


def average_in_hooks(model: torch.nn.Module, group=None) -> None:
    """Arrange that every later backward() leaves each gradient's mean over the ranks in p.grad.
    Called once.

    model: the same parameters on every rank; some are frozen, some no rank uses.
    group: the ranks that average; None means all of them. Each mean is made while backward is still
    at work, in a hook of the parameter. The weights are not touched.
    Sends: in each backward one dist.all_reduce of each gradient; nothing else.
    """
    n = dist.get_world_size(group)

    def average(p):  # called with the parameter, as soon as its gradient is complete
        dist.all_reduce(p.grad, group=group)
        p.grad /= n

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(average)


def reduce_buckets(arriving, group=None) -> None:
    """Average buckets of gradients over the ranks, the first of them while others are still being
    filled.

    arriving: yields (number, bucket) when a bucket is full, each of the numbers 0, 1, 2, … once, in
    an order that may differ from rank to rank. bucket: a flat tensor; the buckets of one number are
    of the same size on all ranks.
    In place: when this returns, each bucket holds the mean over the ranks.
    Sends: one dist.all_reduce(…, async_op=True) of each bucket, in the same order on every rank:
    number i starts as soon as the numbers 0 to i are here. Nothing is waited for before the last
    bucket is here.
    """
    full, started = {}, []
    for number, bucket in arriving:
        full[number] = bucket
        while len(started) in full:  # it is its turn
            bucket = full[len(started)]
            started.append((dist.all_reduce(bucket, group=group, async_op=True), bucket))
    for work, bucket in started:
        work.wait()
        bucket /= dist.get_world_size(group)


def accumulate_gradients(model: torch.nn.Module, batches: list, loss_of, group=None) -> None:
    """Leave in p.grad the gradient of the mean loss over several micro-batches of every rank.

    model: the same parameters on every rank. p.grad may hold an old gradient: it does not count.
    batches: this rank's micro-batches (x, y), as many on every rank, each with as many rows.
    loss_of(model, x, y): the mean loss of one micro-batch. Only one micro-batch's activations fit
    in memory.
    group: the ranks that average; None means all of them.
    Sends: one dist.all_reduce of each gradient, when all micro-batches are done; nothing else.
    """
    model.zero_grad()
    for x, y in batches:
        (loss_of(model, x, y) / len(batches)).backward()
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)


def sample_indices(length: int, rank: int, n: int, epoch: int, seed: int = 0) -> list:
    """The samples that one of n ranks sees in an epoch, in its order.

    length: how many samples there are, at least n. rank: 0 to n - 1.
    Returns a list of numbers from 0 to length - 1. All ranks together see each sample exactly once,
    and no rank has two more than another. They are shuffled: another epoch (or seed) deals them out
    anew, in another order; the same arguments always give the same list. torch's and Python's own
    random numbers are left alone.
    """
    shuffle = torch.Generator().manual_seed(seed + epoch)  # the same on every rank
    return torch.randperm(length, generator=shuffle)[rank::n].tolist()


def weighted_gradients(model: torch.nn.Module, rows: int, group=None) -> None:
    """Replace every gradient by that of the mean loss over all rows of all ranks.

    model: the same parameters on every rank; p.grad is that of the mean loss over this rank's own
    rows (None on every rank, or on none). rows: how many those are; they differ from rank to rank,
    and may be 0 (with a gradient of zeros), but not everywhere. group: the ranks that take part;
    None means all of them.
    In place: afterwards `p.grad` is the same on every rank; the weights are not touched.
    Sends: one dist.all_reduce of each gradient, and one of at most 8 bytes; nothing else.
    """
    total = torch.tensor(rows)
    dist.all_reduce(total, group=group)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= rows / total.item()  # this rank's part of all rows
            dist.all_reduce(p.grad, group=group)


def top_k_step(
    gradient: torch.Tensor, residual: torch.Tensor, k: int, group=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the k largest elements only, and keep the others for the next step (error feedback).

    gradient: (s,), this rank's. residual: (s,), what this rank did not send so far. Neither is
    changed.
    What is sent: the k elements of gradient + residual that are largest in absolute value, with
    their places.
    Returns (mean, rest), both (s,): mean is the sum of what all ranks sent, each element in its
    place, divided by the number of ranks, and zero where nobody sent; rest is what this rank has
    still not sent.
    Sends: dist.all_gather of k elements, and of k places of at most 8 bytes; nothing else.
    """
    n, wanted = dist.get_world_size(group), gradient + residual
    places = wanted.abs().topk(k).indices
    values = wanted[places]
    all_values, all_places = ([torch.empty_like(t) for _ in range(n)] for t in (values, places))
    dist.all_gather(all_values, values, group=group)
    dist.all_gather(all_places, places, group=group)
    mean, rest = torch.zeros_like(gradient), wanted.clone()
    for some, where in zip(all_values, all_places, strict=True):
        mean[where] += some / n
    rest[places] = 0
    return mean, rest
