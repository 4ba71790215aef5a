"""What the exercises about a split transformer share."""

import torch

from ..exercises.judge import Wrong, type_of


def parts_of(length, n):
    """[(first, after the last)] of what torch.tensor_split cuts."""
    edges = [0]
    for part in torch.arange(length).tensor_split(n):
        edges.append(edges[-1] + len(part))
    return list(zip(edges, edges[1:], strict=False))


def results(seen, names, about):
    """For each name what the ranks returned; raises Wrong where a rank returned more or fewer things."""
    for rank, one in enumerate(seen):
        several = isinstance(one.result, (tuple, list))
        if not several or len(one.result) != len(names):
            many = f" of {len(one.result)}" if several else ""
            why = f"it returns a {type_of(one.result)}{many}: ({', '.join(names)}) is asked for"
            raise Wrong(why, f"rank {rank}, {about}")
    return [[one.result[i] for one in seen] for i in range(len(names))]
