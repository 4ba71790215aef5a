"""Batches: a tensor, or tensors in tuples, lists and dicts, with their rows along the first dimension.

Other objects and tensors without dimensions may be in them; they have no rows.
"""

import torch


def tensors_in(batch):
    if isinstance(batch, torch.Tensor):
        return [batch] if batch.dim() else []
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else []
    return [t for part in parts for t in tensors_in(part)]


def rows_of(batch):
    tensors = tensors_in(batch)
    if not tensors:
        raise ValueError(f"join needs batches with tensors in them, not {type(batch).__name__}")
    return len(tensors[0])


def without_rows(batch):
    if isinstance(batch, torch.Tensor):
        return batch[:0] if batch.dim() else batch
    if isinstance(batch, dict):
        return {key: without_rows(part) for key, part in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = map(without_rows, batch)
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
