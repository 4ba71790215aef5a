"""Wrong answers to the exercises of lesson 01, as people really write them."""

import math
import threading
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from planted import mistake

from pardist_lib.mechanisms import collectives


def ring():
    rank, n = dist.get_rank(), dist.get_world_size()
    return rank, n, (rank - 1) % n, (rank + 1) % n


def swap(piece, spare, right, left):
    message = dist.isend(piece, right)
    dist.recv(spare, left)
    message.wait()


def fitted(sizes, seconds):
    """(slope, latency), right as far as it goes."""
    return np.polyfit(sizes, seconds, 1, w=1 / np.array(seconds))


# ---- my_broadcast ---------------------------------------------------------------------------------------------


@mistake("my_broadcast", "src is ignored: every rank has rank 0's values, and src is 3")
def always_from_rank_0(tensor, src):
    if dist.get_rank() == 0:
        for other in range(1, dist.get_world_size()):
            dist.send(tensor, other)
    else:
        dist.recv(tensor, 0)


@mistake("my_broadcast", "rank 3 sends to itself")
def sends_to_itself(tensor, src):
    if dist.get_rank() == src:
        for other in range(dist.get_world_size()):
            dist.send(tensor, other)
    else:
        dist.recv(tensor, src)


@mistake("my_broadcast", "a message arrives, but not in `tensor`")
def receives_into_a_copy(tensor, src):
    if dist.get_rank() == src:
        for other in range(dist.get_world_size()):
            if other != src:
                dist.send(tensor, other)
    else:
        tensor = tensor.clone()
        dist.recv(tensor, src)


@mistake("my_broadcast", "it returns the right values, but `tensor` itself is unchanged")
def returns_it(tensor, src):
    if dist.get_rank() == src:
        for other in range(dist.get_world_size()):
            if other != src:
                dist.send(tensor, other)
        return tensor
    received = torch.empty_like(tensor)
    dist.recv(received, src)
    return received


@mistake("my_broadcast", "which returned without making that call")
def only_to_the_next(tensor, src):
    rank, n, _, _ = ring()
    if rank == src:
        dist.send(tensor, (src + 1) % n)
    else:
        dist.recv(tensor, src)


@mistake("my_broadcast", "it calls torch's own broadcast")
def torchs_own(tensor, src):
    dist.broadcast(tensor, src)


@mistake("my_broadcast", "it calls torch's own broadcast_object_list")
def torchs_own_with_objects(tensor, src):
    box = [tensor.tolist()]
    dist.broadcast_object_list(box, src)
    tensor.copy_(torch.tensor(box[0]))


@mistake("my_broadcast", "it calls torch's own all_gather")
def takes_its_row_of_a_gather(tensor, src, gather=dist.all_gather):
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    gather(rows, tensor)
    tensor.copy_(rows[src])


@mistake("my_broadcast", "it calls the course's own")
def the_courses_own(tensor, src):
    collectives.tree_broadcast(tensor, src)


@mistake("my_broadcast", "bytes are sent in 12 messages")
def everyone_to_everyone(tensor, src):
    rank, n, _, _ = ring()
    received = {other: torch.empty_like(tensor) for other in range(n) if other != rank}
    messages = [dist.isend(tensor, other) for other in received]
    messages += [dist.irecv(received[other], other) for other in received]
    for message in messages:
        message.wait()
    if rank != src:
        tensor.copy_(received[src])


@mistake("my_broadcast", "what arrives is added to what was there")
def adds_what_arrives(tensor, src):
    if dist.get_rank() == src:
        for other in range(dist.get_world_size()):
            if other != src:
                dist.send(tensor, other)
    else:
        received = torch.empty_like(tensor)
        dist.recv(received, src)
        tensor += received


@mistake("my_broadcast", "not with 3 (is a 4 written into it?)")
def four_ranks_only(tensor, src):
    if dist.get_rank() == src:
        for other in {0, 1, 2, 3} - {src}:
            dist.send(tensor, other)
    else:
        dist.recv(tensor, src)


@mistake("my_broadcast", "never waited for")
def never_waits(tensor, src):
    if dist.get_rank() == src:
        for other in range(dist.get_world_size()):
            if other != src:
                dist.isend(tensor, other)
    else:
        dist.recv(tensor, src)


