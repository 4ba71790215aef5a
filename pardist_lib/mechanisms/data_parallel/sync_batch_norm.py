"""BatchNorm over the batch of all ranks (Ioffe, Szegedy 2015, algorithm 1, with the mini-batch spread over ranks).

Plain BatchNorm normalises each rank's rows by their own mean and variance. That is another function than one process
computes for the whole batch, and no average of gradients makes up for it.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d, 2d or 3d whose mean and variance are those of all ranks' rows.

    x: (b, c, …), b may differ from rank to rank, and be 0 on some -> the same shape. The parameters' gradients are
    this rank's share: averaged over ranks (`DataParallel`) they are those of the whole batch.

    In training a forward all-gathers each rank's mean, sum of squared deviations and count, (2·c + 1) numbers; a
    backward all-reduces 2·c. In evaluation it sends nothing and is plain BatchNorm.

    16-bit inputs are normalised in float32, as torch does. Backward cannot be differentiated again.

    Raises ValueError where there is only one value for each channel on all ranks together.
    """

    def __init__(self, *args, group=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.group = group

    @classmethod
    def convert(cls, module, group=None):
        """`module` with its BatchNorm layers replaced (in place, but for `module` itself); they keep their tensors.

        Raises ValueError for a kind of BatchNorm with a forward of its own, which would be lost."""
        kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
        for m in module.modules():
            if isinstance(m, kinds) and type(m).forward is not nn.BatchNorm1d.forward:
                raise ValueError(
                    f"{type(m).__name__} is a BatchNorm with a forward of its own, which would be lost: make a module "
                    "beside it of what it does more, or pass sync_batch_norm=False"
                )
        if isinstance(module, kinds):
            new = cls(module.num_features, module.eps, module.momentum, False, False, group=group)
            new.__dict__.update(vars(module), group=group)
            return new
        for name, child in module._modules.items():  # named_children() leaves out what stands in two places
            if child is not None:
                module._modules[name] = cls.convert(child, group)
        return module

    def _check_input_dim(self, x):
        if x.dim() < 2:
            raise ValueError(f"expected (b, c, …), got {x.dim()} dimensions")
        if x.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got {x.shape[1]}")

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, variance, count = _Normalise.apply(x, self.weight, self.bias, self.eps, self.group)
        if self.track_running_stats and self.running_mean is not None:
            self._remember(mean, variance * count / (count - 1))
        return y

    @torch.no_grad()
    def _remember(self, mean, variance):
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        x32 = _at_least_float32(x)
        mean, squares, count = _statistics(x32, group)
        if count < 2:
            raise ValueError(f"BatchNorm needs two values for each channel over all ranks, there is {int(count)}")
        variance = squares / count
        scale = torch.rsqrt(variance + eps)
        y = (x32 - _wide(mean, x)) * _wide(scale, x)
        if weight is not None:
            y = y * _wide(weight, x)
        if bias is not None:
            y = y + _wide(bias, x)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.count, ctx.group, ctx.has_bias = count, group, bias is not None
        ctx.mark_non_differentiable(mean, variance)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, weight, mean, scale = ctx.saved_tensors
        dy = _at_least_float32(dy)
        xhat = (_at_least_float32(x) - _wide(mean, x)) * _wide(scale, x)
        others = [d for d in range(dy.dim()) if d != 1]
        own = torch.stack([dy.sum(others), (dy * xhat).sum(others)])  # (2, c): the gradients of bias and weight
        total = own.clone()
        dist.all_reduce(total, group=ctx.group)
        shift, slope = total / ctx.count
        dx = (dy - _wide(shift, dy) - xhat * _wide(slope, dy)) * _wide(scale if weight is None else scale * weight, dy)
        return dx.to(x.dtype), None if weight is None else own[1], own[0] if ctx.has_bias else None, None, None


def _statistics(x, group):
    """(mean, sum of squared deviations from it, count) of each channel over all ranks. Combined from the ranks' own,
    without a difference of large squares (Chan, Golub, LeVeque 1979)."""
    others = [d for d in range(x.dim()) if d != 1]
    count = x.numel() // x.shape[1]
    mean = x.sum(others) / max(count, 1)
    squares = (x - _wide(mean, x)).square().sum(others)
    mine = torch.cat([mean, squares, mean.new_tensor([count])])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    means, squares, counts = torch.stack(everyone).split([len(mean), len(mean), 1], dim=1)  # (n, c), (n, c), (n, 1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    return mean, squares.sum(0) + ((means - mean).square() * counts).sum(0), total.item()


def _at_least_float32(x):
    """In 16 bits a count of rows would be rounded, and a sum of squares overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _wide(values, x):
    """(c) -> (1, c, 1, …), to go with x: (b, c, …)"""
    return values.view(1, -1, *[1] * (x.dim() - 2))
