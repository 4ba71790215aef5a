"""Reference solutions of lesson 03. Their signatures and docstrings are the blanks of the notebook."""

import torch
import torch.distributed as dist


def column_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    """This rank's output features of a linear layer: the column-parallel forward.

    x: (..., in), the same on every rank.
    weight: (out, in) and bias: (out) or None: the whole layer's, the same on every rank. Pick this
    rank's part as torch.tensor_split cuts the output features (10 on 4 ranks: 3, 3, 2, 2).
    Returns (..., own out), and computes only that: the other ranks do the rest.
    What is given is not changed. Autograd finds the way back to x, weight and bias. Sends: nothing.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    y = x @ weight.tensor_split(n)[rank].T
    return y if bias is None else y + bias.tensor_split(n)[rank]


def row_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group=None):
    """A linear layer of whose input features each rank has a part: the row-parallel forward.

    x: (..., own in), this rank's input features. weight: (out, own in), this rank's columns.
    bias: (out), whole and the same on every rank, or None.
    group: the ranks that share the layer; None means all of them.
    Returns (..., out), the same on every rank of the group: what the whole layer gives for the
    whole input. What is given is not changed.
    Backward, every rank of the group comes back with the same gradient; x, weight and bias get
    theirs as in the whole layer.
    Sends: one dist.all_reduce of the output; nothing backward.
    """

    class ReduceFromGroup(torch.autograd.Function):  # g
        @staticmethod
        def forward(ctx, y):
            total = y.clone()
            dist.all_reduce(total, group=group)
            return total

        @staticmethod
        def backward(ctx, grad):
            return grad

    y = ReduceFromGroup.apply(x @ weight.T)
    return y if bias is None else y + bias


def my_copy_to_group(x: torch.Tensor, group=None) -> torch.Tensor:
    """f, in front of a column-parallel layer: nothing forward, the sum of gradients backward.

    x: floating point, the same on every rank. It may have other uses, and it may need no gradient.
    group: the ranks that share the layer; None means all of them.
    Returns a tensor with the values of x. When autograd comes back with a gradient of it, the sum
    of all ranks' gradients goes on to x. The gradient that came in is not changed: autograd may
    have handed it to others, too.
    Sends: nothing forward; one dist.all_reduce of the gradient backward.
    """

    class CopyToGroup(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            total = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=group)
            return total

    return CopyToGroup.apply(x)


def my_gather_from_group(x: torch.Tensor, group=None) -> torch.Tensor:
    """The ranks' output features side by side, for ranks that all go on to the same work.

    x: (..., own), floating point, the same shape on every rank.
    group: the ranks that share the layer; None means all of them.
    Returns (..., n * own) for a group of n ranks: rank 0's features, then rank 1's, and so on.
    Backward, every rank of the group comes back with the whole gradient, all with the same one:
    this rank's slice of it goes on to x.
    Sends: one dist.all_gather of x forward; nothing backward.
    """
    n = dist.get_world_size(group)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(n)]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    parts[dist.get_rank(group)] = x  # the only part that autograd knows: its gradient is its slice
    return torch.cat(parts, -1)


def order_bytes(order: str, tokens: int, width: int, hidden: int, n: int) -> float:
    """Bytes that each of n ranks sends in one training step of an MLP width → hidden → width.

    order: how its two layers are split, "column, row", "row, column", "column, column" or
    "row, row". Numbers are float32, 4 bytes; n divides all sizes.
    The input and the result, tokens × width, are whole on every rank; the input needs a gradient.
    A column-parallel layer needs its whole input, a row-parallel one its part, which a rank cuts
    for nothing. What is in parts and needed whole (an output, a gradient) is gathered: S bytes
    cost (n - 1)/n * S. What is a summand on each rank is all-reduced: S bytes cost
    2(n - 1)/n * S.
    """
    wide, narrow = 4 * tokens * hidden, 4 * tokens * width
    halves = {  # of an all-reduce, forward + backward
        "column, row": (2 + 2) * narrow,
        "row, column": (2 + 2) * wide + (1 + 1) * narrow,
        "column, column": (1 + 2) * wide + (1 + 2) * narrow,
        "row, row": (2 + 1) * wide + (2 + 1) * narrow,
    }
    return (n - 1) / n * halves[order]
