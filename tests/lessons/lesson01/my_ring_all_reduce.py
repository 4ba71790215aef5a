"""Wrong answers to my_ring_all_reduce, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from tests.lessons.lesson01.shared import ring, swap
from tests.lessons.planted import mistake, right


def by_steps(tensor, first, second, pieces=None, add=True, copy=True):
    rank, n, left, right = ring()
    pieces = pieces or tensor.view(-1).tensor_split(n)
    for step in range(first):
        piece = pieces[(rank + step + 1) % n]
        arrived = torch.empty_like(piece)
        swap(pieces[(rank + step) % n], arrived, left, right)
        piece.copy_(piece + arrived if add else arrived)
    for step in range(second):
        piece = pieces[(rank + step) % n]
        arrived = torch.empty_like(piece)
        swap(pieces[(rank + step - 1) % n], arrived, left, right)
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
        piece = pieces[(rank + step + 1) % n]
        arrived = torch.empty_like(piece)
        swap(pieces[(rank + step) % n], arrived, left, right)
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
        swap(passed_on, arrived, left, right)
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
        piece = pieces[(rank - step - 1) % n]
        arrived = torch.empty_like(piece)
        swap(pieces[(rank - step) % n], arrived, right, left)
        piece.copy_(piece + arrived if step < n - 1 else arrived)


@mistake("my_ring_all_reduce", "every rank waits in recv")
def waits_for_the_wrong_neighbour(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for step in range(n - 1):
        arrived = torch.empty_like(pieces[0])
        swap(pieces[(rank + step) % n], arrived, left, left)


@mistake("my_ring_all_reduce", "every rank is in send")
def sends_before_anyone_receives(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for step in range(n - 1):
        piece = pieces[(rank + step + 1) % n]
        arrived = torch.empty_like(piece)
        dist.send(pieces[(rank + step) % n], left)
        dist.recv(arrived, right)
        piece += arrived


@mistake("my_ring_all_reduce", "never waited for")
def leaves_its_messages_alone(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for step in range(2 * (n - 1)):
        piece = pieces[(rank + step + 1) % n]
        arrived = torch.empty_like(piece)
        dist.isend(pieces[(rank + step) % n], left)
        dist.recv(arrived, right)
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
        at = (rank + step + 1) % n
        arrived = torch.empty_like(pieces[at])
        swap(pieces[(rank + step) % n], arrived, left, right)
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
        piece = pieces[(rank + step + 1) % n]
        arrived = torch.empty_like(piece)
        swap(pieces[(rank + step) % n], arrived, left, right)
        if step < n - 1:
            piece = piece + arrived
        else:
            piece.copy_(arrived)


@mistake("my_ring_all_reduce", "or the second half starts with the wrong piece: rank r has finished piece r - 1")
def second_half_from_its_own_piece(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for i, step in enumerate([*range(n - 1), *range(n - 1)]):
        first, piece = i < n - 1, pieces[(rank + step + 1) % n]
        arrived = torch.empty_like(piece)
        swap(pieces[(rank + step) % n], arrived, left, right)
        piece.copy_(piece + arrived if first else arrived)


@mistake("my_ring_all_reduce", "received into the piece itself, over the rank's own share")
def receives_over_its_own_share(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for step in range(2 * (n - 1)):
        piece = pieces[(rank + step + 1) % n]
        swap(pieces[(rank + step) % n].clone(), piece, left, right)
        if step < n - 1:
            piece += piece.clone()


@mistake("my_ring_all_reduce", "rank 0 sends to rank 1, and this ring goes to rank - 1")
def the_pieces_for_the_right_to_the_left(tensor):
    rank, n, left, right = ring()
    pieces = tensor.view(-1).tensor_split(n)
    for step in range(2 * (n - 1)):
        piece = pieces[(rank + step + 1) % n]
        arrived = torch.empty(pieces[(rank + step - 1) % n].shape, dtype=tensor.dtype)
        swap(pieces[(rank + step) % n], arrived, right, left)
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


@right("my_ring_all_reduce")
def padded(tensor):
    rank, n = dist.get_rank(), dist.get_world_size()
    flat = tensor.reshape(-1)
    each = -(-flat.numel() // n)
    rows = torch.cat([flat, flat.new_zeros(n * each - flat.numel())]).view(n, each)
    for first, add in ((0, True), (-1, False)):
        for step in range(n - 1):
            arrived = torch.empty_like(rows[0])
            message = dist.isend(rows[(rank + first + step) % n], (rank - 1) % n)
            dist.recv(arrived, (rank + 1) % n)
            message.wait()
            rows[(rank + first + step + 1) % n] = arrived + rows[(rank + first + step + 1) % n] * add
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
        out, piece = pieces[(rank + step) % n], pieces[(rank + step + 1) % n]
        arrived = torch.empty_like(piece)
        for message in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, out, left), dist.P2POp(dist.irecv, arrived, right)]
        ):
            message.wait()
        if step < n:
            piece += arrived
        else:
            piece.copy_(arrived)
