"""Wrong answers to my_all_gather, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from tests.lessons.lesson01.shared import ring, swap
from tests.lessons.planted import mistake, right


@mistake("my_all_gather", "it returns a list: torch.stack makes one tensor of it")
def as_a_list(tensor):
    rank, n, left, right = ring()
    rows = [torch.empty_like(tensor) for _ in range(n)]
    rows[rank].copy_(tensor)
    for step in range(n - 1):
        swap(rows[(rank - step) % n], rows[(rank - step - 1) % n], right, left)
    return rows


@mistake("my_all_gather", "the rows are in order of arrival")
def in_order_of_arrival(tensor):
    rank, n, left, right = ring()
    rows = [tensor]
    for _ in range(n - 1):
        rows.append(torch.empty_like(tensor))
        swap(rows[-2], rows[-1], right, left)
    return torch.stack(rows)


@mistake("my_all_gather", "a rank's own row is not filled")
def own_row_forgotten(tensor):
    rank, n, _, _ = ring()
    rows = tensor.new_zeros(n, *tensor.shape)
    messages = [dist.isend(tensor, other) for other in range(n) if other != rank]
    messages += [dist.irecv(rows[other], other) for other in range(n) if other != rank]
    for message in messages:
        message.wait()
    return rows


@mistake("my_all_gather", "a rank's own row is not filled")
def own_row_forgotten_and_not_zero(tensor):
    rank, n, _, _ = ring()
    rows = tensor.new_full((n, *tensor.shape), 77)
    messages = [dist.isend(tensor, other) for other in range(n) if other != rank]
    messages += [dist.irecv(rows[other], other) for other in range(n) if other != rank]
    for message in messages:
        message.wait()
    return rows


@mistake("my_all_gather", "it does not work for a tensor without dimensions, a single number")
def joined_and_viewed(tensor):
    rank, n, left, right = ring()
    rows = [torch.empty_like(tensor) for _ in range(n)]
    rows[rank].copy_(tensor)
    for step in range(n - 1):
        swap(rows[(rank - step) % n], rows[(rank - step - 1) % n], right, left)
    return torch.cat(rows).view(n, *tensor.shape)


@mistake("my_all_gather", "the message is float64, the tensor float32: send it in its own dtype")
def gathers_float64(tensor):
    rank, n, left, right = ring()
    rows = tensor.new_empty((n, *tensor.shape), dtype=torch.float64)
    rows[rank] = tensor
    for step in range(n - 1):
        swap(rows[(rank - step) % n], rows[(rank - step - 1) % n], right, left)
    return rows.to(tensor.dtype)


@mistake("my_all_gather", "what was received has to be passed on")
def passes_on_its_own_again(tensor):
    rank, n, left, right = ring()
    rows = tensor.new_empty(n, *tensor.shape)
    rows[rank] = tensor
    for step in range(n - 1):
        swap(tensor, rows[(rank - step - 1) % n], right, left)
    return rows


@mistake("my_all_gather", "everything passes through rank 0")
def gather_and_send_back(tensor):
    rank, n, _, _ = ring()
    rows = tensor.new_empty(n, *tensor.shape)
    rows[rank] = tensor
    for other in range(1, n):
        if rank == 0:
            dist.recv(rows[other], other)
        elif rank == other:
            dist.send(tensor, 0)
    for other in range(1, n):
        if rank == 0:
            dist.send(rows, other)
        elif rank == other:
            dist.recv(rows, 0)
    return rows


@mistake("my_all_gather", "it calls torch's own all_gather")
def by_functional(tensor):
    rows = functional.all_gather_tensor(tensor, 0, dist.group.WORLD)
    return rows.view(-1, *tensor.shape)


@mistake("my_all_gather", "the values are right, but the shape is (32,)")
def end_to_end(tensor):
    rank, n, left, right = ring()
    rows = tensor.new_empty(n, *tensor.shape)
    rows[rank] = tensor
    for step in range(n - 1):
        swap(rows[(rank - step) % n], rows[(rank - step - 1) % n], right, left)
    return rows.flatten()


@mistake("my_all_gather", "it works for float32, but not for int64")
def floats_only(tensor):
    rank, n, left, right = ring()
    rows = torch.empty(n, *tensor.shape)
    rows[rank] = tensor
    for step in range(n - 1):
        swap(rows[(rank - step) % n], rows[(rank - step - 1) % n], right, left)
    return rows


@mistake("my_all_gather", "384 bytes leave ranks 0–3: n - 1 tensors of 32 bytes are enough")
def passes_on_everything(tensor):
    rank, n, left, right = ring()
    rows, arrived = tensor.new_zeros(n, *tensor.shape), tensor.new_zeros(n, *tensor.shape)
    rows[rank] = tensor
    for step in range(n - 1):
        swap(rows, arrived, right, left)
        rows[(rank - step - 1) % n] = arrived[(rank - step - 1) % n]
    return rows


@mistake("my_all_gather", "n - 1 steps are needed")
def a_row_too_few(tensor):
    rank, n, left, right = ring()
    rows = tensor.new_zeros(n, *tensor.shape)
    rows[rank] = tensor
    for step in range(n - 2):
        swap(rows[(rank - step) % n], rows[(rank - step - 1) % n], right, left)
    return rows


@right("my_all_gather")
def straight_to_all(tensor):
    rank, n = dist.get_rank(), dist.get_world_size()
    rows = [tensor.clone() for _ in range(n)]
    messages = [dist.isend(tensor, r) for r in range(n) if r != rank]
    messages += [dist.irecv(rows[r], r) for r in range(n) if r != rank]
    for message in messages:
        message.wait()
    return torch.stack(rows)
