"""What exercises of this lesson share."""

import torch

from ..exercises.judge import Wrong, equal, type_of

OTHER_CALLS = {  # of a mean over the ranks
    "all_gather": "it calls all_gather, which brings everybody's numbers to everybody: sums are all that is needed",
    "": "it calls {op}: sums over the ranks are all that is needed, one all_reduce of the numbers and one of the rows",
}


def number(value, said, where):
    """What an answer returned as a Python number; Wrong for anything else. said: "the scale"."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Wrong(f"{said} is {type_of(value)}: a number is asked for", where)
    return float(value)


def likeliest_first(mistakes, got):
    """The mistakes, those first that explain what came out in all cases, each of them a list of tensors.

    mistakes: (diagnosis, what it would give in each case).
    """

    def in_part(mistake):
        cases = zip(got, mistake[1], strict=False)
        return not all(equal(a, b) for found, would in cases for a, b in zip(found, would, strict=True))

    return sorted(mistakes, key=in_part)
