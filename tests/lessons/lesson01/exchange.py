"""Wrong answers to exchange, as people really write them, and unusual right ones."""

import threading

import torch
import torch.distributed as dist

from tests.lessons.lesson01.shared import ring
from tests.lessons.planted import mistake, right


@mistake("exchange", "every rank is in send")
def all_send_first(tensor):
    _, _, left, right = ring()
    from_left, from_right = torch.empty_like(tensor), torch.empty_like(tensor)
    dist.send(tensor, right)
    dist.recv(from_left, left)
    dist.send(tensor, left)
    dist.recv(from_right, right)
    return from_left, from_right


@mistake("exchange", "every rank waits in recv")
def all_receive_first(tensor):
    _, _, left, right = ring()
    from_left, from_right = torch.empty_like(tensor), torch.empty_like(tensor)
    dist.recv(from_left, left)
    dist.send(tensor, right)
    dist.recv(from_right, right)
    dist.send(tensor, left)
    return from_left, from_right


@mistake("exchange", "left and right are swapped")
def swapped(tensor):
    _, _, left, right = ring()
    from_left, from_right = torch.empty_like(tensor), torch.empty_like(tensor)
    messages = [dist.isend(tensor, right), dist.isend(tensor, left)]
    messages += [dist.irecv(from_left, left), dist.irecv(from_right, right)]
    for message in messages:
        message.wait()
    return from_right, from_left


@mistake("exchange", "never waited for")
def forgets_to_wait(tensor):
    _, _, left, right = ring()
    from_left, from_right = torch.zeros_like(tensor), torch.zeros_like(tensor)
    dist.isend(tensor, right), dist.isend(tensor, left)
    dist.irecv(from_left, left), dist.irecv(from_right, right)
    return from_left, from_right


@mistake("exchange", "it calls torch's own all_gather")
def gathers(tensor):
    rank, n, left, right = ring()
    rows = [torch.empty_like(tensor) for _ in range(n)]
    dist.all_gather(rows, tensor)
    return rows[left], rows[right]


@mistake("exchange", "the pair (from_left, from_right) is asked for")
def stacked(tensor):
    _, _, left, right = ring()
    both = torch.stack([tensor, tensor])
    messages = [dist.isend(tensor, right), dist.isend(tensor, left), dist.irecv(both[0], left)]
    for message in [*messages, dist.irecv(both[1], right)]:
        message.wait()
    return both


@mistake("exchange", "rank 0 sends to or receives from a rank that does not exist: there is no rank -1")
def no_ring_at_the_beginning(tensor):
    rank, right = dist.get_rank(), (dist.get_rank() + 1) % dist.get_world_size()
    from_left, from_right = torch.empty_like(tensor), torch.empty_like(tensor)
    messages = [dist.isend(tensor, right), dist.isend(tensor, rank - 1)]
    messages += [dist.irecv(from_left, rank - 1), dist.irecv(from_right, right)]
    for message in messages:
        message.wait()
    return from_left, from_right


@mistake("exchange", "the input `tensor` was changed")
def receives_into_the_input(tensor):
    _, _, left, right = ring()
    own, from_left = tensor.clone(), torch.empty_like(tensor)
    messages = [dist.isend(own, right), dist.isend(own, left), dist.irecv(from_left, left), dist.irecv(tensor, right)]
    for message in messages:
        message.wait()
    return from_left, tensor


@mistake("exchange", "(is a size written into it?)")
def eight_elements_only(tensor):
    _, _, left, right = ring()
    from_left, from_right = torch.empty(8), torch.empty(8)
    messages = [dist.isend(tensor, right), dist.isend(tensor, left)]
    messages += [dist.irecv(from_left, left), dist.irecv(from_right, right)]
    for message in messages:
        message.wait()
    return from_left, from_right


@mistake("exchange", "from another thread")
def in_a_thread(tensor):
    _, _, left, right = ring()
    from_left, from_right = torch.empty_like(tensor), torch.empty_like(tensor)
    sender = threading.Thread(target=lambda: (dist.send(tensor, right), dist.send(tensor, left)))
    sender.start()
    dist.recv(from_left, left)
    dist.recv(from_right, right)
    sender.join()
    return from_left, from_right


@mistake("exchange", "from_left is wrong on rank 0 only")
def the_ends_have_no_neighbour(tensor):
    rank, n = dist.get_rank(), dist.get_world_size()
    from_left, from_right, messages = torch.zeros_like(tensor), torch.zeros_like(tensor), []
    if rank > 0:
        messages += [dist.isend(tensor, rank - 1), dist.irecv(from_left, rank - 1)]
    if rank < n - 1:
        messages += [dist.isend(tensor, rank + 1), dist.irecv(from_right, rank + 1)]
    for message in messages:
        message.wait()
    return from_left, from_right


@mistake("exchange", "from_left and from_right are the same")
def one_tensor_for_both(tensor):
    _, _, left, right = ring()
    arrived = torch.empty_like(tensor)
    messages = [dist.isend(tensor, right), dist.isend(tensor, left)]
    messages += [dist.irecv(arrived, left), dist.irecv(arrived, right)]
    for message in messages:
        message.wait()
    return arrived, arrived


@mistake("exchange", "a deadlock, nobody does what the others wait for: rank 0 is in")
def even_and_odd_with_a_slip(tensor):
    rank, _, left, right = ring()
    from_left, from_right = torch.empty_like(tensor), torch.empty_like(tensor)
    if rank % 2 == 0:
        dist.send(tensor, right), dist.recv(from_left, left)
        dist.send(tensor, left), dist.recv(from_right, right)
    else:
        dist.recv(from_left, left), dist.send(tensor, right)
        dist.recv(from_right, right), dist.send(tensor, right)
    return from_left, from_right


@mistake("exchange", "it works with 4 ranks, but 3 cannot be paired off, even ranks with odd ones")
def even_ranks_first(tensor):
    rank, _, left, right = ring()
    from_left, from_right = torch.empty_like(tensor), torch.empty_like(tensor)
    if rank % 2 == 0:
        dist.send(tensor, right), dist.recv(from_right, right), dist.send(tensor, left), dist.recv(from_left, left)
    else:
        dist.recv(from_left, left), dist.send(tensor, left), dist.recv(from_right, right), dist.send(tensor, right)
    return from_left, from_right


@mistake("exchange", "it does not work for a tensor without dimensions, a single number")
def row_by_row(tensor):
    _, _, left, right = ring()
    from_left, from_right = torch.empty_like(tensor), torch.empty_like(tensor)
    messages = []
    for i in range(len(tensor)):
        messages += [dist.isend(tensor[i], right), dist.isend(tensor[i], left)]
        messages += [dist.irecv(from_left[i], left), dist.irecv(from_right[i], right)]
    for message in messages:
        message.wait()
    return from_left, from_right


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
