"""Averaged gradients in few lines: one after the other after backward, and in buckets while backward computes.

`DataParallel` (wrapper.py) is the second one, for models and loops of every kind. In both the order in which gradients
will come is guessed once, the last layer's first. DDP has one bucket for all of them in its first backward, sees in
which order they come, and then deals them out: 1 MB in the bucket that is to be full first, 25 MB in the others.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable

from ..collectives.agreement import take_from_first
from .buckets import fill_buckets

__all__ = ["BucketedDataParallel", "naive_average"]


def naive_average(module, group=None):
    """Replace every gradient by its mean over the ranks, one all-reduce after the other, after backward.

    A gradient that is None has to be None on every rank. All-reduces S bytes, the gradients', in as many calls as there
    are gradients.
    """
    for p in module.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad.div_(dist.get_world_size(group)), group=group)


class BucketedDataParallel(nn.Module):
    """`module`, whose backward leaves the mean of all ranks' gradients in every p.grad.

    Forward sends nothing. Backward all-reduces S bytes, the trainable parameters', in one call for
    each bucket of `bucket_mb` MB: 2·(n − 1)/n·S sent by each rank of a ring (Li et al. 2020, 3).

    Not in here, but in `DataParallel`: parameters that a backward does not reach, accumulation
    without sending, batches of unequal length, BatchNorm over all ranks, going on after a backward
    that failed, and checks of the model.
    """

    def __init__(self, module, group=None, bucket_mb=25):
        super().__init__()
        self.module, self.group, self.n = module, group, dist.get_world_size(group)
        take_from_first([*module.parameters(), *module.buffers()], group)  # equal starts
        trained = [p for p in module.parameters() if p.requires_grad]
        self.buckets = fill_buckets(trained[::-1], bucket_mb)  # as backward goes: the last layer first
        for bucket in self.buckets:
            for p, view in zip(bucket.parameters, bucket.views, strict=True):
                p.register_post_accumulate_grad_hook(partial(self._arrived, bucket, view))
        self._started = None  # how many buckets, in this backward

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def _arrived(self, bucket, view, p):
        """The hook: p's gradient is complete."""
        if self._started is None:  # the first one of this backward
            self._started, self._works = 0, []
            for b in self.buckets:
                b.missing = set(b.parameters)
            Variable._execution_engine.queue_callback(self._finish)  # when this backward is over
        torch.mul(p.grad, 1 / self.n, out=view)  # into its place in the bucket
        p.grad = view  # where the mean will be
        bucket.missing.discard(p)
        self._start_full_ones()

    def _start_full_ones(self):
        """The next bucket, never one that is full before it: the order is the same on every rank."""
        while self._started < len(self.buckets) and not self.buckets[self._started].missing:
            flat = self.buckets[self._started].flat
            work = dist.all_reduce(flat, group=self.group, async_op=True)  # backward goes on meanwhile
            self._works.append(work)
            self._started += 1

    def _finish(self):
        """At the end of backward: wait until every sum is there."""
        for work in self._works:
            work.wait()
        not_sent, self._started = len(self.buckets) - self._started, None
        if not_sent:
            raise RuntimeError(f"{not_sent} buckets lack a gradient in this backward: see DataParallel")
