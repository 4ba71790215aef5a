"""A linear layer that takes as long as it is told, so that a pipeline of four ranks can be watched on two cores."""

import time
from contextlib import contextmanager

import torch
from torch import nn

from pardist_lib.mechanisms.collectives.autograd import wanted


class SlowLinear(nn.Linear):
    """A linear layer without bias that takes `cost` seconds a row in forward, and as long for each half of its
    backward. It computes in earnest, and sleeps for the rest of its time.

    x: (b, width) -> (b, width)
    """

    def __init__(self, width, cost, dtype=None):
        super().__init__(width, width, bias=False, dtype=dtype)
        self.cost = cost

    def forward(self, x):
        return _Slow.apply(x, self.weight, self.cost)


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, cost):
        ctx.save_for_backward(x, weight)
        ctx.seconds = cost * len(x)
        with lasting(ctx.seconds):
            return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        to_x, to_weight, _ = wanted(ctx)  # in I the first one only, in W the second one only
        grad_x = grad_weight = None
        if to_x:
            with lasting(ctx.seconds):
                grad_x = grad @ weight
        if to_weight:
            with lasting(ctx.seconds):
                grad_weight = grad.T @ x
        return grad_x, grad_weight, None


@contextmanager
def lasting(seconds):
    """What is inside takes so many seconds; where it is done earlier, the rest is slept."""
    done = time.perf_counter() + seconds
    yield
    time.sleep(max(0.0, done - time.perf_counter()))
