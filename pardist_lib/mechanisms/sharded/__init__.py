"""ZeRO: the optimizer's state, the gradients and at last the parameters sharded over the ranks of data parallelism."""

from .module import ShardedDataParallel
from .optimizer import ShardedOptimizer

__all__ = ["ShardedDataParallel", "ShardedOptimizer"]
