"""What several exercises of this lesson share."""

import torch
import torch.distributed as dist

from ..exercises.cases import values
from ..exercises.judge import Wrong
from ..exercises.watch import Seen, watched
from ..worlds import world


def operands(shape, dtype, seed):
    """B and C, whole: (m, k) and (k, w)."""
    m, k, w = shape
    return values((m, k), dtype, 0, seed), values((k, w), dtype, 1, seed)


def call_answer(answer, parts, *args):
    """On a rank: give the answer its own parts, and keep what they are afterwards."""
    mine = [part.clone() for part in parts[dist.get_rank()]]
    seen = watched(answer, *mine, *args)
    seen.kept = mine
    return seen


def call_in_world(answer, parts, *args):
    """The same; parts for one rank only are given in a world of one, a group that all four ranks have to make."""
    if len(parts) > 1:
        return call_answer(answer, parts, *args)
    with world(1) as inside:
        return call_answer(answer, parts, *args) if inside else Seen()


def inputs_kept(seen, parts, names, about):
    for rank, one in enumerate(seen):
        for name, before, after in zip(names, parts[rank], one.kept, strict=True):
            if name and not torch.equal(before, after):
                raise Wrong(f"`{name}` was changed: it has to stay as it is", f"rank {rank}, {about}")


def cases(one, cases):
    """Call `one(n, shape, dtype, seed, about)` for each case; a failure in a later one tells what is new in it."""
    first_n, first_shape, first_dtype = cases[0]
    known = set()
    for seed, (n, shape, dtype) in enumerate(cases):
        new = {
            f"it works with {first_n} ranks, but not with {n} (is a {first_n} written into it?)": n != first_n,
            f"it works for {str(first_dtype)[6:]}, but not for {str(dtype)[6:]}": dtype != first_dtype,
            f"it works for (m, k, w) = {first_shape}, but not for other sizes": shape != first_shape,
        }
        kinds = {i: text for i, (text, holds) in enumerate(new.items()) if holds}
        m, k, w = shape
        try:
            one(n, shape, dtype, seed, f"B ({m}, {k}), C ({k}, {w}), {str(dtype)[6:]}, {n} ranks")
        except Wrong as wrong:
            if len(fresh := [text for i, text in kinds.items() if i not in known]) == 1:
                wrong.diagnosis = f"{fresh[0]}: {wrong.diagnosis}"
            raise
        known |= kinds.keys()
