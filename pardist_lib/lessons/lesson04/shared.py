"""What several exercises of this lesson share."""

import torch

from ..exercises.judge import Wrong, type_of
from ..exercises.watch import watched

F32, F64 = torch.float32, torch.float64


def random(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def parts_of(length, n):
    """[(first, after the last)] of what torch.tensor_split cuts."""
    edges = [0]
    for part in torch.arange(length).tensor_split(n):
        edges.append(edges[-1] + len(part))
    return list(zip(edges, edges[1:], strict=False))


def call_answer(answer, *given):
    """On a rank: call the answer, and keep which of the tensors it was given it has changed."""
    before = [g.clone() if isinstance(g, torch.Tensor) else g for g in given]
    seen = watched(answer, *given)
    changed = [i for i, (g, b) in enumerate(zip(given, before, strict=True))
               if isinstance(g, torch.Tensor) and not (g.shape == b.shape and torch.equal(g, b))]  # fmt: skip
    seen.kept = {"changed": changed}
    return seen


def results(seen, count, names, given, about):
    """[each rank's results] with `count` in each; Raises Wrong for another number, or where an input was changed."""
    for rank, one in enumerate(seen):
        result = one.result
        if not isinstance(result, (tuple, list)) or len(result) != count:
            many = f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
            asked = f"({', '.join(names)})"
            raise Wrong(f"it returns a {type_of(result)}{many}: {asked} is asked for", f"rank {rank}, {about}")
        for i in one.kept["changed"]:
            raise Wrong(f"the input `{given[i]}` was changed: work on a copy of it", f"rank {rank}, {about}")
    return [[one.result[i] for one in seen] for i in range(count)]


def told(wrong, known, notable):
    """Say what is new in the first case that fails: `notable` {text: whether it holds}, `known` those seen before."""
    new = [text for text, holds in notable.items() if holds and text not in known]
    if known and len(new) == 1:
        wrong.diagnosis = f"{new[0]}: {wrong.diagnosis}"
    return wrong
