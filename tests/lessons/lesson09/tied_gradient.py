"""Wrong answers to tied_gradient, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist

from tests.lessons.planted import mistake, right


def ends(weight, group):
    """(rank, the other end, this rank's part); the other end is None where there is none."""
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    other = n - 1 - rank if n > 1 and rank in (0, n - 1) else None
    if weight is None:
        return rank, None, None
    return rank, other, torch.zeros_like(weight) if weight.grad is None else weight.grad


def exchanged(mine, other, group):
    theirs = torch.empty_like(mine)
    message = dist.isend(mine, group=group, group_dst=other)
    dist.recv(theirs, group=group, group_src=other)
    message.wait()
    return theirs


@mistake("tied_gradient", "each end has its own part still")
def does_nothing(weight, group=None):
    pass


@mistake("tied_gradient", "this is the mean")
def takes_the_mean(weight, group=None):
    _, other, mine = ends(weight, group)
    if other is not None:
        weight.grad = (mine + exchanged(mine, other, group)) / 2


@mistake("tied_gradient", "only the first rank has the sum")
def one_way(weight, group=None):
    rank, other, mine = ends(weight, group)
    if other is not None and rank == 0:
        dist.recv(theirs := torch.empty_like(mine), group=group, group_src=other)
        weight.grad = mine + theirs
    elif other is not None:
        dist.send(mine, group=group, group_dst=other)


@mistake("tied_gradient", "the parts are exchanged, not added up")
def exchanges(weight, group=None):
    _, other, mine = ends(weight, group)
    if other is not None:
        weight.grad = exchanged(mine, other, group)


@mistake("tied_gradient", "it calls all_reduce, in which all ranks take part")
def all_reduces(weight, group=None):
    if weight is not None:
        mine = weight.grad
    else:
        mine = torch.zeros(5, 3, dtype=torch.float64)
    dist.all_reduce(mine, group=group)


@mistake("tied_gradient", "rank 0 is in send to rank 3, rank 3 is in send to rank 0")
def both_send_first(weight, group=None):
    _, other, mine = ends(weight, group)
    if other is not None:
        dist.send(mine, group=group, group_dst=other)
        dist.recv(theirs := torch.empty_like(mine), group=group, group_src=other)
        weight.grad = mine + theirs


@mistake("tied_gradient", "where the last rank's .grad is None")
def forgets_none(weight, group=None):
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    if weight is not None and n > 1:
        weight.grad += exchanged(weight.grad.clone(), n - 1 - rank, group)


@mistake("tied_gradient", "the table itself has changed")
def adds_to_the_weight(weight, group=None):
    _, other, mine = ends(weight, group)
    if other is not None:
        with torch.no_grad():
            weight += exchanged(mine, other, group)


@mistake("tied_gradient", "the sum counts twice")
def adds_again(weight, group=None):
    _, other, mine = ends(weight, group)
    if other is not None:
        total = mine + exchanged(mine, other, group)
        weight.grad = total + exchanged(total, other, group)


@mistake("tied_gradient", "in two groups of 2 ranks")
def ignores_the_group(weight, group=None):
    rank, n = dist.get_rank(), dist.get_world_size()
    if weight is not None and rank in (0, n - 1) and dist.get_world_size(group) > 1:
        mine = torch.zeros_like(weight) if weight.grad is None else weight.grad
        message = dist.isend(mine, n - 1 - rank)
        dist.recv(theirs := torch.empty_like(mine), n - 1 - rank)
        message.wait()
        weight.grad = mine + theirs


@mistake("tied_gradient", "in a group of one rank")
def doubles_a_single_table(weight, group=None):
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    if weight is None:
        return
    mine = torch.zeros_like(weight) if weight.grad is None else weight.grad
    weight.grad = mine + (exchanged(mine, n - 1 - rank, group) if n > 1 else mine)


@right("tied_gradient")
def in_turn(weight, group=None):
    rank, other, mine = ends(weight, group)
    if other is None:
        return
    theirs = torch.empty_like(mine)
    if rank == 0:
        dist.send(mine, group=group, group_dst=other)
        dist.recv(theirs, group=group, group_src=other)
    else:
        dist.recv(theirs, group=group, group_src=other)
        dist.send(mine, group=group, group_dst=other)
    weight.grad = mine.add_(theirs)


@right("tied_gradient")
def the_sum_goes_back(weight, group=None):
    """The last part to the first rank, the sum back: as many bytes."""
    rank, other, mine = ends(weight, group)
    if other is None:
        return
    got = torch.empty_like(mine)
    if rank == 0:
        dist.recv(got, group=group, group_src=other)
        weight.grad = mine + got
        dist.send(weight.grad, group=group, group_dst=other)
    else:
        dist.send(mine, group=group, group_dst=other)
        dist.recv(got, group=group, group_src=other)
        weight.grad = got


@right("tied_gradient")
def a_batch_of_messages(weight, group=None):
    _, other, mine = ends(weight, group)
    if other is None:
        return
    theirs = torch.empty_like(mine)
    pair = [dist.P2POp(dist.isend, mine, group=group, group_peer=other)]
    pair.append(dist.P2POp(dist.irecv, theirs, group=group, group_peer=other))
    for message in dist.batch_isend_irecv(pair):
        message.wait()
    weight.grad = mine + theirs
