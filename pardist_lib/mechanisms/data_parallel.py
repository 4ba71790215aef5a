"""Data parallelism: every rank has the whole model and a part of the batch, and the gradients are averaged.

`naive_average` is all there is to it. `DataParallel` does the same faster: gradients travel together in buckets,
and while the first buckets travel, backward is still computing the others (Li et al., "PyTorch Distributed:
Experiences on Accelerating Data Parallel Training", 2020, section 3).
"""

import math
import weakref
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from .buckets import fill_buckets, same_on_all_ranks, synchronise
from .point_to_point import place
from .sync_batch_norm import SyncBatchNorm

__all__ = ["DataParallel", "all_reduce_hook", "naive_average"]


def naive_average(module, group=None):
    """Replace every gradient by its mean over the ranks, one all-reduce after the other, after backward.

    A gradient that is None has to be None on every rank. Hands S bytes of gradients to all_reduce, in as many calls
    as there are gradients.
    """
    for p in module.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad.div_(dist.get_world_size(group)), group=group)


def all_reduce_hook(bucket, group):
    """What `DataParallel` does where no other comm_hook is given."""
    return dist.all_reduce(bucket.flat, group=group, async_op=True).wait


class DataParallel(nn.Module):
    """Wraps a module so that `backward` leaves the mean of all ranks' gradients in every p.grad.

    DataParallel(module, group=None, bucket_mb=25, overlap=True)

    At the start every rank takes over the parameters and buffers of the group's first rank: models that begin
    differently are made equal (models of different shape are an error). In each backward the gradients go into
    buckets in the reverse order of module.parameters(), about the order in which they are computed. A full bucket is
    all-reduced while backward computes on. Buckets start in the order of their numbers, on every rank, whichever is
    full first. When backward returns, all have arrived. p.grad is a view of its bucket: no second copy is kept.

    bucket_mb                close a bucket at this size, in MB of 2^20 bytes; the first one at first_bucket_mb, so
                             that something travels early.
    overlap                  False: nothing is sent before backward has computed everything.
    find_unused_parameters   as in DistributedDataParallel: needed where a backward does not reach every parameter.
                             Ranks then tell each other which ones they used: 1 byte a parameter more. What no rank
                             used keeps None; where some did, the others count as zeros.
    sync_batch_norm          replace the module's BatchNorm layers by `SyncBatchNorm`: nothing else is equal to one
                             process with the whole batch.
    broadcast_buffers        True: before each forward in training, buffers are set to those of the first rank, as
                             DistributedDataParallel does. Not the default: running statistics of SyncBatchNorm are
                             the same on all ranks anyway, and those of a plain BatchNorm are each rank's share of
                             the truth, of which this would keep one and drop the others.
    comm_hook                `hook(bucket, group)` in all_reduce's place: it may start the exchange, and returns a
                             function that ends it, after which the sum over ranks stands in `bucket.flat` (where it
                             finds this rank's gradients, divided by the number of ranks). See compression.py.

    Bytes per rank and step: S (the trainable parameters') are handed to all_reduce, which as a ring sends
    2·(n − 1)/n·S. Forward sends nothing (but buffers, BatchNorm's statistics).

    Frozen parameters are left alone, tied ones count once; freeze before wrapping. The mean over ranks is that of
    the whole batch where all ranks have as many rows; for others see `weight` and `join`. After backward all ranks
    hold the same gradients, so torch's clip_grad_norm_ clips by the global norm without sending anything. Gradients
    taken with torch.autograd.grad are not averaged; use non-reentrant checkpoints.

    Raises ValueError: ranks' models of different shapes, nothing to train, a bucket of size 0, a module that is
    wrapped already; in forward, for a batch without rows.
    """

    def __init__(self, module, group=None, bucket_mb=25, overlap=True, *, first_bucket_mb=1, comm_hook=all_reduce_hook,
                 find_unused_parameters=False, sync_batch_norm=True, broadcast_buffers=False):  # fmt: skip
        super().__init__()
        _, self.n = place(group)
        _check(module, bucket_mb, first_bucket_mb)
        same_on_all_ranks(module, group)
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"{type(module).__name__} has no trainable parameters: there is no gradient to average")
        self.group, self.overlap, self.comm_hook = group, overlap, comm_hook
        self.find_unused_parameters, self.broadcast_buffers = find_unused_parameters, broadcast_buffers
        self.module = SyncBatchNorm.convert(module, group) if sync_batch_norm else module
        synchronise([*module.parameters(), *module.buffers()], group, bucket_mb)

        self.names = {p: name for name, p in module.named_parameters() if p.requires_grad}
        self.buckets = fill_buckets(list(self.names)[::-1], bucket_mb, first_bucket_mb)
        self._home = {p: (b, view) for b in self.buckets for p, view in zip(b.parameters, b.views, strict=True)}
        arrived = partial(_arrived, weakref.ref(self))  # else the parameters would keep this wrapper alive
        self._hooks = [p.register_post_accumulate_grad_hook(arrived) for p in self.names]
        self._syncing, self._joining, self._backward = True, False, None

    def forward(self, *args, **kwargs):
        if not self._joining and any(isinstance(a, torch.Tensor) and a.dim() and not len(a) for a in args):
            raise ValueError(
                f"rank {dist.get_rank(self.group)} has no rows: this batch is smaller than the {self.n} ranks. "
                "`for batch, weight in model.join(batches)` gives a rank without rows the weight 0"
            )
        if self.broadcast_buffers and self._syncing and self.training and torch.is_grad_enabled():
            synchronise(list(self.module.buffers()), self.group)
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self):
        """Inside, backward adds to this rank's own gradients and sends nothing: all micro-batches but the last.

        The next backward outside averages the sums. Divide each micro-batch's loss by their number.
        """
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    def weight(self, rows):
        """By what to multiply the mean loss of this rank's `rows` rows, so that the ranks' mean is that of all rows.

        That is n·rows / (rows of all ranks); 1 where all have as many. Called on every rank; sends 8 bytes.
        """
        total = self._sum(rows)
        return self.n * rows / total if total else 0.0

    def join(self, batches):
        """`for batch, weight in model.join(batches)`: as many steps on every rank, however many batches each has.

        A rank that has run out gets batches without rows and the weight 0, and goes on with the others' forward and
        backward, so that all make the same calls (SyncBatchNorm's too); the module has to take zero rows. Multiply
        the mean loss by the weight (see `weight`). batch: a tensor, or tensors in tuples, lists and dicts, rows first.
        Sends 8 bytes a step and at the start. Raises ValueError on all ranks where one of them has no batch at all.
        """
        batches = iter(batches)
        batch = next(batches, None)
        if without := self._sum(batch is None):
            raise ValueError(f"{without} of {self.n} ranks have no batch at all: there are fewer rows than ranks?")
        self._joining = True
        try:
            while total := self._sum(rows := 0 if batch is None else _rows(batch)):
                if batch is not None:
                    none = _without_rows(batch)
                yield (none if batch is None else batch), self.n * rows / total
                batch = next(batches, None)
        finally:
            self._joining = False

    def unwrap(self):
        """Give the module back: its gradients are no longer averaged, and it can be wrapped anew."""
        for hook in self._hooks:
            hook.remove()
        return self.module

    # ---- backward ---------------------------------------------------------------------------------------------

    def _arrived(self, p):
        bucket, view = self._home[p]
        if not self._syncing:
            return _move(p, view, 1, self.names)
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:  # the first gradient of this backward
            self._backward, self._started, self._ends = backward, 0, []
            for b in self.buckets:
                b.missing = set(b.parameters)
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        _move(p, view, self.n, self.names)
        bucket.missing.discard(p)
        if self.overlap:
            self._start_full_ones()

    def _start_full_ones(self):
        """Start the next bucket while it is full. Never one before its turn: the ranks would not fit together."""
        while self._started < len(self.buckets) and not self.buckets[self._started].missing:
            end = self.comm_hook(self.buckets[self._started], self.group)
            if not callable(end):
                raise TypeError(f"comm_hook returned {end!r:.40}: a function that waits for the sum is asked for, or "
                                "`lambda: None` where nothing is left to wait for")  # fmt: skip
            self._ends.append(end)
            self._started += 1

    def _finish(self):
        """Once backward has computed everything: start what has not been started, and wait for all."""
        missing = [p for bucket in self.buckets for p in bucket.missing]
        for p in missing:
            if p.grad is None:
                self._home[p][1].zero_()
            else:  # from an earlier backward, under no_sync
                _move(p, self._home[p][1], self.n, self.names)
        for bucket in self.buckets:
            bucket.missing = set()
        self._start_full_ones()
        unused = [p for p in missing if p.grad is None]
        if self.find_unused_parameters:
            used = torch.tensor([p.grad is not None for p in self.names], dtype=torch.uint8, device=self._device())
            self._ends.append(dist.all_reduce(used, dist.ReduceOp.MAX, self.group, async_op=True).wait)
        for end in self._ends:
            end()
        self._backward, self._ends = None, []
        if unused and not self.find_unused_parameters:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            first = next(name for p, name in self.names.items() if p.grad is None)
            raise RuntimeError(
                f"{first}{more} got no gradient on rank {dist.get_rank(self.group)}: this backward does not reach "
                "every parameter. Freeze what is never used, or pass find_unused_parameters=True"
            )
        if unused:
            anyone = dict(zip(self.names, used.tolist(), strict=True))
            for p in unused:
                p.grad = self._home[p][1] if anyone[p] else None

    def _sum(self, number):
        total = torch.tensor(int(number), device=self._device())
        dist.all_reduce(total, group=self.group)
        return total.item()

    def _device(self):
        return self.buckets[0].flat.device


