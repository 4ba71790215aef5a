"""What several exercises of this lesson share: A = B × C in several sizes, and how an answer is given its parts."""

import torch.distributed as dist

from ..exercises.cases import call, one_by_one, values
from ..exercises.watch import Seen
from ..worlds import world


def call_parts(answer, names, parts, *args):
    """On a rank: `call` the answer with this rank's own parts. (A world of one has to be made by all ranks.)"""
    with world(len(parts)) as inside:
        return call(answer, dict(zip(names, parts[dist.get_rank()], strict=True)), *args) if inside else Seen()


def operands(shape, dtype, seed):
    """B and C, whole: (m, k) and (k, w)."""
    m, k, w = shape
    return values((m, k), dtype, 0, seed), values((k, w), dtype, 1, seed)


def products(cases, one):
    """Call `one(seed, n, shape, dtype, about)` for each case (n, (m, k, w), dtype); a failure tells what is new."""
    first_n, first_shape, first_dtype = cases[0]

    def news(n, shape, dtype):
        return {
            f"it works with {first_n} ranks, but not with {n} (is a {first_n} written into it?)": n != first_n,
            f"it works for {str(first_dtype)[6:]}, but not for {str(dtype)[6:]}": dtype != first_dtype,
            f"it works for (m, k, w) = {first_shape}, but not for other sizes": shape != first_shape,
        }

    def with_its_name(seed, n, shape, dtype):
        m, k, w = shape
        one(seed, n, shape, dtype, f"B ({m}, {k}), C ({k}, {w}), {str(dtype)[6:]}, {n} ranks")

    one_by_one(cases, news, with_its_name)
