"""Which keys a query sees, by positions in the whole sequence: causality, a mask of one's own, packed documents."""

import torch

from .checks import check_documents, check_visible
from .order import places, tokens

ROWS = 128  # queries at a time: scores of ROWS · keys are all that is ever there of the square matrix


class Visible:
    """A query sees a key where all that are given say so.

    causal: the key is no later. mask: a function of positions, (r, 1) and (1, keys), to bool, (r, keys).
    documents: (s) or (batch, s), each token's document: the key is of the same one.
    """

    def __init__(self, causal, mask=None, documents=None):
        self.causal, self.mask, self.documents = causal, mask, documents

    @classmethod
    def checked(cls, causal, mask, documents, length, q, here):
        """One for a sequence of `length` tokens, on q's device. Raises ValueError, saying where, for documents that do
        not fit and for a mask's answer that is none; now, for in the middle of a ring others would wait in vain."""
        visible = cls(causal, mask, check_documents(documents, length, q, here))
        at = torch.arange(min(length, 3), device=q.device)
        if mask is not None:
            check_visible(mask(at[:2, None], at[None]), len(at[:2]), len(at), here)
        return visible

    @property
    def depends_on_more(self):
        """Whether more than causality decides."""
        return self.mask is not None or self.documents is not None

    def blocks(self, queries, keys, device):
        """Yield (rows, upto, visible): a slice of at most ROWS queries; a slice of the keys, for those behind it are
        too late for all of these; visible: bool, (r, keys) or (batch, r, keys), None where all are.

        queries, keys: two ranks' shares. With both orders a share's positions ascend, and a block keeps within one run
        of them: so what causality leaves out is left out here, not computed and masked.
        """
        first, positions = 0, None
        for run in queries:
            for start in range(run.start, run.stop, ROWS):
                block = range(start, min(start + ROWS, run.stop))
                count = sum(len(range(k.start, min(k.stop, block.stop))) for k in keys) if self.causal else tokens(keys)
                if count:
                    visible = None
                    if self.depends_on_more or self.causal and _last(keys, count) > block.start:
                        positions = places(keys, device) if positions is None else positions
                        visible = self.between(torch.arange(start, block.stop, device=device), positions[:count])
                    yield slice(first, first + len(block)), slice(count), visible
                first += len(block)

    def between(self, q, k):
        """bool, (queries, keys) or (batch, queries, keys), of positions q: (queries) and k: (keys)."""
        visible = q[:, None] >= k if self.causal else torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
        if self.mask is not None:
            visible = visible & self.mask(q[:, None], k[None])
        if self.documents is not None:
            visible = visible & (self.documents[..., q, None] == self.documents[..., None, k])
        return visible


def _last(keys, count):
    """The position of the last one of the first `count` keys."""
    for run in keys:
        if count <= len(run):
            return run[count - 1]
        count -= len(run)