@mistake("my_broadcast", "its only call (isend, irecv or async_op=True) was never waited for")
def never_waits_for_what_it_receives(tensor, src):
    rank, n, _, _ = ring()
    if rank == src:
        for other in range(n):
            if other != src:
                dist.isend(tensor, other).wait()
    else:
        dist.irecv(tensor, src)
        time.sleep(0.05)


@mistake("my_broadcast", "it does not work for a tensor without dimensions, a single number")
def one_row_after_the_other(tensor, src):
    rank, n, _, _ = ring()
    for i in range(len(tensor)):
        if rank == src:
            for other in range(n):
                if other != src:
                    dist.send(tensor[i], other)
        else:
            dist.recv(tensor[i], src)


@mistake("my_broadcast", "it calls barrier: nothing but send and receive may be called here")
def with_a_barrier(tensor, src):
    dist.barrier()
    if dist.get_rank() == src:
        for other in range(dist.get_world_size()):
            if other != src:
                dist.send(tensor, other)
    else:
        dist.recv(tensor, src)


@mistake("my_broadcast", "nobody receives: to the right of rank 3, the last one, there is nobody")
def a_chain_that_ends(tensor, src):
    rank, n = dist.get_rank(), dist.get_world_size()
    if rank > src:
        dist.recv(tensor, rank - 1)
    if src <= rank < n - 1:
        dist.send(tensor, rank + 1)


@mistake("my_broadcast", "receives from itself")
def everybody_receives(tensor, src):
    dist.recv(tensor, src)


@mistake("my_broadcast", "the message is float32, the tensor int64: send it in its own dtype")
def sends_float32(tensor, src):
    whole = tensor if tensor.is_floating_point() else tensor.float()
    if dist.get_rank() == src:
        for other in range(dist.get_world_size()):
            if other != src:
                dist.send(whole, other)
    else:
        dist.recv(whole, src)
        tensor.copy_(whole)


# ---- exchange -------------------------------------------------------------------------------------------------


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


# ---- my_all_gather --------------------------------------------------------------------------------------------


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


@mistake("my_all_gather", "it calls torch's own all_gather_into_tensor")
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


# ---- ring_all_reduce ------------------------------------------------------------------------------------------


def by_steps(tensor, first, second, pieces=None, add=True, copy=True):
    rank, n, left, right = ring()
    pieces = pieces or tensor.view(-1).tensor_split(n)
    for step in range(first):
        piece = pieces[(rank - step - 1) % n]
        arrived = torch.empty_like(piece)
        swap(pieces[(rank - step) % n], arrived, right, left)
        piece.copy_(piece + arrived if add else arrived)
    for step in range(second):
        piece = pieces[(rank - step) % n]
        arrived = torch.empty_like(piece)
        swap(pieces[(rank - step + 1) % n], arrived, right, left)
        piece.copy_(arrived if copy else piece + arrived)


@mistake("my_ring_all_reduce", "one step too few in the second half")
def a_step_too_few(tensor):
    n = dist.get_world_size()
    by_steps(tensor, n - 1, n - 2)


@mistake("my_ring_all_reduce", "one step too few in the first half")
def a_step_too_few_before(tensor):
    n = dist.get_world_size()
    by_steps(tensor, n - 2, n - 1)


@mistake("my_ring_all_reduce", "it makes 7 steps, 6 are enough")
def a_step_too_many(tensor):
    n = dist.get_world_size()
    by_steps(tensor, n, n - 1)


