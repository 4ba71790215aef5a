"""Data parallelism: every rank has the whole model and a part of the batch, and the gradients are averaged."""

from .samplers import ExactDistributedSampler
from .sync_batch_norm import SyncBatchNorm
from .wrapper import DataParallel, all_reduce_hook, naive_average

__all__ = ["DataParallel", "ExactDistributedSampler", "SyncBatchNorm", "all_reduce_hook", "naive_average"]
