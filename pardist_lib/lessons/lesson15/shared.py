"""What several exercises of this lesson share."""

import copy

import torch
import torch.distributed as dist

from ..exercises.judge import Wrong, show
from ..exercises.watch import plain, watched
from ..worlds import group_of

FIELD = 2**32


PAIRS, ALONE = [[0, 2], [1, 3]], [[0], [1], [2], [3]]


OTHER_CALLS = {
    "all_gather": "it calls all_gather, which brings everybody's numbers to everybody: the sum is all that is needed",
    "broadcast": "it calls broadcast, which brings one rank's numbers to all: a sum needs all_reduce",
    "reduce": "it calls reduce, which brings the sum to one rank only: all_reduce brings it to all",
    "": "it calls {op}: one all_reduce of the numbers is all that is needed",
}


def each(answer, inputs):
    """On one rank: the answer for each of the inputs, or what it raised; and whether an input was changed."""
    changed = []

    def all_of_them():
        results = []
        for args in inputs:
            own = copy.deepcopy(args)
            try:
                results.append(plain(answer(*own)))
            except ValueError as error:
                results.append(f"ValueError: {error}"[:200])
            changed.append(not nearly_equal(args, own))
        return results

    seen = watched(all_of_them)
    seen.kept = changed
    return seen


def mine(groups):
    """The argument `group` for this rank, where there are groups. Every rank has to call it."""
    made = {rank: group_of(members) for members in groups for rank in members}
    return {"group": made[dist.get_rank()]} if groups else {}


def named(groups, n):
    if not groups:
        return f"{n} ranks"
    return "two groups of 2 ranks" if len(groups[0]) == 2 else "four groups of 1 rank"


def nearly_equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.allclose(a, b, 0, 0, equal_nan=True)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(nearly_equal(a[k], b[k]) for k in a)
    return a == b if not isinstance(a, tuple) else all(map(nearly_equal, a, b))


def in_one_process(run, inputs, labels):
    """What came out for each of the inputs. Raises Wrong where it communicates or changes what it was given."""
    [seen] = run(each, inputs, n=1)
    if seen.calls:
        raise Wrong(f"it calls {seen.calls[0].op}: this one is arithmetic, in one process")
    for changed, label in zip(seen.kept, labels, strict=True):
        if changed:
            raise Wrong("what it was given has changed: x = x + y makes a new tensor, x += y writes into it", label)
    return seen.result


def whole(got, expected, labels, what):
    """Raise Wrong where a result is no int64 tensor from 0 to 2**32 - 1."""
    for value, want, label in zip(got, expected, labels, strict=True):
        if isinstance(value, str) and value.startswith("ValueError"):
            raise Wrong(f"it raises on numbers that are right: {value}", label)
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            raise Wrong(f"{what} is {str(value.dtype)[6:]}: whole numbers are asked for, int64", label)
        if isinstance(value, torch.Tensor) and value.shape == want.shape and value.dtype == torch.int64:
            if torch.equal(value % FIELD, want) and not torch.equal(value, want):
                said = "negative" if (value < 0).any() else "2**32 or more"
                why = f"the numbers are right modulo 2**32, but some are {said}: take % 2**32 at the end"
                raise Wrong(why, label, show(want), show(value))
            rounded = torch.equal(value, value.float().long()) and torch.allclose(value.double(), want.double(), 1e-5)
            if rounded and not torch.equal(want, want.float().long()):
                why = "right to about 7 digits only: whole numbers of 32 bits went through float32, which holds 24"
                raise Wrong(why, label, show(want), show(value))


def numbers(size, seed):
    return torch.randint(FIELD, (size,), generator=torch.Generator().manual_seed(seed))
