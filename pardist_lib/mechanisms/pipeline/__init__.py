"""Pipeline parallelism: a model's layers as stages on several ranks, a batch as micro-batches in a row."""

from .action import Action
from .pipeline import Pipeline
from .schedule import Schedule
from .schedules import gpipe, interleaved, one_f_one_b, zbv, zero_bubble

__all__ = ["Action", "Pipeline", "Schedule", "gpipe", "interleaved", "one_f_one_b", "zbv", "zero_bubble"]
