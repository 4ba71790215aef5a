"""Reference solutions of lesson 03. Their signatures and docstrings are the blanks of the notebook."""

import torch
import torch.distributed as dist


def column_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """This rank's output features of a linear layer that is split over all ranks: the column-parallel forward.

    x: (..., in), the same on every rank. weight: (out, in) and bias: (out) or None, of the whole layer, the same on
    every rank: pick this rank's part, as torch.tensor_split cuts the output features (10 on 4 ranks: 3, 3, 2, 2).
    Returns (..., own out). Computes only that: the other ranks do the rest. Nothing that is given is changed.
    Sends: nothing.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    y = x @ weight.tensor_split(n)[rank].T
    return y if bias is None else y + bias.tensor_split(n)[rank]


def row_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group=None) -> torch.Tensor:
    """The output of a linear layer of whose input features each rank has a part: the row-parallel forward.

    x: (..., own in), this rank's input features. weight: (out, own in), this rank's columns. bias: (out), whole and
    the same on every rank, or None. group: the ranks that share the layer; None means all of them.
    Returns (..., out), the same on every rank of the group: what the whole layer gives for the whole input.
    Nothing that is given is changed.
    Sends: one dist.all_reduce of the output; nothing else.
    """
    y = x @ weight.T
    dist.all_reduce(y, group=group)
    return y if bias is None else y + bias


def my_copy_to_group(x: torch.Tensor, group=None) -> torch.Tensor:
    """f: in front of a column-parallel layer. Forward it does nothing, backward it adds up the ranks' gradients.

    x: floating point, the same on every rank. It may be used elsewhere too, and it may need no gradient.
    group: the ranks that share the layer; None means all of them.
    Returns a tensor with the values of x. When autograd comes back with a gradient of it, what goes on to x is the sum
    of all ranks' gradients. The gradient that came in is not changed: autograd may have handed it to others, too.
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
    """Put the ranks' output features together, for ranks that all go on to the same work with the whole of them.

    x: (..., own), floating point, the same shape on every rank. group: the ranks that share the layer; None means all.
    Returns (..., n · own), n ranks in the group: rank 0's features, then rank 1's, and so on, on every rank.
    Backward, every rank of the group comes back with the whole gradient, and all with the same one: this rank's slice
    of it goes on to x.
    Sends: one dist.all_gather of x forward; nothing backward.
    """
    n = dist.get_world_size(group)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(n)]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    parts[dist.get_rank(group)] = x  # the only part that autograd knows: its gradient is its slice
    return torch.cat(parts, -1)


def order_bytes(order: str, tokens: int, width: int, hidden: int, n: int) -> float:
    """How many bytes each of n ranks sends in one training step of an MLP width → hidden → width, split in this order.

    order: "column, row", "row, column", "column, column" or "row, row". float32, 4 bytes a number; n divides all sizes.
    The input and the result are whole on every rank, tokens × width, and the input needs a gradient.
    A column-parallel layer needs its whole input, a row-parallel layer its part (a rank cuts what it has for nothing).
    What is in parts but needed whole, an output or a gradient, is gathered: S bytes cost (n - 1)/n · S.
    What is a summand on each rank is all-reduced: S bytes cost 2(n - 1)/n · S.
    """
    wide, narrow = 4 * tokens * hidden, 4 * tokens * width
    halves = {  # of an all-reduce, forward + backward
        "column, row": (2 + 2) * narrow,
        "row, column": (2 + 2) * wide + (1 + 1) * narrow,
        "column, column": (1 + 2) * wide + (1 + 2) * narrow,
        "row, row": (2 + 1) * wide + (2 + 1) * narrow,
    }
    return (n - 1) / n * halves[order]
