"""Right answers other than the reference solutions: none of them may be refused."""

import statistics

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from planted import right


@right("shard_rows")
def every_nth(n, rank, world_size):
    return range(rank, n, world_size)


@right("shard_rows")
def a_slice(n, rank, world_size):
    each, left = divmod(n, world_size)
    start = rank * each + min(rank, left)
    return slice(start, start + each + (rank < left))


@right("shard_rows")
def by_numpy(n, rank, world_size):
    rows = np.array_split(np.arange(n), world_size)[rank]
    return range(int(rows[0]), int(rows[-1]) + 1) if len(rows) else range(0)


@right("average_gradients")
def one_flat_tensor(model, group=None):
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


@right("average_gradients")
def by_avg(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG, group=group)


@right("average_gradients")
def divides_first(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.div_(dist.get_world_size(group))
            dist.all_reduce(p.grad, group=group)


@right("average_gradients")
def all_at_once(model, group=None):
    parameters = [p for p in model.parameters() if p.grad is not None]
    for work in [dist.all_reduce(p.grad, group=group, async_op=True) for p in parameters]:
        work.wait()
    for p in parameters:
        p.grad = p.grad / dist.get_world_size(group)


@right("average_gradients")
def functionally(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            p.grad = functional.all_reduce(p.grad, "avg", group or dist.group.WORLD).clone()


@right("average_used_gradients")
def flags_in_the_flat_tensor(model, group=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    used = torch.tensor([float(p.grad is not None) for p in parameters], dtype=parts[0].dtype)
    flat = torch.cat([*parts, used])
    dist.all_reduce(flat, group=group)
    *means, used = (flat / dist.get_world_size(group)).split([*(p.numel() for p in parameters), len(parameters)])
    for p, mean, share in zip(parameters, means, used.tolist(), strict=True):
        if share > 0:
            p.grad = mean.view_as(p).clone()


@right("average_used_gradients")
def bytes_and_max(model, group=None):
    parameters = list(model.parameters())
    used = torch.tensor([p.grad is not None for p in parameters]).byte()
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
    for p, anyone in zip(parameters, used.tolist(), strict=True):
        if anyone:
            g = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(g, group=group)
            p.grad = g / dist.get_world_size(group)


@right("my_broadcast")
def along_a_chain(tensor, src):
    n = dist.get_world_size()
    place = (dist.get_rank() - src) % n
    if place > 0:
        dist.recv(tensor, (src + place - 1) % n)
    if place < n - 1:
        dist.send(tensor, (src + place + 1) % n)


@right("my_broadcast")
def along_a_tree(tensor, src):
    n, step = dist.get_world_size(), 1
    place = (dist.get_rank() - src) % n
    while step < n:
        if place < step and place + step < n:
            dist.send(tensor, (src + place + step) % n)
        elif step <= place < 2 * step:
            dist.recv(tensor, (src + place - step) % n)
        step *= 2


@right("my_broadcast")
def as_a_batch(tensor, src):
    if dist.get_rank() == src:
        calls = [dist.P2POp(dist.isend, tensor, r) for r in range(dist.get_world_size()) if r != src]
    else:
        calls = [dist.P2POp(dist.irecv, tensor, src)]
    for message in dist.batch_isend_irecv(calls):
        message.wait()
    return tensor


@right("exchange")
def rank_0_sends_first(tensor):
    rank, n = dist.get_rank(), dist.get_world_size()
    received = []
    for to, source in ((rank + 1) % n, (rank - 1) % n), ((rank - 1) % n, (rank + 1) % n):
        received.append(torch.empty_like(tensor))
        if rank == 0:
            dist.send(tensor, to)
        dist.recv(received[-1], source)
        if rank != 0:
            dist.send(tensor, to)
    return received


@right("my_all_gather")
def straight_to_all(tensor):
    rank, n = dist.get_rank(), dist.get_world_size()
    rows = [tensor.clone() for _ in range(n)]
    messages = [dist.isend(tensor, r) for r in range(n) if r != rank]
    messages += [dist.irecv(rows[r], r) for r in range(n) if r != rank]
    for message in messages:
        message.wait()
    return torch.stack(rows)


@right("my_ring_all_reduce")
def padded(tensor):
    rank, n = dist.get_rank(), dist.get_world_size()
    flat = tensor.reshape(-1)
    each = -(-flat.numel() // n)
    rows = torch.cat([flat, flat.new_zeros(n * each - flat.numel())]).view(n, each)
    for first, add in ((0, True), (-1, False)):
        for step in range(n - 1):
            arrived = torch.empty_like(rows[0])
            message = dist.isend(rows[(rank - first - step) % n], (rank + 1) % n)
            dist.recv(arrived, (rank - 1) % n)
            message.wait()
            rows[(rank - first - step - 1) % n] = arrived + rows[(rank - first - step - 1) % n] * add
    tensor.copy_(rows.view(-1)[: flat.numel()].view_as(tensor))
    return tensor


@right("my_ring_all_reduce")
def ends_with_its_own_piece(tensor):
    rank, n = dist.get_rank(), dist.get_world_size()
    right, left = (rank + 1) % n, (rank - 1) % n
    flat = tensor.view(-1)
    cuts = [flat.numel() * i // n for i in range(n + 1)]
    pieces = [flat[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    for step in range(1, 2 * n - 1):
        out, piece = pieces[(rank - step) % n], pieces[(rank - step - 1) % n]
        arrived = torch.empty_like(piece)
        for message in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, out, right), dist.P2POp(dist.irecv, arrived, left)]
        ):
            message.wait()
        if step < n:
            piece += arrived
        else:
            piece.copy_(arrived)


@right("ring_bytes")
def as_a_tensor(size_in_bytes, n):
    return torch.tensor(2 * (n - 1) / n * size_in_bytes)


@right("bus_bandwidth")
def of_numpy(size_in_bytes, seconds, n):
    return np.float64(size_in_bytes) / seconds * 2 * (n - 1) / n


@right("fit_alpha_beta")
def polyfit(sizes, seconds):
    slope, latency = np.polyfit(sizes, seconds, 1, w=1 / np.array(seconds))
    return latency, 1 / slope


@right("fit_alpha_beta")
def by_weighted_means(sizes, seconds):
    weights = [1 / t**2 for t in seconds]
    x0, y0 = (statistics.fmean(values, weights) for values in (sizes, seconds))
    above = sum(w * (x - x0) * (y - y0) for w, x, y in zip(weights, sizes, seconds, strict=True))
    slope = above / sum(w * (x - x0) ** 2 for w, x in zip(weights, sizes, strict=True))
    return [y0 - slope * x0, 1 / slope]


@right("fit_alpha_beta")
def by_lstsq(sizes, seconds):
    x = torch.tensor([[1 / t, s / t] for s, t in zip(sizes, seconds, strict=True)], dtype=torch.float64)
    latency, slope = torch.linalg.lstsq(x, torch.ones(len(sizes), 1, dtype=torch.float64)).solution.flatten()
    return latency, 1 / slope
