"""Reference solutions of lesson 04. Their signatures and docstrings are the blanks of the notebook."""

import torch
import torch.distributed as dist


def heads_of_rank(
    num_heads: int,
    num_kv_heads: int,
    rank: int,
    world_size: int,
) -> tuple[range, range]:
    """Which heads of an attention layer one rank computes.

    num_heads: heads of queries; every rank takes equally many, rank 0 the first ones.
    num_kv_heads: heads of keys and values, by which num_heads can be divided: query heads share
    them in groups, the first num_heads / num_kv_heads query heads use key-value head 0, and so on.
    Returns (query heads, key-value heads): two ranges. The second has every key-value head that the
    rank's query heads use, and no other.
    Raises ValueError where the query heads cannot be shared out equally.
    """
    if num_heads % world_size:
        raise ValueError(f"{num_heads} heads do not split over {world_size} ranks")
    each, group = num_heads // world_size, num_heads // num_kv_heads
    queries = range(rank * each, (rank + 1) * each)
    return queries, range(queries[0] // group, queries[-1] // group + 1)


def split_embedding(
    tokens: torch.Tensor, rows: torch.Tensor, vocabulary: int, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """An embedding whose table is split by rows, forward and backward.

    tokens: whole numbers 0 to vocabulary - 1, any shape, the same on every rank.
    rows: (words of this rank, width). The table is cut as torch.tensor_split cuts: 10 words on 4
    ranks are 0-2, 3-5, 6-7 and 8-9.
    grad: (*tokens.shape, width), the gradient of the result, the same on every rank.
    Returns (result, gradient of rows): result is (*tokens.shape, width), the row of each token, on
    every rank; the gradient has the shape of rows. Nothing that was given is changed.
    Sends: one dist.all_reduce of the result; nothing else.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    words = torch.arange(vocabulary).tensor_split(n)[rank]
    first = int(words[0])
    mine = (tokens >= first) & (tokens < first + len(rows))
    local = (tokens - first)[mine]  # the places, among my rows, of the tokens that are mine

    result = rows.new_zeros(*tokens.shape, rows.size(1))
    result[mine] = rows[local]
    dist.all_reduce(result)  # all but one rank add zeros

    gradient = torch.zeros_like(rows)
    gradient.index_add_(0, local, grad[mine])  # a word may come twice
    return result, gradient


def split_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy of logits whose vocabulary is split, and its gradient.

    logits: (tokens, words of this rank), cut along the vocabulary as torch.tensor_split cuts; any
    size, also 1000s.
    target: (tokens,) whole numbers 0 to vocabulary - 1, the same on every rank.
    Returns (loss, gradient): the mean over the tokens of -log softmax(all logits)[target], a
    number, the same on every rank; and its gradient by this rank's logits. Nothing that was given
    is changed.
    Sends: dist.all_reduce only, of three numbers a token in all.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    first = int(torch.arange(vocabulary).tensor_split(n)[rank][0])
    mine = (target >= first) & (target < first + logits.size(1))
    local = (target - first)[mine]

    greatest = logits.amax(1)
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    shifted = logits - greatest[:, None]  # at most 0: exp cannot overflow
    total = shifted.exp().sum(1)
    dist.all_reduce(total)
    wanted = torch.zeros_like(total)
    wanted[mine] = shifted[mine, local]
    dist.all_reduce(wanted)

    gradient = shifted.exp() / total[:, None]  # softmax
    gradient[mine, local] -= 1
    return (total.log() - wanted).mean(), gradient / len(target)


def sequence_parallel_mlp(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """relu(X @ up.T) @ down.T, features split inside, positions outside, forward and backward.

    X is the whole input; rank r has the r-th of n equal parts of its positions, and of the hidden
    features.
    x: (this rank's positions, width). up: (this rank's hidden features, width).
    down: (width, this rank's hidden features).
    grad: (this rank's positions, width), the gradient of this rank's y.
    Returns (y, gradient of x, gradient of up, gradient of down): y is (this rank's positions,
    width), the gradients have the shapes of what they belong to; relu's is 0 where its input is 0.
    Nothing that was given is changed.
    Sends: as many bytes as two all-reduces of X, but no all_reduce: dist.all_gather and
    dist.reduce_scatter (or those of whole tensors, all_gather_into_tensor and
    reduce_scatter_tensor), each once forward and once backward.
    """
    n = dist.get_world_size()

    def gather(part):
        parts = [torch.empty_like(part) for _ in range(n)]
        dist.all_gather(parts, part)
        return torch.cat(parts)

    def sum_and_scatter(whole):
        mine = torch.empty_like(x)
        dist.reduce_scatter(mine, [part.contiguous() for part in whole.chunk(n)])
        return mine

    whole_x = gather(x)  # all positions
    hidden = (whole_x @ up.T).relu()  # all positions, my features
    y = sum_and_scatter(hidden @ down.T)  # my positions

    whole_grad = gather(grad)
    grad_hidden = (whole_grad @ down) * (hidden > 0)
    grad_x = sum_and_scatter(grad_hidden @ up)
    return y, grad_x, grad_hidden.T @ whole_x, whole_grad.T @ hidden
