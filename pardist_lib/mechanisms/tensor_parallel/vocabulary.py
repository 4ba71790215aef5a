"""Embedding and cross-entropy over a vocabulary that is split: no rank ever holds a whole row of logits.

A vocabulary of V is cut along the ranks as torch.tensor_split cuts it (50,257 words on 4 ranks: 12,565 and three times
12,564; Megatron adds words that do not exist, until the ranks divide V). Rank r owns the rows of the embedding table
for its words, and, where the output layer is a ColumnParallelLinear, the logits of its words.

n: ranks of the group. A group of one rank sends nothing.
Sources: Shoeybi et al., "Megatron-LM" (2019), section 3; Szegedy et al. (2016), section 7, for label smoothing.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..collectives.autograd import gathered, reduce_from_group, reduce_scatter_to_group
from ..group import rank_and_size, split_sizes
from .checks import check_group, check_plain, check_targets, check_words
from .splitting import SplitModule, first_ranks_part, parameter


def vocabulary_range(vocabulary, group=None):
    """(first, after the last) of the words that this rank owns, of `vocabulary` many."""
    rank, n = rank_and_size(group)
    sizes = split_sizes(vocabulary, n)
    return sum(sizes[:rank]), sum(sizes[: rank + 1])


class VocabParallelEmbedding(SplitModule):
    """nn.Embedding with its rows split over the ranks of a group.

    weight: (rows of this rank, embedding_dim). Weights start as rank 0's nn.Embedding would: every rank draws that
    whole table and gets its rows of the first rank's.

    sequence_dim: where the result is to be split along a dimension of the tokens (sequence parallelism), that
    dimension; None: every rank gets the whole result.
    """

    split_dim = 0  # of the weight, as in ColumnParallelLinear: the two can share one

    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        *,
        padding_idx=None,
        sequence_dim=None,
        group=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        whole = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._split(whole, sequence_dim, group)

    @classmethod
    def from_module(cls, module, group=None, *, sequence_dim=None):
        """Split the table of the group's first rank's nn.Embedding, exactly; dtype, device, requires_grad stay.

        Raises ValueError for any other module and for options that do not split: max_norm, scale_grad_by_freq, sparse.
        """
        check_plain(module, [nn.Embedding], cls.__name__)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if value := getattr(module, option):
                raise ValueError(f"an nn.Embedding with {option}={value} does not split: build it without {option}")
        split = cls.__new__(cls)
        nn.Module.__init__(split)
        split._split(module, sequence_dim, group)
        return split.train(module.training)

    def _split(self, whole, sequence_dim, group):
        check_group(group, type(self).__name__)
        self.num_embeddings, self.embedding_dim = whole.num_embeddings, whole.embedding_dim
        self.padding_idx = whole.padding_idx
        self.sequence_dim, self.group = sequence_dim, group
        self.first, self.end = vocabulary_range(self.num_embeddings, group)
        self.weight = parameter(first_ranks_part(whole.weight, 0, group), whole.weight)

    def to_module(self):
        """The whole nn.Embedding, exactly, on every rank: one all-gather of the table."""
        sizes = split_sizes(self.num_embeddings, rank_and_size(self.group)[1])
        table = gathered(self.weight.detach(), 0, sizes, self.group)
        whole = nn.Embedding.from_pretrained(table, padding_idx=self.padding_idx)
        whole.weight = parameter(table, self.weight)
        return whole.train(self.training)

    def rows(self):
        """The words that this rank owns, as text: '12565–25128'."""
        return f"{self.first}–{self.end - 1}" if self.end > self.first else "none"

    def forward(self, tokens):
        """tokens: integers of any shape, the same on every rank -> (*tokens.shape, embedding_dim), on every rank.

        A word's row is on one rank; the others add zeros. Sends one all-reduce of the result forward, nothing
        backward; with sequence_dim one reduce-scatter forward, one all-gather backward.
        Raises TypeError for tokens that are no whole numbers, IndexError for one outside the vocabulary.
        """
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"tokens are whole numbers, not {tokens.dtype}")
        tokens = tokens.long()  # uint8 would wrap round below
        check_words(tokens, self.num_embeddings, "token")
        theirs = (tokens < self.first) | (tokens >= self.end)
        if self.end > self.first:
            local = (tokens - self.first).masked_fill(theirs, 0)
            padding = self.padding_idx
            padding = padding - self.first if padding is not None and self.first <= padding < self.end else None
            part = F.embedding(local, self.weight, padding).masked_fill(theirs.unsqueeze(-1), 0)
        else:  # more ranks than words: this one has none
            part = self.weight.new_zeros(*tokens.shape, self.embedding_dim) + self.weight.sum()
        if self.sequence_dim is None:
            return reduce_from_group(part, self.group)
        return reduce_scatter_to_group(part, self.sequence_dim, self.group)

    def extra_repr(self):
        return f"{self.num_embeddings}, {self.embedding_dim}, rows {self.rows()}"


# ---- cross-entropy --------------------------------------------------------------------------------------------


def vocab_parallel_cross_entropy(
    logits, target, group=None, reduction="mean", ignore_index=-100, label_smoothing=0.0, *, vocab_size=None
):
    """F.cross_entropy of logits whose vocabulary is split over the ranks; the logits are never gathered.

    logits: (..., this rank's words), floating point: the vocabulary is the last dimension, and a rank has the part
    of it that torch.tensor_split cuts. target: (...) whole numbers 0 to V − 1, or ignore_index; the same on every
    rank. reduction: "mean" (over the targets that are not ignored), "sum" or "none". vocab_size: V. Without it the
    ranks tell each other how many words they have.

    Returns the loss, the same on every rank. The gradient stays where its logits are. Sums are kept in float32 where
    the logits are 16 bits wide. Logits may be large: the greatest one is taken off before exp.

    Sends forward three all-reduces of one number per target (4 bytes, 8 for float64): the greatest logit, the sum of
    exp, the target's logit. Label smoothing, whose mean over all logits is added to the last number, sends not a
    byte more. Without vocab_size the first one has n numbers more. Backward sends nothing: each rank has all that
    its own gradient needs. Memory: the logits themselves are kept, and two numbers a target; no softmax.

    Raises TypeError for logits that are no floating point or targets that are no whole numbers, IndexError for a
    target outside the vocabulary, ValueError for sizes that do not fit and unknown reductions.
    """
    check_targets(logits, target, reduction, label_smoothing)
    target = target.long()  # uint8 would wrap round where a rank's first word is taken off
    losses = _CrossEntropy.apply(logits, target, group, ignore_index, label_smoothing, vocab_size)
    if reduction == "mean":
        losses = losses.sum() / (target != ignore_index).sum()
    losses = losses.sum() if reduction == "sum" else losses
    return losses if torch.is_autocast_enabled(logits.device.type) else losses.to(logits.dtype)  # as torch's does


class _CrossEntropy(torch.autograd.Function):
    """Losses of all targets. With m the greatest logit of a row and z = x − m:

    loss = log Σ exp(z) − (1 − ε)·z[target] − ε·mean(z)
    gradient of x[j] = softmax(x)[j] − (1 − ε)·(j is the target) − ε/V
    """

    @staticmethod
    def forward(ctx, logits, target, group, ignore_index, smoothing, vocab_size):
        wide = torch.promote_types(logits.dtype, torch.float32)
        own = logits.shape[-1]
        greatest = logits.amax(-1).to(wide) if own else logits.new_full(target.shape, -torch.inf, dtype=wide)
        greatest, sizes = _greatest(greatest, own, vocab_size, group)
        vocabulary, first = sum(sizes), sum(sizes[: rank_and_size(group)[0]])
        ignored = target == ignore_index
        check_words(target.masked_fill(ignored, 0), vocabulary, "target")

        z = logits.to(wide) - greatest.unsqueeze(-1)  # the one temporary of the logits' size
        local = target - first
        mine = (local >= 0) & (local < own) & ~ignored
        local = local.masked_fill(~mine, 0).unsqueeze(-1)
        wanted = z.gather(-1, local).squeeze(-1) * (1 - smoothing) if own else torch.zeros_like(greatest)
        wanted = wanted.masked_fill(~mine, 0)
        if smoothing:
            wanted += z.sum(-1) * (smoothing / vocabulary)
        total = _all_reduce(z.exp_().sum(-1), group)
        wanted = _all_reduce(wanted, group)

        # what backward needs: log Σ exp(x), so that softmax(x) = exp(x − that)
        ctx.save_for_backward(logits, total.log() + greatest, local, mine, ignored)
        ctx.smoothing, ctx.vocabulary = smoothing, vocabulary
        return (total.log() - wanted).masked_fill(ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, log_total, local, mine, ignored = ctx.saved_tensors
        grad = grad.masked_fill(ignored, 0).unsqueeze(-1)
        result = logits.to(grad.dtype) - log_total.unsqueeze(-1)
        result.exp_()
        if ctx.smoothing:
            result -= ctx.smoothing / ctx.vocabulary
        if result.shape[-1]:
            result.scatter_add_(-1, local, mine.unsqueeze(-1) * result.new_tensor(ctx.smoothing - 1))
        return result.mul_(grad).to(logits.dtype), None, None, None, None, None


def _greatest(greatest, own, vocab_size, group):
    """(the greatest logit of every row over all ranks, how many words each rank has)"""
    rank, n = rank_and_size(group)
    if vocab_size is not None:
        sizes = split_sizes(vocab_size, n)
        if sizes[rank] != own:
            raise ValueError(
                f"rank {rank} has logits for {own} words, but of a vocabulary of {vocab_size} split over {n} ranks it "
                f"owns {sizes[rank]}"
            )
        return _all_reduce(greatest, group, dist.ReduceOp.MAX), sizes
    if n == 1:
        return greatest, [own]
    told = greatest.new_zeros(n, dtype=greatest.dtype)  # every rank's number of words travels along
    told[rank] = own
    together = _all_reduce(torch.cat([greatest.flatten(), told]), group, dist.ReduceOp.MAX)
    return together[:-n].view(greatest.shape), [int(size) for size in together[-n:].tolist()]


def _all_reduce(x, group, op=dist.ReduceOp.SUM):
    if rank_and_size(group)[1] > 1:
        x = x.contiguous()
        dist.all_reduce(x, op, group)
    return x
