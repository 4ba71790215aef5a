"""Data parallelism: every rank has the whole model and a part of the batch, and the gradients are averaged.

They travel together, in buckets, and while the first buckets travel, backward is still computing the others (Li et al.,
"PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020, section 3). bucketed.py has this in a
third of the lines; here stands what models and training loops ask for besides. checks.py refuses what would go wrong.

Its pattern is torch's DistributedDataParallel (torch.nn.DataParallel is another thing, one process with a thread for
each GPU), where three things are otherwise. A hook of `register_comm_hook` is called with (state, bucket), finds
gradients that nobody has divided in bucket.buffer(), and returns a Future of what is to replace them. In `no_sync`
forward has to be inside as well, or its backward sends. And with find_unused_parameters messages overlap still: DDP
looks for the unused ones in the graph, when forward is over.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from ..collectives.agreement import check_same_model, named_tensors, take_from_first
from ..group import rank_and_size
from . import checks
from .batches import UnevenBatches
from .buckets import fill_buckets
from .sync_batch_norm import SyncBatchNorm

__all__ = ["DataParallel", "all_reduce_hook"]


def all_reduce_hook(bucket, group):
    """What `DataParallel` does where no other comm_hook is given."""
    return dist.all_reduce(bucket.flat, group=group, async_op=True).wait


class DataParallel(UnevenBatches, nn.Module):
    """Wraps a module so that `backward` leaves the mean of all ranks' gradients in every p.grad.

    At the start every rank takes over the parameters and buffers of the group's first rank. In each backward the
    gradients go into buckets in the reverse order of module.parameters(), about that in which they are computed. A full
    bucket is all-reduced while backward computes on; buckets start in the same order on every rank. When backward
    returns, all have arrived. p.grad is a view of its bucket: clone a gradient that is to outlive the next backward.

    bucket_mb                close a bucket at this size, in MB of 2^20 bytes; the first one at first_bucket_mb, so
                             that something travels early.
    overlap                  False: nothing is sent before backward has computed everything.
    find_unused_parameters   as in DDP: needed where a backward does not reach every parameter. Ranks then tell each
                             other which ones they used, 1 byte a parameter more: what no rank used keeps None; where
                             some did, the others count as zeros. Nothing overlaps then: ranks that use different
                             layers would start their buckets between different calls of the model.
    sync_batch_norm          BatchNorm layers become `SyncBatchNorm`s, without which no step equals one process's.
    broadcast_buffers        before each forward in training, set buffers to the first rank's, as DDP does. Not the
                             default: SyncBatchNorm's are the same on all ranks anyway, and of a plain BatchNorm's
                             running statistics it would keep one rank's share only.
    comm_hook                `hook(bucket, group)` in all_reduce's place: it may start the exchange, and returns a
                             function that ends it, after which the sum over ranks stands in `bucket.flat` (where it
                             finds this rank's gradients, divided by the number of ranks). See compression.py.

    Forward sends nothing (but buffers, BatchNorm's statistics). Backward all-reduces S bytes, the trainable
    parameters': as a ring, each rank sends 2·(n − 1)/n·S.

    Frozen parameters are left alone, tied ones count once; freeze, move and cast before wrapping (what is frozen later
    counts as unused). The mean over ranks is that of the whole batch where all ranks have as many rows; for others
    see `weight` and `join`. clip_grad_norm_ clips by the global norm, since all ranks hold the same gradients. Those
    taken with torch.autograd.grad are not averaged, and hooks of parameters see this rank's own. A backward has to
    reach at least one parameter on every rank; after one that raised, on all ranks, zero_grad() to None and go on. A
    deep copy (where group is None) averages its own gradients.

    Raises, mostly in checks.py, ValueError: ranks' models of different shapes, nothing to train, a bucket of size 0, a
    module that is wrapped already, Embedding(max_norm=…), a batch to train on without rows. RuntimeError: a parameter
    to be trained that was not when it was wrapped; in backward, a reentrant checkpoint, create_graph=True, sparse
    gradients, parameters without one, one that a hook replaces, and a wrapper that no variable holds any more.
    """

    def __init__(self, module, group=None, bucket_mb=25, overlap=True, *, first_bucket_mb=1, comm_hook=all_reduce_hook,
                 find_unused_parameters=False, sync_batch_norm=True, broadcast_buffers=False):  # fmt: skip
        super().__init__()
        _, self.n = rank_and_size(group)
        checks.buckets_have_a_size(bucket_mb=bucket_mb, first_bucket_mb=first_bucket_mb)
        checks.only_steps_change_weights(module)
        checks.averaged_once(module, DataParallel, DistributedDataParallel)
        check_same_model(named_tensors(module), group)
        checks.something_to_train(module)
        self.group, self.overlap, self.comm_hook = group, overlap and not find_unused_parameters, comm_hook
        self.find_unused_parameters, self.broadcast_buffers = find_unused_parameters, broadcast_buffers
        self.module = SyncBatchNorm.convert(module, group) if sync_batch_norm else module
        take_from_first([*module.parameters(), *module.buffers()], group, bucket_mb)
        self._syncing = True
        self._listen({p: name for name, p in module.named_parameters() if p.requires_grad}, bucket_mb, first_bucket_mb)

    def _listen(self, names, *sizes):
        """Make buckets, and a hook for every parameter, which torch calls once its gradient is complete."""
        self.names, self._sizes = names, sizes
        self.buckets = fill_buckets(list(names)[::-1], *sizes)
        self._place = {p: (b, view) for b in self.buckets for p, view in zip(b.parameters, b.views, strict=True)}
        self._hooks = [p.register_post_accumulate_grad_hook(checks.hook_of(self)) for p in names]
        self._backward, self._started, self._ends = None, 0, []

    def forward(self, *args, **kwargs):
        if torch.is_grad_enabled():
            if not self._joining:
                checks.every_rank_has_rows((args, kwargs), self.group)
            checks.no_parameter_is_new(self.module, self.names)
            if self.broadcast_buffers and self._syncing and self.training:
                # a backward to come may have saved them: BatchNorm's, which it does not look at, or equal ones
                take_from_first(list(self.module.buffers()), self.group, counted=False)
        return self.module(*args, **kwargs)

    # ---- backward -------------------------------------------------------------------------------------------------

    def _arrived(self, p):
        """The hook: p.grad goes into its bucket; buckets that are full start."""
        if (gradient := p.grad) is None:  # of a function that has none for it
            return
        checks.fits_in_bucket(gradient, p, self.names)
        bucket, view = self._place[p]
        if not self._syncing:
            return _put(p, view, 1)
        if self._backward != (backward := torch._C._current_graph_task_id()):
            self._begin(backward)
        _put(p, view, self.n)
        bucket.missing.discard(p)
        if self.overlap:
            self._start_full_ones()

    def _begin(self, backward):
        """The first gradient of this backward is there."""
        checks.backward_is_whole()
        self._wait()  # for what a backward that raised has left: it would still write into the buckets
        self._backward, self._started = backward, 0
        for bucket in self.buckets:
            bucket.missing = set(bucket.parameters)
        Variable._execution_engine.queue_callback(self._finish)

    def _start_full_ones(self):
        """Start the next bucket while it is full. Never one before its turn: the ranks would not fit together."""
        while self._started < len(self.buckets) and not self.buckets[self._started].missing:
            end = self.comm_hook(self.buckets[self._started], self.group)
            checks.can_be_waited_for(end)
            self._ends.append(end)
            self._started += 1

    def _finish(self):
        """Backward has computed everything: start what has not been started, and wait for all."""
        missing = [p for bucket in self.buckets for p in bucket.missing]
        unused = {p for p in missing if p.grad is None}
        for p in missing:
            bucket, view = self._place[p]
            view.zero_() if p in unused else _put(p, view, self.n)  # that of an earlier backward, under no_sync
            bucket.missing.discard(p)
        self._start_full_ones()
        if self.find_unused_parameters:
            used = self.buckets[0].flat.new_tensor([p not in unused for p in self.names], dtype=torch.uint8)
            self._ends.append(dist.all_reduce(used, dist.ReduceOp.MAX, self.group, async_op=True).wait)
        self._wait()
        self._backward = None
        if self.find_unused_parameters:
            for p, anywhere in zip(self.names, used.tolist(), strict=True):
                if p in unused and anywhere:
                    p.grad = self._place[p][1]
        else:
            checks.all_reached(unused, self.names, self.group)
        checks.nobody_took_gradients(self._place, unused, self.names)

    def _wait(self):
        while self._ends:
            self._ends.pop(0)()

    # ---- besides --------------------------------------------------------------------------------------------------

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

    def unwrap(self):
        """Give the module back: its gradients are no longer averaged, and it can be wrapped anew."""
        for hook in self._hooks:
            hook.remove()
        return self.module

    def __getstate__(self):
        made_anew = "buckets", "_place", "_hooks", "_backward", "_started", "_ends"
        return {name: value for name, value in vars(self).items() if name not in made_anew}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._listen(self.names, *self._sizes)


def _put(p, view, n):
    """The gradient, divided by n, into its bucket, of which p.grad then is a part: one pass over the memory."""
    if p.grad is not view or n != 1:
        torch.mul(p.grad, 1 / n, out=view)
    p.grad = view
