"""Reduce-scatter and all-gather of flat tensors that are started now and waited for later, beside the computation.

A flat tensor of S bytes is cut into n shards, one for each rank; n need not divide it.
"""

from functools import partial

import torch
import torch.distributed as dist

from ..collectives.direct import added_up, asked_for_shards, sent_shard, started_all_gather, started_exchange
from ..collectives.point_to_point import wait
from ..group import rank_and_size
from .own_group import own_group

# their names since torch 2.13, and before
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# On gloo a tensor up to this size moves by one of its own collectives: one call instead of 2·(n − 1), which counts
# with few ranks (2 on two cores: a step of stage 3 with units of 256 KB took 0.77 times as long). Longer ones are sent
# and received. Its reduce-scatter is not used, as it sends 2·(n − 1)/n·S, twice as much: an all-to-all and a sum are.
ONE_CALL_BYTES = 1 << 20


class AsyncCollectives:
    """Starts collectives of flat tensors; `result()` of what a method returns waits for one.

    apart    over a process group of its own, which all of these of `group` share: the caller's own messages may then
             come in between.
    at_once  wait for each before its method returns

    Every rank has to ask for the same things in the same order. At most two reduce-scatters are under way at a time:
    on gloo each needs a buffer as long as the tensor for what arrives, which is kept for later ones, until `let_go`.
    """

    def __init__(self, group=None, apart=True, at_once=False):
        apart = apart and dist.get_backend(group) != "nccl" and dist.get_world_size(group) > 1
        self.group, self.at_once = own_group(group) if apart else group, at_once
        self.reducing, self.turn = [None, None], 0
        self.let_go()

    def all_gather(self, flat, shard, sizes):
        """`flat`, filled with all ranks' shards, cast to its dtype before they travel. Sends this rank's n − 1 times,
        (n − 1)/n·S where n divides."""
        places, shard = flat.split(sizes), shard.to(flat.dtype)
        if _by_one_call(flat, sizes, self.group):
            works = [_all_gather(flat, places, sizes, self.group, shard)]
        else:
            works = started_all_gather(shard, places, self.group)
        under_way = _UnderWay(lambda: wait(works) or flat)
        if self.at_once:
            under_way.result()
        return under_way

    def reduce_scatter(self, flat, sizes, out=None):
        """This rank's shard of the mean of all ranks' tensors, in `out` if given. Sends S minus that shard, (n − 1)/n·S
        where n divides."""
        turn = self.reducing.index(None) if None in self.reducing else 1 - self.turn  # a free one, or the older one
        if self.reducing[turn] is not None:
            self.reducing[turn].result()
        self.turn = turn
        under_way = _UnderWay(self._started(flat, sizes, out, turn), partial(self._free, turn))
        self.reducing[turn] = under_way
        if self.at_once:
            under_way.result()
        return under_way

    def _started(self, flat, sizes, out, turn):
        rank, n = rank_and_size(self.group)
        chunks, mean = flat.split(sizes), dist.ReduceOp.AVG
        if dist.get_backend(self.group) == "nccl":
            return _nccl_reduce_scatter(chunks, flat, mean, out, self.group)
        room = self._room(turn, chunks[rank], n)
        if flat.nbytes <= ONE_CALL_BYTES:
            own = [sizes[rank]] * n
            works = [dist.all_to_all_single(room.view(-1), flat, own, list(sizes), self.group, async_op=True)]
        else:
            works = started_exchange(chunks, room, self.group)
        return partial(added_up, works, chunks, room, mean, out, self.group)

    def let_go(self):
        """Give the buffers back, once nothing is under way."""
        self.rooms = [torch.empty(0, dtype=torch.uint8)] * 2

    def _free(self, turn):
        self.reducing[turn] = None

    def _room(self, turn, chunk, n):
        """New memory each time would cost more than it takes to fill it. On a GPU torch's allocator keeps it."""
        size = n * chunk.nbytes
        if chunk.device.type != "cpu":
            return chunk.new_empty(n, chunk.numel())
        if self.rooms[turn].numel() < size:
            self.rooms[turn] = torch.empty(size, dtype=torch.uint8)
        return self.rooms[turn][:size].view(chunk.dtype).view(n, chunk.numel())


class _UnderWay:
    def __init__(self, end, then=None):
        self.end, self.then, self.value = end, then, None

    def result(self):
        if self.end is not None:
            self.value = self.end()
            self.end = None  # where it raises, it does so again
            if self.then:
                self.then()
        return self.value


def prepared_gather(flats, group=None):
    """All-gather flat tensors, [(flat, sizes)], in which this rank's shard lies already, in two parts: this posts the
    receives, and returns a function that sends and waits. The shard may change in between.

    gloo's sender waits until its receiver has posted a receive. One that is posted before the optimizer computes is
    known to the sender by the time that the optimizer is done.
    """
    cut = [(flat, flat.split(sizes), sizes) for flat, sizes in flats]
    direct = [places for flat, places, sizes in cut if not _by_one_call(flat, sizes, group)]
    posted = [work for places in direct for work in asked_for_shards(places, group)]

    def rest():
        sent = [work for places in direct for work in sent_shard(places, group)]
        ones = [_all_gather(*one, group) for one in cut if _by_one_call(one[0], one[2], group)]
        wait(posted + sent + ones)

    return rest


def _by_one_call(flat, sizes, group):
    if dist.get_backend(group) == "nccl":
        return True
    return flat.nbytes <= ONE_CALL_BYTES and len(set(sizes)) == 1


def _all_gather(flat, places, sizes, group, shard=None):
    shard = places[dist.get_rank(group)] if shard is None else shard
    if len(set(sizes)) == 1:
        return all_gather_single(flat, shard, group, True)
    return dist.all_gather(list(places), shard, group, True)


def _nccl_reduce_scatter(chunks, flat, op, out, group):
    """Started; a function that waits."""
    out = torch.empty_like(chunks[dist.get_rank(group)]) if out is None else out
    if len({len(chunk) for chunk in chunks}) == 1:
        work = reduce_scatter_single(out, flat, op, group, True)
    else:
        work = dist.reduce_scatter(out, list(chunks), op, group, True)
    return lambda: wait([work]) or out