def _arrived(wrapper, p):
    """The hook: it is given the parameter, not its gradient."""
    if alive := wrapper():
        alive._arrived(p)


@torch.no_grad()
def _move(p, view, n, names):
    """The gradient, divided by n, into its bucket, of which p.grad then is a part: one pass over the memory."""
    if p.grad.is_sparse:
        raise RuntimeError(f"the gradient of {names[p]} is sparse, which does not fit in a bucket: use sparse=False")
    if p.grad is not view or n != 1:
        torch.mul(p.grad, 1 / n, out=view)
    p.grad = view


def _check(module, bucket_mb, first_bucket_mb):
    for name, mb in (("bucket_mb", bucket_mb), ("first_bucket_mb", first_bucket_mb)):
        if not mb > 0 or math.isnan(mb):
            raise ValueError(f"{name} is a size above 0, not {mb}: 1e-6 puts every gradient in a bucket of its own")
    for name, m in module.named_modules():
        if isinstance(m, (DataParallel, nn.parallel.DistributedDataParallel)):
            raise ValueError(f"{name or 'the module'} is a {type(m).__name__} already: its gradients are averaged once")
    hooks = [hook for p in module.parameters() for hook in (p._post_accumulate_grad_hooks or {}).values()]
    if any(getattr(hook, "func", None) is _arrived and hook.args[0]() for hook in hooks):
        raise ValueError("another DataParallel averages these parameters already: use that one, or unwrap() it first")


def _tensors(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else []
    return [t for part in parts for t in _tensors(part)]


def _rows(batch):
    tensors = _tensors(batch)
    if not tensors:
        raise ValueError(f"join needs batches with tensors in them, not {type(batch).__name__}")
    return len(tensors[0])


def _without_rows(batch):
    if isinstance(batch, torch.Tensor):
        return batch[:0]
    if isinstance(batch, dict):
        return {key: _without_rows(part) for key, part in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = map(_without_rows, batch)
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
