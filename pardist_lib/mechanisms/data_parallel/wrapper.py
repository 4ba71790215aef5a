"""Data parallelism: every rank has the whole model and a part of the batch, and the gradients are averaged.

`naive_average` is all there is to it. `DataParallel` does the same faster: gradients travel together in buckets,
and while the first buckets travel, backward is still computing the others (Li et al., "PyTorch Distributed:
Experiences on Accelerating Data Parallel Training", 2020, section 3).
"""

import math
import sys
import weakref
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from ..collectives.agreement import check_same_model, named_tensors, take_from_first
from ..group import rank_and_size
from .batches import rows_of, tensors_in, without_rows
from .buckets import fill_buckets
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
    full first. When backward returns, all have arrived. p.grad is a view of its bucket: no second copy is kept, and
    the next backward writes there again (clone a gradient that is to be kept).

    bucket_mb                close a bucket at this size, in MB of 2^20 bytes; the first one at first_bucket_mb, so
                             that something travels early.
    overlap                  False: nothing is sent before backward has computed everything.
    find_unused_parameters   as in DistributedDataParallel: needed where a backward does not reach every parameter.
                             Ranks then tell each other which ones they used: 1 byte a parameter more. What no rank
                             used keeps None; where some did, the others count as zeros. Nothing overlaps then: ranks
                             that use different layers would start their buckets between different calls of the model.
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

    Frozen parameters are left alone, tied ones count once; freeze, move and cast before wrapping (what is frozen later
    counts as unused). The mean over ranks is that of the whole batch where all ranks have as many rows; for others
    see `weight` and `join`. After backward all ranks hold the same gradients, so torch's clip_grad_norm_ clips by the
    global norm without sending anything. Gradients taken with torch.autograd.grad are not averaged, and hooks of
    parameters see this rank's own. A backward has to reach at least one parameter on every rank; after one that
    raised, on all ranks, zero_grad() to None and go on. A deep copy (where group is None) averages its own gradients.

    Raises ValueError: ranks' models of different shapes, nothing to train, a bucket of size 0, a module that is
    wrapped already, Embedding(max_norm=…); in a forward to be trained, for a batch (the first tensor) without rows.
    RuntimeError: parameters to be trained that were not there when it was wrapped; in backward, a reentrant checkpoint,
    create_graph=True, sparse gradients, parameters without a gradient, a gradient that a hook replaces, and a wrapper
    that no variable holds any more.
    """

    def __init__(self, module, group=None, bucket_mb=25, overlap=True, *, first_bucket_mb=1, comm_hook=all_reduce_hook,
                 find_unused_parameters=False, sync_batch_norm=True, broadcast_buffers=False):  # fmt: skip
        super().__init__()
        _, self.n = rank_and_size(group)
        _check(module, bucket_mb, first_bucket_mb)
        check_same_model(named_tensors(module), group)
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"{type(module).__name__} has no trainable parameters: there is no gradient to average")
        self.group, self.overlap, self.comm_hook = group, overlap and not find_unused_parameters, comm_hook
        self.find_unused_parameters, self.broadcast_buffers = find_unused_parameters, broadcast_buffers
        self.module = SyncBatchNorm.convert(module, group) if sync_batch_norm else module
        take_from_first([*module.parameters(), *module.buffers()], group, bucket_mb)
        self._syncing, self._joining = True, False
        self._listen({p: name for name, p in module.named_parameters() if p.requires_grad}, bucket_mb, first_bucket_mb)

    def _listen(self, names, *sizes):
        self.names, self._sizes = names, sizes
        self.buckets = fill_buckets(list(names)[::-1], *sizes)
        self._home = {p: (b, view) for b in self.buckets for p, view in zip(b.parameters, b.views, strict=True)}
        arrived = partial(_arrived, weakref.ref(self))  # else the parameters would keep this wrapper alive
        self._hooks = [p.register_post_accumulate_grad_hook(arrived) for p in names]
        self._backward, self._ends = None, []

    def __getstate__(self):
        made_anew = "buckets", "_home", "_hooks", "_backward", "_ends"
        return {name: value for name, value in vars(self).items() if name not in made_anew}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._listen(self.names, *self._sizes)

    def forward(self, *args, **kwargs):
        if torch.is_grad_enabled():
            self._check_forward([*args, *kwargs.values()])
            if self.broadcast_buffers and self._syncing and self.training:
                take_from_first(list(self.module.buffers()), self.group)
        return self.module(*args, **kwargs)

    def _check_forward(self, given):
        if not self._joining and any(not len(batch) for batch in tensors_in(given)[:1]):
            raise ValueError(
                f"rank {dist.get_rank(self.group)} has no rows: this batch is smaller than the {self.n} ranks. "
                "`for batch, weight in model.join(batches)` gives a rank without rows the weight 0"
            )
        parameters = (p for m in self.module.modules() for p in m._parameters.values() if p is not None)
        if any(p not in self.names and p.requires_grad and p.is_leaf for p in parameters):
            late = [name for name, p in self.module.named_parameters() if p.requires_grad and p not in self.names]
            raise RuntimeError(
                f"{late[0]} is to be trained, but was not when the module was wrapped: each rank would train its own. "
                "Wrap after this change: DataParallel(model.unwrap())"
            )

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

        That is n·rows / (rows of all ranks); 1 where all have as many. Called on every rank; sends 8 bytes. Where rows
        have weights (cross_entropy's `weight`), `rows` is the sum of theirs.
        """
        if not (rows := float(rows)) >= 0:
            raise ValueError(f"rows is how many rows this rank has, 0 or more, not {rows:g}")
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
        if without := int(self._sum(batch is None)):
            raise ValueError(f"{without} of {self.n} ranks have no batch at all: there are fewer rows than ranks?")
        self._joining = True
        try:
            while total := self._sum(rows := 0 if batch is None else rows_of(batch)):
                if batch is not None:
                    none = without_rows(batch)
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
            if _in_a_checkpoint():
                raise RuntimeError("a checkpoint runs a backward within backward, and neither sees all gradients: use "
                                   "checkpoint(…, use_reentrant=False)")  # fmt: skip
            self._wait()  # for what a backward that raised has left: it would still write into the buckets
            self._backward, self._started = backward, 0
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
        unused = {p for p in missing if p.grad is None}
        if self.find_unused_parameters:
            used = torch.tensor([p.grad is not None for p in self.names], dtype=torch.uint8, device=self._device())
            self._ends.append(dist.all_reduce(used, dist.ReduceOp.MAX, self.group, async_op=True).wait)
        self._wait()
        self._backward = None
        if unused and not self.find_unused_parameters:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            first = next(name for p, name in self.names.items() if p.grad is None)
            raise RuntimeError(
                f"{first}{more} got no gradient on rank {dist.get_rank(self.group)}: this backward does not reach "
                "every parameter. Freeze what is never used before wrapping, or pass find_unused_parameters=True"
            )
        if unused:
            anyone = dict(zip(self.names, used.tolist(), strict=True))
            for p in unused:
                p.grad = self._home[p][1] if anyone[p] else None
        if lost := [p for p, (_, view) in self._home.items() if p.grad is not view and p not in unused]:
            raise RuntimeError(
                f"a hook has taken or replaced the gradient of {self.names[lost[0]]} before it was averaged. An "
                "optimizer that averages by itself can leave it: ShardedOptimizer(…, reduce_gradients=False)"
            )

    def _wait(self):
        while self._ends:
            self._ends.pop(0)()

    def _sum(self, number):
        total = torch.tensor(number, dtype=torch.float64, device=self._device())
        dist.all_reduce(total, group=self.group)
        return total.item()

    def _device(self):
        return self.buckets[0].flat.device


