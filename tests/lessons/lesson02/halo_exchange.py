"""Wrong answers to halo_exchange, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist
from torch.distributed import irecv, isend

from pardist_lib.mechanisms.tensor_parallel import split_conv
from tests.lessons.planted import mistake, right


def meet(rows, halo, above, below, up, down):
    """Send `up` to rank - 1 and `down` to rank + 1, and receive theirs into `above` and `below`."""
    rank, n = dist.get_rank(), dist.get_world_size()
    messages = []
    if rank > 0:
        messages += [dist.isend(up.contiguous(), rank - 1), dist.irecv(above, rank - 1)]
    if rank < n - 1:
        messages += [dist.isend(down.contiguous(), rank + 1), dist.irecv(below, rank + 1)]
    for message in messages:
        message.wait()


def empty_halo(rows, halo):
    return rows.new_zeros(*rows.shape[:2], halo, rows.shape[3]), rows.new_zeros(*rows.shape[:2], halo, rows.shape[3])


def edges(rows, halo):
    return rows[:, :, :halo], rows[:, :, rows.shape[2] - halo :]


@mistake("halo_exchange", "the image is closed to a ring")
def closed_to_a_ring(rows, halo):
    rank, n = dist.get_rank(), dist.get_world_size()
    above, below = empty_halo(rows, halo)
    first, last = (e.contiguous() for e in edges(rows, halo))
    messages = [dist.isend(first, (rank - 1) % n), dist.isend(last, (rank + 1) % n)]
    messages += [dist.irecv(below, (rank + 1) % n), dist.irecv(above, (rank - 1) % n)]
    for message in messages:
        message.wait()
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "the neighbours' far rows arrived")
def sends_the_far_rows(rows, halo):
    above, below = empty_halo(rows, halo)
    first, last = edges(rows, halo)
    meet(rows, halo, above, below, last, first)
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "above and below are swapped")
def swapped(rows, halo):
    above, below = empty_halo(rows, halo)
    meet(rows, halo, above, below, *edges(rows, halo))
    return torch.cat([below, rows, above], 2)


@mistake("halo_exchange", "the rows of zeros are missing")
def nothing_at_the_ends(rows, halo):
    above, below = empty_halo(rows, halo)
    meet(rows, halo, above, below, *edges(rows, halo))
    rank, n = dist.get_rank(), dist.get_world_size()
    return torch.cat([above] * (rank > 0) + [rows] + [below] * (rank < n - 1), 2)


@mistake("halo_exchange", "repeated where the image ends")
def repeats_the_border(rows, halo):
    above, below = (e.contiguous().clone() for e in edges(rows, halo))
    meet(rows, halo, above, below, *edges(rows, halo))
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "the rank's own rows are repeated")
def its_own_rows(rows, halo):
    first, last = edges(rows, halo)
    return torch.cat([first, rows, last], 2)


@mistake("halo_exchange", "it works for halo = 1, but not for halo = 2")
def one_row(rows, halo):
    above, below = empty_halo(rows, 1)
    meet(rows, 1, above, below, *edges(rows, 1))
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "it does not work for halo = 0")
def counts_from_the_end(rows, halo):
    above, below = empty_halo(rows, halo)
    meet(rows, halo, above, below, rows[:, :, :halo], rows[:, :, -halo:])
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "the message is float64, the tensor float32")
def in_double(rows, halo):
    shape = (*rows.shape[:2], halo, rows.shape[3])
    rank, n, above, below = (
        dist.get_rank(),
        dist.get_world_size(),
        torch.zeros(shape).double(),
        torch.zeros(shape).double(),
    )
    messages = []
    for peer, sent, received in (
        (rank - 1, rows[:, :, :halo], above),
        (rank + 1, rows[:, :, rows.shape[2] - halo :], below),
    ):
        if halo and 0 <= peer < n:
            messages += [isend(sent.double().contiguous(), peer), irecv(received, peer)]
    for message in messages:
        message.wait()
    return torch.cat([above.to(rows.dtype), rows, below.to(rows.dtype)], 2)


@mistake("halo_exchange", "with one neighbour only")
def in_pairs(rows, halo):
    above, below = (rows.new_zeros(*rows.shape[:2], halo, rows.shape[3]) for _ in range(2))
    rank, other = dist.get_rank(), dist.get_rank() ^ 1
    if halo and other < dist.get_world_size():
        mine = rows[:, :, :halo] if rank % 2 else rows[:, :, -halo:]
        message = isend(mine.contiguous(), other)
        dist.recv(above if rank % 2 else below, other)
        message.wait()
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "all its rows are sent")
def sends_everything(rows, halo):
    rank, n = dist.get_rank(), dist.get_world_size()
    sizes = torch.tensor([rows.shape[2]])
    heights, messages, theirs = {}, [], {}
    for other in (rank - 1, rank + 1):
        if 0 <= other < n:
            heights[other] = torch.empty_like(sizes)
            messages += [dist.isend(sizes, other), dist.irecv(heights[other], other)]
    for message in messages:
        message.wait()
    messages = []
    for other, height in heights.items():
        theirs[other] = rows.new_empty(*rows.shape[:2], int(height), rows.shape[3])
        messages += [dist.isend(rows, other), dist.irecv(theirs[other], other)]
    for message in messages:
        message.wait()
    above, below = empty_halo(rows, halo)
    if rank > 0:
        above = edges(theirs[rank - 1], halo)[1]
    if rank < n - 1:
        below = edges(theirs[rank + 1], halo)[0]
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "every rank is in send")
def all_send_first(rows, halo):
    rank, n = dist.get_rank(), dist.get_world_size()
    above, below = empty_halo(rows, halo)
    first, last = (e.contiguous() for e in edges(rows, halo))
    dist.send(last, (rank + 1) % n)
    dist.send(first, (rank - 1) % n)
    dist.recv(above, (rank - 1) % n)
    dist.recv(below, (rank + 1) % n)
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "contiguous")
def views_are_sent(rows, halo):
    rank, n = dist.get_rank(), dist.get_world_size()
    above, below = empty_halo(rows, halo)
    first, last = edges(rows, halo)
    messages = []
    if rank > 0:
        messages += [dist.isend(first, rank - 1), dist.irecv(above, rank - 1)]
    if rank < n - 1:
        messages += [dist.isend(last, rank + 1), dist.irecv(below, rank + 1)]
    for message in messages:
        message.wait()
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "the halo is zero: it was never received")
def padded_only(rows, halo):
    return torch.nn.functional.pad(rows, (0, 0, halo, halo))


@mistake("halo_exchange", "the halo is at the left and the right")
def wrong_dimension(rows, halo):
    return torch.nn.functional.pad(rows, (halo, halo))


@mistake("halo_exchange", "only the halo above arrived")
def only_downwards(rows, halo):
    rank, n = dist.get_rank(), dist.get_world_size()
    above, below = empty_halo(rows, halo)
    messages = [dist.isend(edges(rows, halo)[1].contiguous(), rank + 1)] if rank < n - 1 else []
    messages += [dist.irecv(above, rank - 1)] if rank > 0 else []
    for message in messages:
        message.wait()
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "it works for float64, but not for float32")
def double_zeros(rows, halo):
    above, below = (torch.zeros(*rows.shape[:2], halo, rows.shape[3], dtype=torch.float64) for _ in range(2))
    first, last = (e.double() for e in edges(rows, halo))
    meet(rows, halo, above, below, first, last)
    return torch.cat([above, rows.double(), below], 2)


@mistake("halo_exchange", "`rows` was changed")
def accumulates(rows, halo):
    above, below = empty_halo(rows, halo)
    meet(rows, halo, above, below, *edges(rows, halo))
    out = torch.cat([above, rows, below], 2)
    rows.zero_()
    return out


@mistake("halo_exchange", "it calls the course's own")
def the_courses_halo(rows, halo):
    heights = [rows.shape[2]] * dist.get_world_size()
    split_conv.halo_plan(heights, 2 * halo + 1, padding=halo)
    return rows


@right("halo_exchange")
def down_then_up(rows, halo):
    rank, n = dist.get_rank(), dist.get_world_size()
    out = torch.nn.functional.pad(rows, (0, 0, halo, halo))
    end = rows.shape[2]
    for step, mine, at in (
        (1, rows[:, :, end - halo :], slice(0, halo)),
        (-1, rows[:, :, :halo], slice(end + halo, None)),
    ):
        to, source = rank + step, rank - step
        message = dist.isend(mine.contiguous(), to) if 0 <= to < n else None
        if 0 <= source < n:
            arrived = torch.empty_like(mine, memory_format=torch.contiguous_format)
            dist.recv(arrived, source)
            out[:, :, at] = arrived
        if message:
            message.wait()
    return out
