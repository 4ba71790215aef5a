"""Data parallelism: every rank has the whole model and a part of the batch, and the gradients are averaged."""

from .bucketed import BucketedDataParallel, naive_average
from .samplers import ExactDistributedSampler
from .sync_batch_norm import SyncBatchNorm
from .wrapper import DataParallel, all_reduce_hook

__all__ = [
    "BucketedDataParallel",
    "DataParallel",
    "ExactDistributedSampler",
    "SyncBatchNorm",
    "all_reduce_hook",
    "naive_average",
]