def _arrived(wrapper, p):
    """The hook: it is given the parameter, not its gradient."""
    if not (alive := wrapper()):
        raise RuntimeError("the DataParallel that averages this gradient is gone: keep it, or unwrap() the module")
    if p.grad is not None:  # None: a function that has no gradient for it
        alive._arrived(p)


def _in_a_checkpoint():
    frame = sys._getframe()
    while frame and frame.f_code is not CheckpointFunction.backward.__code__:
        frame = frame.f_back
    return frame is not None


@torch.no_grad()
def _move(p, view, n, names):
    """The gradient, divided by n, into its bucket, of which p.grad then is a part: one pass over the memory."""
    if p.grad.is_sparse:
        raise RuntimeError(f"the gradient of {names[p]} is sparse, which does not fit in a bucket: use sparse=False")
    if p.grad.requires_grad:
        raise RuntimeError("backward(create_graph=True): the mean over ranks could not be differentiated. Take such "
                           "gradients with torch.autograd.grad(…, create_graph=True)")  # fmt: skip
    if p.grad is not view or n != 1:
        torch.mul(p.grad, 1 / n, out=view)
    p.grad = view


def _check(module, bucket_mb, first_bucket_mb):
    for name, mb in (("bucket_mb", bucket_mb), ("first_bucket_mb", first_bucket_mb)):
        if not mb > 0 or math.isnan(mb):
            raise ValueError(f"{name} is a size above 0, not {mb}: 1e-6 puts every gradient in a bucket of its own")
    for name, m in module.named_modules():
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None:
            raise ValueError(f"{name or 'the module'} has max_norm={m.max_norm}: forward changes the weight, on each "
                             "rank for its own rows, and the ranks would drift apart. Use max_norm=None")  # fmt: skip
        if isinstance(m, (DataParallel, nn.parallel.DistributedDataParallel)):
            raise ValueError(f"{name or 'the module'} is a {type(m).__name__} already: its gradients are averaged once")
    for hooks in (p._post_accumulate_grad_hooks or {} for p in module.parameters()):
        for key, hook in list(hooks.items()):
            if getattr(hook, "func", None) is not _arrived:
                continue
            if hook.args[0]():
                raise ValueError("another DataParallel averages these parameters already: use it, or unwrap() it first")
            del hooks[key]  # one that is gone
