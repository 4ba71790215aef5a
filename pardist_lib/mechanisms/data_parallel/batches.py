"""Batches of unequal length: some ranks have more rows than others, some run out before the others.

A batch is a tensor, or tensors in tuples, lists and dicts, with their rows along the first dimension. Other objects
and tensors without dimensions may be in it; they have no rows.
"""

import torch
import torch.distributed as dist


class UnevenBatches:
    """The part of `DataParallel` that makes the mean over ranks the mean over rows. Uses its n, group and buckets."""

    _joining = False

    def weight(self, rows):
        """By what to multiply the mean loss of this rank's `rows` rows, so that the ranks' mean is that of all rows.

        That is n·rows / (rows of all ranks); 1 where all have as many. Called on every rank; all-reduces 8 bytes.
        Where rows have weights (cross_entropy's `weight`), `rows` is the sum of theirs.
        """
        if not (rows := float(rows)) >= 0:
            raise ValueError(f"rows is how many rows this rank has, 0 or more, not {rows:g}")
        total = self._sum(rows)
        return self.n * rows / total if total else 0.0

    def join(self, batches):
        """`for batch, weight in model.join(batches)`: as many steps on every rank, however many batches each has.

        A rank that has run out gets batches without rows and the weight 0, and goes on with the others' forward and
        backward, so that all make the same calls (SyncBatchNorm's too); the module has to take zero rows. Multiply
        the mean loss by the weight (see `weight`). batch: a tensor, or tensors in tuples, lists and dicts, rows first.
        All-reduces 8 bytes a step and 8 at the start. Raises ValueError on all ranks where one has no batch at all.
        """
        batches = iter(batches)
        batch = next(batches, None)
        if without := int(self._sum(batch is None)):
            raise ValueError(f"{without} of {self.n} ranks have no batch at all: there are fewer rows than ranks?")
        empty = without_rows(batch)
        self._joining = True
        try:
            while total := self._sum(rows := rows_of(batch)):
                yield batch, self.n * rows / total
                batch = next(batches, empty)
        finally:
            self._joining = False

    def _sum(self, number):
        total = self.buckets[0].flat.new_tensor(number, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.item()


def tensors_with_rows(batch):
    """Every tensor of the batch that has a first dimension, in order."""
    if isinstance(batch, torch.Tensor):
        return [batch] if batch.dim() else []
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else []
    return [t for part in parts for t in tensors_with_rows(part)]


def rows_of(batch):
    tensors = tensors_with_rows(batch)
    if not tensors:
        raise ValueError(f"join needs batches with tensors in them, not {type(batch).__name__}")
    return len(tensors[0])


def without_rows(batch):
    """The same batch with no rows in its tensors; it keeps nothing of their memory."""
    if isinstance(batch, torch.Tensor):
        return batch[:0].clone() if batch.dim() else batch
    if isinstance(batch, dict):
        return {key: without_rows(part) for key, part in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = map(without_rows, batch)
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
