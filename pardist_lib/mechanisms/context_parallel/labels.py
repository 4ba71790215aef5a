"""What a language model needs beside attention when its sequence is dealt out: labels, and a mean over all tokens.

    labels = deal(next_tokens(tokens))   # shifted first, then dealt: a share's last token is followed by another rank's
    logits = model(deal(tokens))         # with own_positions(…) for its position embeddings
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    mean_over_tokens(losses, labels.flatten() != -100).backward()

Every rank then has a *part* of each weight's gradient, that of its own tokens: to be added up, not averaged.
"""

import torch

from ..collectives.autograd import reduce_from_group
from ..group import rank_and_size
from .checks import check_documents, check_group


def next_tokens(tokens, documents=None, ignore_index=-100):
    """The label of each token of the whole sequence: the token after it.

    tokens: (batch, s), the whole sequence, not a rank's part: there the last token's label is on another rank, and
    inside a zigzag share two tokens that stand side by side are no neighbours. documents: (s) or (batch, s), as for
    `ring_attention`. Returns (batch, s), with ignore_index for the last token of the sequence and of each document.
    Raises ValueError where documents do not fit.
    """
    if tokens.dim() != 2:
        raise ValueError(f"next_tokens: tokens are (batch, s), the whole sequence, not of shape {list(tokens.shape)}")
    labels = torch.full_like(tokens, ignore_index)
    labels[:, :-1] = tokens[:, 1:]
    documents = check_documents(documents, tokens.size(1), tokens, "next_tokens")
    if documents is not None:
        documents = documents.expand_as(tokens)
        labels[:, :-1][documents[:, 1:] != documents[:, :-1]] = ignore_index
    return labels


def mean_over_tokens(losses, counted=None, group=None):
    """The mean loss over the tokens that count, of all ranks together; on every rank the same.

    losses: this rank's, one for each of its tokens, of any shape, also none; counted: bool of the same shape, None for
    all. A mean of the ranks' means would be wrong: of some, more tokens count than of others. NaN where none counts, as
    with torch's cross_entropy. Backward gives each rank its own tokens' part: gradients of weights that all ranks have
    are summands.
    Sends one all-reduce of two numbers forward, nothing backward.
    Raises ValueError where the shapes differ.
    """
    check_group(group, "mean_over_tokens")
    if counted is None:
        counted = torch.ones_like(losses, dtype=torch.bool)
    if counted.shape != losses.shape or counted.dtype != torch.bool:
        raise ValueError(
            f"mean_over_tokens, rank {rank_and_size(group)[0]}: counted has to be bool of the losses' shape "
            f"{list(losses.shape)}, not {counted.dtype} {list(counted.shape)}"
        )
    total = torch.where(counted, losses, 0).sum()
    return reduce_from_group(total, group) / reduce_from_group(counted.sum(), group)
