"""What exercises of this lesson share: the whole numbers of secure aggregation, and which calls a sum needs."""

import torch

from ..exercises.judge import Wrong, show

FIELD = 2**32
OTHER_CALLS = {  # of a sum over the ranks
    "all_gather": "it calls all_gather, which brings everybody's numbers to everybody: the sum is all that is needed",
    "broadcast": "it calls broadcast, which brings one rank's numbers to all: a sum needs all_reduce",
    "reduce": "it calls reduce, which brings the sum to one rank only: all_reduce brings it to all",
    "": "it calls {op}: one all_reduce of the numbers is all that is needed",
}


def field_numbers(size, seed):
    return torch.randint(FIELD, (size,), generator=torch.Generator().manual_seed(seed))


def whole(got, expected, labels, what):
    """Raise Wrong where a result is no int64 tensor from 0 to 2**32 - 1, or a ValueError instead of one."""
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
