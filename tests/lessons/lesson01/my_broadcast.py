"""Wrong answers to my_broadcast, as people really write them, and unusual right ones."""

import time

import torch
import torch.distributed as dist

from pardist_lib.mechanisms import collectives
from tests.lessons.lesson01.shared import ring
from tests.lessons.planted import mistake, right


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
