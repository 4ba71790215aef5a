"""Gathering shards on a line and reducing lines to shards, beside the computation.

A *line* is a flat tensor that is cut into n shards; n need not divide it. S: its bytes.
"""

from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import _world

from .collectives import ring_all_gather, ring_reduce_scatter
from .point_to_point import place
from .ring_collectives import prepared_ring_all_gather

# their names since torch 2.13, and before
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# gloo's own collectives wake fewer threads, ours move fewer bytes (its reduce-scatter sends 1.5·S): measured with
# 2 and 4 ranks on two cores, the two ways take as long at about a megabyte.
RING_BYTES = 1 << 20


def by_ring(line, sizes, group):
    """Whether a line goes round our ring: a long one on gloo, or one that n does not divide."""
    long_or_uneven = line.nbytes >= RING_BYTES or len(set(sizes)) > 1
    return len(sizes) == 1 or dist.get_backend(group) != "nccl" and long_or_uneven


def reduce_scatter_line(line, sizes, out=None, group=None, async_op=False):
    """(this rank's shard of the mean of all ranks' lines, what to wait for or None).

    Sends S minus its own shard, (n − 1)/n·S where n divides.
    """
    mean = dist.ReduceOp.AVG
    if by_ring(line, sizes, group):
        return ring_reduce_scatter(line, mean, out, group), None
    out = line.new_empty(sizes[dist.get_rank(group)]) if out is None else out
    if len(set(sizes)) == 1:
        return out, reduce_scatter_single(out, line, mean, group, async_op)
    return out, dist.reduce_scatter(out, list(line.split(sizes)), mean, group, async_op)


def all_gather_line(line, shard, sizes, group=None, async_op=False):
    """(the line, on which every rank's shard has come, what to wait for or None).

    Sends S minus the next rank's shard, (n − 1)/n·S where n divides.
    """
    if by_ring(line, sizes, group):
        return ring_all_gather(shard, sizes, line, group), None
    if len(set(sizes)) == 1:
        return line, all_gather_single(line, shard, group, async_op)
    return line, dist.all_gather(list(line.split(sizes)), shard, group, async_op)


def prepared_gather(lines, group=None):
    """Gather lines, [(line, sizes)], on which this rank's shard lies already, in two parts: this asks for the first
    receipt and returns a function that does the rest. The shard may change in between.

    gloo's sender waits to be told that its receipt has been asked for. What is asked for before the optimizer computes
    is known by the time it is done.
    """
    rank, _ = place(group)
    long = [by_ring(line, sizes, group) for line, sizes in lines]
    go_round = prepared_ring_all_gather(
        [line.split(sizes) for (line, sizes), ring in zip(lines, long, strict=True) if ring], group
    )

    def rest():
        go_round()
        for (line, sizes), ring in zip(lines, long, strict=True):
            if not ring:
                all_gather_line(line, line.split(sizes)[rank], sizes, group)

    return rest


class Courier:
    """Moves lines so that the caller can compute meanwhile; `result()` of what its methods return waits for one.

    Rings of ours go one after another in a thread of their own, over a process group of their own, which all couriers
    of a group share: several models send in the order in which they ask. torch's own collectives (short lines; all on
    nccl) run in torch's threads anyway. Every rank has to ask for the same things in the same order. overlap=False:
    everything at once, in the caller's thread.
    """

    def __init__(self, group=None, overlap=True):
        self.group, self.overlap, self.thread = group, overlap and dist.get_world_size(group) > 1, None
        if self.overlap and dist.get_backend(group) != "nccl":
            self.own_group = _own_group(group)
            name = self.own_group.group_name
            self.thread = _threads.get(name) or _threads.setdefault(name, ThreadPoolExecutor(1, "courier"))

    def all_gather(self, line, shard, sizes):
        return self._send(all_gather_line, line, sizes, line, shard, sizes)

    def reduce_scatter(self, line, sizes, out=None):
        return self._send(reduce_scatter_line, line, sizes, line, sizes, out)

    def _send(self, function, line, sizes, *args):
        if self.thread and by_ring(line, sizes, self.group):
            return _InThread(self.thread.submit(function, *args, self.own_group))
        return _Started(*function(*args, self.group, self.overlap))


class _InThread:
    def __init__(self, future):
        self.future = future

    def result(self):
        return self.future.result()[0]


class _Started:
    def __init__(self, value, work):
        self.value, self.work = value, work

    def result(self):
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.value


def _own_group(group):
    """A second process group of the same ranks, made once: its threads and connections live as long as the process.

    dist.new_group would have to be called by ranks outside of the group too, or numbers its groups differently on
    ranks that have made different ones before; so this does what it does, under a name of the group's own.
    """
    group = group or dist.group.WORLD
    name = f"{group.group_name}.courier"
    if _own_groups.get(name) not in _world.pg_map:
        backend, store = _world.pg_map[group]
        members = dist.get_process_group_ranks(group)
        rank, backend = dist.get_rank(group), dist.Backend(backend)
        own, _ = distributed_c10d._new_process_group_helper(
            len(members), rank, members, backend, store, name, timeout=distributed_c10d._get_default_timeout(backend)
        )
        _world.pg_group_ranks[own] = {member: i for i, member in enumerate(members)}
        _own_groups[name] = own
    return _own_groups[name]


_own_groups = {}
_threads = WeakValueDictionary()  # of each own group: it ends with the last courier