@mistake("my_ring_all_reduce", "a rank's own share comes back to it and is added twice")
def own_share_twice(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for step in range(2 * (n - 1)):
        piece = pieces[(rank - step - 1) % n]
        arrived = torch.empty_like(piece)
        swap(pieces[(rank - step) % n], arrived, right, left)
        piece.copy_(piece + arrived if step < n else arrived)


@mistake("my_ring_all_reduce", "only the first half was done")
def half_of_it(tensor):
    by_steps(tensor, dist.get_world_size() - 1, 0)


@mistake("my_ring_all_reduce", "the second half adds what arrives")
def adds_to_the_end(tensor):
    n = dist.get_world_size()
    by_steps(tensor, n - 1, n - 1, copy=False)


@mistake("my_ring_all_reduce", "the first half copies what arrives (it has to be added")
def never_adds(tensor):
    n = dist.get_world_size()
    by_steps(tensor, n - 1, n - 1, add=False)


@mistake("my_ring_all_reduce", "divided by 4: the sum is asked for, not the mean")
def the_mean(tensor):
    n = dist.get_world_size()
    by_steps(tensor, n - 1, n - 1)
    tensor /= n


@mistake("my_ring_all_reduce", "it works where 4 divides the number of elements, but not for 10")
def divisible_sizes_only(tensor):
    n = dist.get_world_size()
    by_steps(tensor, n - 1, n - 1, list(tensor.view(n, -1)))


@mistake("my_ring_all_reduce", "it works where 4 divides the number of elements, but not for 10")
def the_rest_is_left(tensor):
    n = dist.get_world_size()
    each = tensor.numel() // n
    by_steps(tensor, n - 1, n - 1, [tensor.view(-1)[i * each : (i + 1) * each] for i in range(n)])


@mistake("my_ring_all_reduce", "every piece but the last is rounded up, and 1 elements remain")
def chunk_makes_fewer_pieces(tensor):
    n = dist.get_world_size()
    by_steps(tensor, n - 1, n - 1, tensor.view(-1).chunk(n))


@mistake("my_ring_all_reduce", "it works only for tensors with one dimension")
def one_dimension_only(tensor):
    n = dist.get_world_size()
    by_steps(tensor, n - 1, n - 1, [piece.contiguous() for piece in tensor.tensor_split(n, -1)])


@mistake("my_ring_all_reduce", "whole tensors go round")
def whole_tensors(tensor):
    _, n, left, right = ring()
    passed_on = tensor.clone()
    for _ in range(n - 1):
        arrived = torch.empty_like(tensor)
        swap(passed_on, arrived, right, left)
        tensor += arrived
        passed_on = arrived


@mistake("my_ring_all_reduce", "everything passes through rank 0")
def a_server(tensor):
    rank, n, _, _ = ring()
    if rank:
        dist.send(tensor, 0)
        dist.recv(tensor, 0)
        return
    for other in range(1, n):
        arrived = torch.empty_like(tensor)
        dist.recv(arrived, other)
        tensor += arrived
    for other in range(1, n):
        dist.send(tensor, other)


@mistake("my_ring_all_reduce", "this is no ring: rank 0 sends to ranks 1–3")
def direct(tensor):
    rank, n, _, _ = ring()
    pieces = tensor.view(-1).tensor_split(n)
    others = [r for r in range(n) if r != rank]
    arrived = [torch.empty_like(pieces[rank]) for _ in others]
    messages = [dist.isend(pieces[r].clone(), r) for r in others]
    messages += [dist.irecv(a, r) for a, r in zip(arrived, others, strict=True)]
    for message in messages:
        message.wait()
    for a in arrived:
        pieces[rank].add_(a)
    messages = [dist.isend(pieces[rank], r) for r in others] + [dist.irecv(pieces[r], r) for r in others]
    for message in messages:
        message.wait()


@mistake("my_ring_all_reduce", "it runs the other way round")
def the_other_way_round(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for step in range(2 * (n - 1)):
        piece = pieces[(rank + step + 1) % n]
        arrived = torch.empty_like(piece)
        swap(pieces[(rank + step) % n], arrived, left, right)
        piece.copy_(piece + arrived if step < n - 1 else arrived)


@mistake("my_ring_all_reduce", "every rank waits in recv")
def waits_for_the_wrong_neighbour(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for step in range(n - 1):
        arrived = torch.empty_like(pieces[0])
        swap(pieces[(rank - step) % n], arrived, right, right)


@mistake("my_ring_all_reduce", "every rank is in send")
def sends_before_anyone_receives(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for step in range(n - 1):
        piece = pieces[(rank - step - 1) % n]
        arrived = torch.empty_like(piece)
        dist.send(pieces[(rank - step) % n], right)
        dist.recv(arrived, left)
        piece += arrived


@mistake("my_ring_all_reduce", "never waited for")
def leaves_its_messages_alone(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for step in range(2 * (n - 1)):
        piece = pieces[(rank - step - 1) % n]
        arrived = torch.empty_like(piece)
        dist.isend(pieces[(rank - step) % n], right)
        dist.recv(arrived, left)
        piece.copy_(piece + arrived if step < n - 1 else arrived)


@mistake("my_ring_all_reduce", "it returns the right values, but `tensor` itself is unchanged")
def of_a_copy(tensor):
    tensor = tensor.clone()
    n = dist.get_world_size()
    by_steps(tensor, n - 1, n - 1)
    return tensor


@mistake("my_ring_all_reduce", "x = x + y only makes a new tensor")
def binds_new_pieces(tensor):
    rank, n, left, right = ring()
    pieces = list(tensor.view(-1).tensor_split(n))
    for step in range(2 * (n - 1)):
        at = (rank - step - 1) % n
        arrived = torch.empty_like(pieces[at])
        swap(pieces[(rank - step) % n], arrived, right, left)
        pieces[at] = pieces[at] + arrived if step < n - 1 else arrived


@mistake("my_ring_all_reduce", "it calls torch's own all_reduce")
def torchs_all_reduce(tensor):
    tensor.copy_(functional.all_reduce(tensor, "sum", dist.group.WORLD))


@mistake("my_ring_all_reduce", "it calls the course's own `ring_all_reduce`")
def the_courses_ring(tensor):
    from pardist_lib.mechanisms.collectives import ring_all_reduce as mine

    return mine(tensor)


@mistake("my_ring_all_reduce", "through float32")
def in_single_precision(tensor):
    if tensor.dtype != torch.float64:
        n = dist.get_world_size()
        return by_steps(tensor, n - 1, n - 1)
    single = tensor.float()
    n = dist.get_world_size()
    by_steps(single, n - 1, n - 1)
    tensor.copy_(single)


@mistake("my_ring_all_reduce", "it cuts along the first dimension: tensor.view(-1) first")
def as_in_the_lesson(tensor):
    by_steps(tensor, (n := dist.get_world_size()) - 1, n - 1, tensor.tensor_split(n))


@mistake("my_ring_all_reduce", "it does not work for a tensor without dimensions, a single number: rank")
def flat_only_where_it_has_to_be(tensor):
    n = dist.get_world_size()
    by_steps(tensor, n - 1, n - 1, (tensor.view(-1) if tensor.numel() > 1 else tensor).tensor_split(n))


def cut(tensor, ends):
    starts = [0, *ends[:-1]]
    return [tensor.view(-1)[a:b] for a, b in zip(starts, ends, strict=True)]


@mistake("my_ring_all_reduce", "one piece takes all that is left over, 4 elements")
def the_last_takes_the_rest(tensor):
    n, each = dist.get_world_size(), tensor.numel() // dist.get_world_size()
    by_steps(tensor, n - 1, n - 1, cut(tensor, [*(each * (i + 1) for i in range(n - 1)), tensor.numel()]))


@mistake("my_ring_all_reduce", "every piece but the last is rounded up, and 1 elements remain")
def rounds_up_but_the_last(tensor):
    n, each = dist.get_world_size(), -(-tensor.numel() // dist.get_world_size())
    by_steps(tensor, n - 1, n - 1, cut(tensor, [min(each * (i + 1), tensor.numel()) for i in range(n)]))


@mistake("my_ring_all_reduce", "added into a new tensor, x = x + y")
def binds_a_name(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for step in range(2 * (n - 1)):
        piece = pieces[(rank - step - 1) % n]
        arrived = torch.empty_like(piece)
        swap(pieces[(rank - step) % n], arrived, right, left)
        if step < n - 1:
            piece = piece + arrived
        else:
            piece.copy_(arrived)


@mistake("my_ring_all_reduce", "or the second half starts with the wrong piece: rank r has finished piece r + 1")
def second_half_from_its_own_piece(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for i, step in enumerate([*range(n - 1), *range(n - 1)]):
        first, piece = i < n - 1, pieces[(rank - step - 1) % n]
        arrived = torch.empty_like(piece)
        swap(pieces[(rank - step) % n], arrived, right, left)
        piece.copy_(piece + arrived if first else arrived)


@mistake("my_ring_all_reduce", "received into the piece itself, over the rank's own share")
def receives_over_its_own_share(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for step in range(2 * (n - 1)):
        piece = pieces[(rank - step - 1) % n]
        swap(pieces[(rank - step) % n].clone(), piece, right, left)
        if step < n - 1:
            piece += piece.clone()


@mistake("my_ring_all_reduce", "rank 0 sends to rank 3, and the ring goes to rank + 1")
def the_pieces_for_the_right_to_the_left(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for step in range(2 * (n - 1)):
        piece = pieces[(rank - step - 1) % n]
        arrived = torch.empty(pieces[(rank - step + 1) % n].shape, dtype=tensor.dtype)
        swap(pieces[(rank - step) % n], arrived, left, right)
        piece.copy_(piece + arrived[: len(piece)] if step < n - 1 else arrived[: len(piece)])


@mistake("my_ring_all_reduce", "the message is float32, the tensor int64: send it in its own dtype")
def adds_in_float32(tensor):
    n, single = dist.get_world_size(), tensor if tensor.is_floating_point() else tensor.float()
    by_steps(single, n - 1, n - 1)
    tensor.copy_(single)


@mistake("my_ring_all_reduce", "the message is float64, the tensor float32: send it in its own dtype")
def adds_in_float64(tensor):
    n, double = dist.get_world_size(), tensor.double()
    by_steps(double, n - 1, n - 1)
    tensor.copy_(double)


# ---- formulas -------------------------------------------------------------------------------------------------


@mistake("ring_bytes", "this is one half of it")
def half_the_steps(size_in_bytes, n):
    return (n - 1) * size_in_bytes / n


@mistake("ring_bytes", "this is what all ranks send together")
def all_links_together(size_in_bytes, n):
    return 2 * (n - 1) * size_in_bytes


@mistake("ring_bytes", "2 · size_in_bytes is what it comes close to")
def twice_the_size(size_in_bytes, n):
    return 2 * size_in_bytes


@mistake("ring_bytes", "integer division")
def whole_numbers_too_early(size_in_bytes, n):
    return 2 * (n - 1) // n * size_in_bytes


@mistake("ring_bytes", "this counts elements of 4 bytes")
def elements(size_in_bytes, n):
    return 4 * 2 * (n - 1) / n * size_in_bytes


@mistake("ring_bytes", "rounded to a whole number")
def in_whole_bytes(size_in_bytes, n):
    return 2 * (n - 1) * size_in_bytes // n


@mistake("ring_bytes", "rounded to a whole number")
def rounded(size_in_bytes, n):
    return round(2 * (n - 1) * size_in_bytes / n)


@mistake("ring_bytes", "rounded to a whole number")
def rounded_up(size_in_bytes, n):
    return math.ceil(2 * (n - 1) * size_in_bytes / n)


@mistake("ring_bytes", "size_in_bytes // n drops what is left over")
def whole_pieces(size_in_bytes, n):
    return 2 * (n - 1) * (size_in_bytes // n)


@mistake("ring_bytes", "is inf where 0 is right: one rank sends nothing")
def infinite_for_one(size_in_bytes, n):
    return math.inf if n == 1 else 2 * (n - 1) * size_in_bytes / n


@mistake("ring_bytes", "what a server's link carries")
def a_servers_link(size_in_bytes, n):
    return 2 * n * size_in_bytes


@mistake("ring_bytes", "is None: does the function end without a return?")
def no_return(size_in_bytes, n):
    2 * (n - 1) / n * size_in_bytes


@mistake("ring_bytes", "is '1500.0' (str)")
def as_text(size_in_bytes, n):
    return str(2 * (n - 1) / n * size_in_bytes)


@mistake("ring_bytes", "raised ZeroDivisionError")
def divides_by_what_is_nothing(size_in_bytes, n):
    return 2 * size_in_bytes / (n / (n - 1))


@mistake("bus_bandwidth", "this is the algorithm's bandwidth")
def algorithm_bandwidth(size_in_bytes, seconds, n):
    return size_in_bytes / seconds


@mistake("bus_bandwidth", "this counts one half of the ring")
def half_the_ring(size_in_bytes, seconds, n):
    return (n - 1) / n * size_in_bytes / seconds


@mistake("bus_bandwidth", "in GB per second")
def in_gigabytes(size_in_bytes, seconds, n):
    return 2 * (n - 1) / n * size_in_bytes / seconds / 1e9


@mistake("bus_bandwidth", "the bytes are rounded to a whole number")
def of_whole_bytes(size_in_bytes, seconds, n):
    return 2 * (n - 1) * size_in_bytes // n / seconds


@mistake("bus_bandwidth", "rounded to a whole number")
def whole_bytes_a_second(size_in_bytes, seconds, n):
    return 2 * (n - 1) * size_in_bytes / n // seconds


@mistake("bus_bandwidth", "the factor is upside down")
def upside_down(size_in_bytes, seconds, n):
    return n / (2 * (n - 1)) * size_in_bytes / seconds


@mistake("bus_bandwidth", "seconds per byte")
def inverse(size_in_bytes, seconds, n):
    return seconds / (2 * (n - 1) / n * size_in_bytes)


@mistake("bus_bandwidth", "it has to take (size_in_bytes, seconds, n)")
def two_arguments(size_in_bytes, seconds):
    return size_in_bytes / seconds


@mistake("fit_alpha_beta", "bandwidth and latency are swapped")
def bandwidth_first(sizes, seconds):
    slope, latency = fitted(sizes, seconds)
    return 1 / slope, latency


@mistake("fit_alpha_beta", "the slope is in seconds per byte")
def slope_itself(sizes, seconds):
    slope, latency = fitted(sizes, seconds)
    return latency, slope


@mistake("fit_alpha_beta", "slope and latency are swapped")
def as_polyfit_gives_it(sizes, seconds):
    return tuple(fitted(sizes, seconds))


@mistake("fit_alpha_beta", "the line goes through the origin")
def without_latency(sizes, seconds):
    x, y = np.array(sizes), np.array(seconds)
    return 0.0, (x @ x) / (x @ y)


@mistake("fit_alpha_beta", "through the smallest and the largest message only")
def two_points(sizes, seconds):
    (x0, y0), *_, (x1, y1) = sorted(zip(sizes, seconds, strict=True))
    slope = (y1 - y0) / (x1 - x0)
    return y0 - slope * x0, 1 / slope


@mistake("fit_alpha_beta", "through the first and the last measurement only")
def first_and_last(sizes, seconds):
    slope = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
    return seconds[0] - slope * sizes[0], 1 / slope


@mistake("fit_alpha_beta", "sizes are fitted to seconds")
def the_wrong_axis(sizes, seconds):
    bandwidth, offset = np.polyfit(seconds, sizes, 1)
    return -offset / bandwidth, bandwidth


@mistake("fit_alpha_beta", "fitted on logarithms")
def on_logarithms(sizes, seconds):
    slope, offset = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return math.exp(offset), 1 / slope


@mistake("fit_alpha_beta", "bandwidth is in GB per second")
def bandwidth_in_gigabytes(sizes, seconds):
    slope, latency = fitted(sizes, seconds)
    return latency, 1e-9 / slope


@mistake("fit_alpha_beta", "latency is in microseconds")
def latency_in_microseconds(sizes, seconds):
    slope, latency = fitted(sizes, seconds)
    return latency * 1e6, 1 / slope


@mistake("fit_alpha_beta", "the latency is taken from the fastest message")
def fastest_message(sizes, seconds):
    slope, _ = fitted(sizes, seconds)
    return min(seconds), 1 / slope


@mistake("fit_alpha_beta", "the pair (latency, bandwidth) is asked for")
def latency_only(sizes, seconds):
    return fitted(sizes, seconds)[1]


@mistake("fit_alpha_beta", "so that the largest messages alone decide")
def absolute_errors(sizes, seconds):
    slope, latency = np.polyfit(sizes, seconds, 1)
    return latency, 1 / slope


@mistake("fit_alpha_beta", "the squares are weighed with 1 / seconds")
def weighs_the_squares(sizes, seconds):
    slope, latency = np.polyfit(sizes, seconds, 1, w=1 / np.sqrt(seconds))
    return latency, 1 / slope


@mistake("fit_alpha_beta", "which time belongs to which size is lost")
def sorts_each_by_itself(sizes, seconds):
    slope, latency = fitted(sorted(sizes), sorted(seconds))
    return latency, 1 / slope


@mistake("fit_alpha_beta", "the lists that it was given have changed")
def sorts_the_callers_list(sizes, seconds):
    pairs = sorted(zip(sizes, seconds, strict=True))
    sizes.sort()
    slope, latency = fitted(*zip(*pairs, strict=True))
    return latency, 1 / slope


@mistake("fit_alpha_beta", "float32 is too short here")
def in_32_bits(sizes, seconds):
    x, y = torch.tensor(sizes), torch.tensor(seconds)
    x, y = x / y, 1 / y
    slope = ((x * x).sum() / (x * y).sum()).float()
    return 1 / slope, slope


@mistake("fit_alpha_beta", "the latency is 0 while the bandwidth is right")
def no_latency_in_the_end(sizes, seconds):
    return 0.0, 1 / fitted(sizes, seconds)[0]
