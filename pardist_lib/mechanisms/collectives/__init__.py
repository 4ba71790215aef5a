"""Collectives from send and receive: what `torch.distributed` and NCCL do, in Python, one function each.

    point_to_point.py   messages between two ranks, of which all others are made
    buffers.py          tensors as messages need them
    rooted.py           those with a root: broadcast, reduce, gather, scatter, along a star, a tree, a chain
    ring.py             all-reduce, reduce-scatter and all-gather from neighbour to neighbour
    direct.py           reduce-scatter and all-gather in one round of all with all
    reductions.py       all-reduce, reduce-scatter and all-gather in other ways
    all_to_all.py       a chunk from every rank for every other one
    autograd.py         those that know their own backward
    agreement.py        the same model on every rank, the first one's values, sums of many tensors

Ways to do the same thing, with α seconds for a message, β bytes a second, S bytes of the whole tensor, n ranks:

                         time on one rank (arithmetic left out)      why
    naive                (n − 1)·(α + S/β) on the root, twice         easy to get right
    tree                 2·⌈log₂ n⌉·(α + S/β)                         few steps
    recursive doubling   log₂ n·(α + S/β)                             fewest steps: short tensors
    halving, doubling    2·log₂ n·α + 2·(n−1)/n·S/β                   few steps and few bytes, but far partners
    ring                 2·(n − 1)·α + 2·(n−1)/n·S/β                  fewest bytes, near partners: long tensors
    direct               2·(n − 1)·α + 2·(n−1)/n·S/β                  in two rounds: few ranks (here: each half alone)

Chunk i of a tensor is what torch.tensor_split(n)[i] cuts, so n need not divide anything. In-place functions return
their tensor, which need not be contiguous. `group`: a process group, None for all ranks; ValueError outside it.
`op`: dist.ReduceOp SUM, AVG (not of integers), MAX, MIN, PRODUCT. What a docstring says a rank sends is the bytes of
the tensors that it gives to isend; a message longer than `piece_bytes` goes as several.

Sources: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (2005);
Patarasuk, Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations" (2009).
"""

from ..group import split_sizes
from .all_to_all import bruck_all_to_all, naive_all_to_all, pairwise_all_to_all
from .autograd import (
    all_gather_from_group,
    all_to_all_in_group,
    copy_to_group,
    gather_from_group,
    reduce_from_group,
    reduce_scatter_to_group,
    scatter_to_group,
)
from .direct import direct_all_gather, direct_reduce_scatter
from .reductions import (
    bruck_all_gather,
    halving_doubling_all_reduce,
    naive_all_gather,
    naive_all_reduce,
    naive_reduce_scatter,
    recursive_doubling_all_reduce,
    tree_all_reduce,
)
from .ring import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from .rooted import (
    chain_broadcast,
    naive_broadcast,
    naive_gather,
    naive_reduce,
    naive_scatter,
    tree_broadcast,
    tree_gather,
    tree_reduce,
    tree_scatter,
)

__all__ = [
    "naive_broadcast", "chain_broadcast", "tree_broadcast", "naive_reduce", "tree_reduce",
    "naive_gather", "tree_gather", "naive_scatter", "tree_scatter",
    "naive_all_reduce", "tree_all_reduce", "ring_all_reduce",
    "recursive_doubling_all_reduce", "halving_doubling_all_reduce",
    "naive_reduce_scatter", "ring_reduce_scatter", "direct_reduce_scatter",
    "naive_all_gather", "ring_all_gather", "bruck_all_gather", "direct_all_gather",
    "naive_all_to_all", "pairwise_all_to_all", "bruck_all_to_all",
    "copy_to_group", "reduce_from_group", "scatter_to_group", "gather_from_group",
    "all_gather_from_group", "reduce_scatter_to_group", "all_to_all_in_group", "split_sizes",
]  # fmt: skip
