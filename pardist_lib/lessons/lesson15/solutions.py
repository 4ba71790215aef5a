"""Reference solutions of lesson 15. Their signatures and docstrings are the blanks of the notebook."""

import torch
import torch.distributed as dist


def average_clients(updates: dict, rows: dict, group=None) -> torch.Tensor:
    """The mean of the updates of all clients on all ranks, each counting as much as it has rows.

    updates: {client: tensor of shape (d,)}, of the clients that this rank hosts, at least one.
    rows: {client: how many rows it has, at least 1}, of the same clients, in any order; a rank
    knows its own only. Both stay as they are.
    Returns Σ rows · update / Σ rows over all clients, (d,), the same on every rank.
    Sends: one dist.all_reduce of d numbers and one of a single number, or one of d + 1 numbers;
    nothing else.
    """
    total = sum(rows[client] * update for client, update in updates.items())  # (d,)
    many = torch.tensor([float(sum(rows.values()))], dtype=torch.float64)
    dist.all_reduce(total, group=group)
    dist.all_reduce(many, group=group)
    return total / many.item()


def fixed_point(values: torch.Tensor, clients: int, fraction_bits: int) -> torch.Tensor:
    """Real numbers as whole numbers modulo 2**32, so that they can be masked and added up.

    values: float64, any shape; it stays as it is. clients: how many such tensors will be added up.
    Returns int64, of the same shape, 0 to 2**32 - 1: round(value · 2**fraction_bits) modulo 2**32,
    so that -1 becomes 2**32 - 1.
    Raises ValueError where the sum over all clients might leave the range: where the whole number,
    without its sign, is larger than (2**31 - 1) // clients; and for what is not a number.
    """
    whole = (values * 2**fraction_bits).round()
    if not (whole.abs() <= (2**31 - 1) // clients).all():
        raise ValueError("a value is too large: the sum over all clients could wrap")
    return whole.to(torch.int64) % 2**32


def mask_vector(vector: torch.Tensor, me: int, own: torch.Tensor, pairs: dict) -> torch.Tensor:
    """What client `me` sends to the server in a secure aggregation.

    vector: int64, values 0 to 2**32 - 1. own: its own mask, like vector. pairs: {other client: the
    mask that the two have agreed on, like vector}; both of them hold the same mask. All of them
    stay as they are.
    Returns vector, plus the own mask, plus the pair masks with all clients of a higher number,
    minus those with all of a lower number: modulo 2**32, int64, 0 to 2**32 - 1.
    """
    total = vector + own
    for other, mask in pairs.items():
        total = total + mask if other > me else total - mask
    return total % 2**32


def unmask_sum(messages: dict, own: dict, pairs: dict) -> torch.Tensor:
    """The sum of the vectors that arrived, worked out by the server of a secure aggregation.

    messages: {client: masked vector}, of those that arrived, masked as by mask_vector.
    own: {client: own mask}, of the same clients, restored with the others' help.
    pairs: {client that fell silent: {client that arrived: the mask that the two had agreed on}},
    restored too; empty where nobody fell silent. All int64, all stay as they are.
    Returns the sum of the vectors without any mask, modulo 2**32, int64, 0 to 2**32 - 1.
    """
    total = sum(messages.values()) - sum(own.values())
    for gone, masks in pairs.items():
        for client, mask in masks.items():
            total = total - mask if gone > client else total + mask  # what the client had done, undone
    return total % 2**32


def clip_and_add(gradients: torch.Tensor, clip: float) -> torch.Tensor:
    """The sum of the gradients of single rows, none of which may be longer than clip.

    gradients: (b, d), row i is the gradient of sample i alone; it stays as it is. b may be 0.
    Returns (d,): Σ gradient · min(1, clip / norm), norm being the Euclidean length of that row's
    gradient. A gradient that is no longer than clip counts as it is, one that is zero as zero.
    """
    norms = gradients.norm(dim=1, keepdim=True)  # (b, 1)
    scale = (clip / norms.clamp(min=1e-30)).clamp(max=1)
    return (gradients * scale).sum(0)


def noisy_sum(
    total: torch.Tensor,
    clip: float,
    sigma: float,
    generator: torch.Generator,
    group=None,
) -> torch.Tensor:
    """The sum over the ranks, with Gaussian noise: every rank adds its share before it sends.

    total: (d,), this rank's sum of clipped gradients; it stays as it is. generator: this rank's
    own, another one on every rank; all noise is drawn from it.
    Returns (d,), the same on every rank: Σ total, plus noise that has the standard deviation
    sigma · clip in each coordinate, as a whole. No single rank's message may go out without its
    share: all shares are equally large.
    Sends: one dist.all_reduce of d numbers, nothing else.
    """
    share = sigma * clip / dist.get_world_size(group) ** 0.5  # variances add up
    result = total + share * torch.randn(total.shape, generator=generator, dtype=total.dtype)
    dist.all_reduce(result, group=group)
    return result


def rate_and_steps(rows: list, batch: float, epochs: int) -> tuple[float, int]:
    """What the accountant has to be told: how often a row takes part, and how many steps there are.

    rows: how many rows each rank has. batch: how many rows take part in one step on average, on all
    ranks together; all rows of all ranks take part with the same probability.
    Returns (the probability with which one row takes part in one step, the number of steps): as
    many steps as it takes for a row to have taken part at least `epochs` times on average, a whole
    number.
    """
    rate, steps = batch / sum(rows), 0
    while steps * rate < epochs - 1e-9:
        steps += 1
    return rate, steps
