"""Reference solutions of lesson 08. Their signatures and docstrings are the blanks of the notebook."""

import torch
import torch.distributed as dist


def next_scale(scale: float, good_steps: int, overflow: bool, interval: int) -> tuple[float, int]:
    """The loss scale for the next step, and how many good steps there have been in a row.

    good_steps: in a row before this one, since the scale last changed. overflow: whether this
    step's gradients were infinite or not a number. interval: so many good steps in a row double the
    scale.
    Returns (scale, good_steps): after an overflow half the scale, and 0; after a good step one
    more, or, where that makes `interval` of them, twice the scale, and 0 again.
    """
    if overflow:
        return scale / 2, 0
    if good_steps + 1 == interval:
        return scale * 2, 0
    return scale, good_steps + 1


def step_or_skip(
    parameters: torch.Tensor, gradients: torch.Tensor, scale: float, lr: float, group=None
) -> bool:
    """One step of SGD on this rank's shard, made by all ranks or by none.

    parameters: (k,), this rank's shard, in place; k differs from rank to rank, and may be 0.
    gradients: (k,), those of the loss times `scale`; they stay as they are. Where a gradient is
    infinite or not a number, on whichever rank, no rank changes anything; else parameters becomes
    parameters - lr * (gradients / scale).
    Returns whether the step was made, the same on every rank.
    Sends: one dist.all_reduce of a single number; nothing else.
    """
    bad = torch.tensor([0.0 if gradients.isfinite().all() else 1.0])
    dist.all_reduce(bad, dist.ReduceOp.MAX, group=group)
    if bad.item():
        return False
    parameters -= lr * (gradients / scale)
    return True


def unscale_and_clip(gradients: list, scale: float, max_norm: float) -> float:
    """Undo the loss scale, then clip to a norm.

    gradients: tensors of any shapes, those of the loss times `scale`; in place. Afterwards they are
    the gradients of the loss, all multiplied by max_norm / norm where their norm, taken over all of
    them together, is above max_norm.
    Returns that norm, of the unscaled gradients before clipping, as a Python number.
    """
    norm = sum((g / scale).square().sum().item() for g in gradients) ** 0.5
    for g in gradients:
        g.mul_(min(1.0, max_norm / max(norm, 1e-300)) / scale)
    return norm


def shares_by_speed(rows: int, speeds: list) -> list:
    """How many rows of a batch each rank gets, so that the last one to finish finishes as early as
    can be.

    speeds: rows per second of each rank, all above 0. Returns a list of ints, one a rank, 0 or
    more, that add up to `rows`: no other such list has a smaller max(share / speed).
    """
    shares = [0] * len(speeds)
    for _ in range(rows):  # each row to whoever would be done first with it
        first = min(range(len(speeds)), key=lambda r: (shares[r] + 1) / speeds[r])
        shares[first] += 1
    return shares


def mean_by_rows(gradient: torch.Tensor, rows: int, group=None) -> torch.Tensor:
    """The gradient of the mean loss over all rows of all ranks.

    gradient: (d,), that of the mean loss over this rank's rows; it stays as it is. rows: how many
    these are; they differ from rank to rank. A rank may have 0: what its gradient holds, NaN say,
    does not count.
    Returns (d,), the same on every rank: what one process with all rows would have.
    Sends: one dist.all_reduce of d numbers and one of a single number, or one of d + 1 numbers;
    nothing else.
    """
    total = gradient * rows if rows else torch.zeros_like(gradient)
    many = torch.tensor([float(rows)], dtype=torch.float64)
    dist.all_reduce(total, group=group)
    dist.all_reduce(many, group=group)
    return total / many.item()


def mean_without_late(
    gradient: torch.Tensor, rows: int, late: bool, group=None
) -> tuple[torch.Tensor, int]:
    """The gradient of the mean loss over the rows of those ranks that were in time, and how many
    rows that are.

    gradient: (d,), that of the *sum* of the loss over `rows` rows, added up over this rank's micro-
    batches; it stays as it is. late: whether this rank is one that is dropped; its gradient is then
    of the rows that it got through. A rank knows only about itself; at least one is in time, with
    at least one row.
    Returns (mean, (d,); rows, an int), both the same on every rank, on late ones too.
    Sends: one dist.all_reduce of d numbers and one of a single number, or one of d + 1 numbers;
    nothing else.
    """
    total = torch.zeros_like(gradient) if late else gradient.clone()
    many = torch.tensor([0 if late else rows])
    dist.all_reduce(total, group=group)
    dist.all_reduce(many, group=group)
    return total / many.item(), int(many.item())
