"""Gradient compression: fewer bytes for the same bucket, at the price of an average that is not exact.

Each of these is a `comm_hook` of `DataParallel`: called with a bucket whose `flat` holds this rank's gradients,
divided by the number of ranks, it starts the exchange and returns a function that ends it and leaves the (about)
sum over ranks in `bucket.flat`, the same on every rank.

    DataParallel(model, comm_hook=half_precision())          half the bytes of float32
    DataParallel(model, comm_hook=TopK(0.01))                what is largest, and the rest later
    DataParallel(model, comm_hook=PowerSGD(rank=2))          each matrix as a product of two thin ones

TopK and PowerSGD remember what they left out, per bucket and rank, and add it to the next gradient (error feedback): it
is only postponed. One object belongs to one DataParallel; to resume a training, torch.save it as well, on each rank.
What is not finite is sent, for a loss scaler to see, and not remembered. What is remembered was multiplied by the loss
scale of its step: keep the scale constant.
"""

import math

import torch
import torch.distributed as dist

__all__ = ["PowerSGD", "TopK", "half_precision"]


def half_precision(dtype=torch.float16):
    """Gradients travel as `dtype` (float16 or bfloat16) and come back as what they were.

    All-reduces 2 bytes an element. The sum is made in `dtype` too, and keeps about 3 digits (float16, up to 65,504) or
    2 (bfloat16, with float32's range). Raises ValueError for another dtype, TypeError for complex gradients.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"gradients travel as torch.float16 or torch.bfloat16, not {dtype}")

    def hook(bucket, group):
        if bucket.flat.is_complex():
            raise TypeError(f"{dtype} has no place for the imaginary part of {bucket.flat.dtype} gradients: use TopK")
        short = bucket.flat.to(dtype)
        work = dist.all_reduce(short, group=group, async_op=True)

        def finish():
            work.wait()
            bucket.flat.copy_(short)

        return finish

    return hook


class TopK:
    """Each rank sends its `ratio` largest elements of a bucket (at least one), with their places.

    Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory" (2018); Lin et al., "Deep Gradient Compression" (2018). An
    all-reduce cannot add up different places, so the ranks gather what each has chosen: of k elements of e bytes a rank
    all-gathers k·(e + 4) bytes and receives n times as many. (8 bytes a place in buckets of 2^31 elements or more.)

    error_feedback False forgets what was not sent: for the lesson. Raises ValueError for a ratio outside (0, 1].
    """

    def __init__(self, ratio=0.01, error_feedback=True):
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio is the part of the elements to send, above 0 and at most 1, not {ratio}")
        self.ratio, self.error_feedback, self.left = ratio, error_feedback, {}

    def __call__(self, bucket, group):
        flat = bucket.flat
        if bucket.index in self.left:
            flat += self.left[bucket.index]
        k = min(max(1, int(self.ratio * flat.numel())), flat.numel())
        places = flat.abs().topk(k, sorted=False).indices
        values, count = flat[places], dist.get_world_size(group)
        if self.error_feedback:
            self.left[bucket.index] = flat.index_fill(0, places, 0).nan_to_num_(0, 0, 0)
        short = places.to(torch.int32 if flat.numel() < 2**31 else torch.int64)
        message = torch.cat([values.view(torch.uint8), short.view(torch.uint8)])  # one message instead of two
        everyone = [torch.empty_like(message) for _ in range(count)]
        work = dist.all_gather(everyone, message, group=group, async_op=True)

        def finish():
            work.wait()
            flat.zero_()
            for message in everyone:
                values_of, places_of = message.split([k * flat.element_size(), k * short.element_size()])
                flat.index_add_(0, places_of.view(short.dtype).long(), values_of.view(flat.dtype))

        return finish


class PowerSGD:
    """Each gradient matrix M (rows, columns) travels as P·Qᵀ, P: (rows, rank), Q: (columns, rank).

    Vogels, Karimireddy, Jaggi, "PowerSGD" (2019), algorithms 1 and 2: one step of power iteration, which begins with
    the last step's Q. P = M·Q is all-reduced and orthogonalised, then Q = Mᵀ·P is all-reduced. Gradients of more than
    two dimensions are seen as (first, all others). Those of one, and matrices that would not become smaller, are
    all-reduced as they are, in one piece.

    All-reduces rank·(rows + columns) elements of each compressed matrix, and all elements of the others.
    Raises TypeError for gradients that are not float32 or float64.
    """

    def __init__(self, rank=1, error_feedback=True, seed=0):
        if not (isinstance(rank, int) and rank > 0):
            raise ValueError(f"rank is how many columns P and Q have, a whole number from 1, not {rank!r}")
        self.rank, self.error_feedback, self.seed, self.left, self.right = rank, error_feedback, seed, {}, {}

    def compresses(self, shape):
        """Whether a gradient of this shape gets smaller."""
        rows, columns = (shape[0], shape.numel() // shape[0]) if len(shape) > 1 and shape.numel() else (1, 1)
        return self.rank * (rows + columns) < rows * columns

    def __call__(self, bucket, group):
        flat, index = bucket.flat, bucket.index
        if flat.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"PowerSGD takes float32 or float64 gradients, not {flat.dtype}: use TopK instead")
        if index in self.left:
            flat += self.left[index]
        own = flat.clone() if self.error_feedback else None
        large, others = ([v for v in bucket.views if self.compresses(v.shape) is c] for c in (True, False))
        matrices = [v.reshape(v.shape[0], -1) for v in large]
        if index not in self.right:
            self.right[index] = self._first(matrices)
        right = [torch.linalg.qr(q).Q for q in self.right[index]]
        left = _together([m @ q for m, q in zip(matrices, right, strict=True)], flat)
        rest = _together([v.flatten() for v in others], flat)
        works = [dist.all_reduce(t.flat, group=group, async_op=True) for t in (left, rest) if t.parts]

        def finish():
            for work in works:
                work.wait()
            for p in left.parts:
                p.copy_(torch.linalg.qr(p).Q)
            new = _together([m.mT @ p for m, p in zip(matrices, left.parts, strict=True)], flat)
            if matrices:
                dist.all_reduce(new.flat, group=group)
            for v, p, q in zip(large, left.parts, new.parts, strict=True):
                v.copy_((p @ q.mT).view(v.shape))
            for v, total in zip(others, rest.parts, strict=True):
                v.copy_(total.view_as(v))
            # A Q of zeros (nothing was learnt in this step) or of NaNs is no place to begin the next step.
            pairs = zip(new.parts, self.right[index], strict=True)
            self.right[index] = [q if 0 < q.abs().max() < math.inf else old for q, old in pairs]
            if self.error_feedback:  # this rank's n-th of the difference: the ranks' add up to what was left out
                self.left[index] = own.sub_(flat, alpha=1 / dist.get_world_size(group)).nan_to_num_(0, 0, 0)
                for v, e in zip(bucket.views, own.split([v.numel() for v in bucket.views]), strict=True):
                    if not self.compresses(v.shape):
                        e.zero_()

        return finish

    def _first(self, matrices):
        """The same random Q on every rank."""
        numbers = torch.Generator().manual_seed(self.seed)
        return [torch.randn(m.shape[1], self.rank, generator=numbers, dtype=m.dtype).to(m.device) for m in matrices]


class _together:
    """Tensors one after the other in `flat`, so that one call sends them all; `parts` are their places in it."""

    def __init__(self, tensors, like):
        self.flat = torch.cat([t.flatten() for t in tensors]) if tensors else like.new_empty(0)
        parts = self.flat.split([t.numel() for t in tensors])
        self.parts = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
