"""Tensor parallelism: one operation over several ranks, each with a part of its operands."""

from .attention import Attention, ParallelAttention
from .conv import ParallelConv2d
from .linear import ColumnParallelLinear, ParallelMLP, RowParallelLinear
from .on_part import OnPart, random_per_rank, replicated
from .parallelize import STYLES, full_gradients, full_state_dict, parallelize
from .sequence import SequenceParallelLayerNorm, SequenceParallelRMSNorm, parallel_norm
from .splitting import clip_grad_norm_
from .transformer import ParallelTransformerBlock, TransformerBlock
from .vocabulary import VocabParallelEmbedding, vocab_parallel_cross_entropy

__all__ = [
    "Attention", "ColumnParallelLinear", "OnPart", "ParallelAttention", "ParallelConv2d", "ParallelMLP",
    "ParallelTransformerBlock", "RowParallelLinear", "STYLES", "SequenceParallelLayerNorm", "SequenceParallelRMSNorm",
    "TransformerBlock", "VocabParallelEmbedding", "clip_grad_norm_", "full_gradients", "full_state_dict",
    "parallel_norm", "parallelize", "random_per_rank", "replicated", "vocab_parallel_cross_entropy",
]  # fmt: skip
