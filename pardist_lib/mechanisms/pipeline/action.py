"""One cell of a schedule, "2F0": what it is, and how it is read."""

import re
from typing import NamedTuple

KINDS = {"F": "forward", "B": "backward", "I": "backward to the input", "W": "backward to the weights"}

# What torch adds when it lowers a schedule: messages, and what FSDP and data parallelism do in between.
_AROUND = ("SEND_F", "RECV_F", "SEND_B", "RECV_B", "UNSHARD", "RESHARD", "REDUCE_GRAD")
_CELL = re.compile(r"([0-9]{1,9})([A-Za-z_]+)([0-9]{0,9})")


class Action(NamedTuple):
    """What a rank computes in one go: stage 2's forward of micro-batch 0 is Action(2, "F", 0), written "2F0".

    kind: F, forward; B, the whole backward; or its two halves: I, the gradient of the stage's input, for which the
    stage before is waiting, and W, the gradients of its weights, for which nobody is. Both are counted from 0.
    """

    stage: int
    kind: str
    micro_batch: int

    def __str__(self):
        return f"{self.stage}{self.kind}{self.micro_batch}"


def read_action(cell, rank, place):
    """The Action that a cell says, or None for an idle one and for what torch does around actions ("1RECV_F0").

    cell: an Action, three of its kind, text, or None. Raises ValueError, which names rank and place, for others.
    """
    if cell is None:
        return None
    text = str(Action(*cell) if type(cell) is tuple and len(cell) == 3 else cell).strip()
    if not text:
        return None
    here = f"rank {rank} at place {place} ({text})"
    match = _CELL.fullmatch(text)
    if not match or not match[3] and match[2] not in _AROUND:
        more = ": write the actions that it overlaps one after the other" if "OVERLAP" in text else ""
        raise ValueError(f"{here}: an action is a stage, a kind and a micro-batch, such as 2F0{more}")
    stage, kind, micro_batch = match.groups()
    if kind in _AROUND:
        return None
    if kind not in KINDS:
        known = ", ".join(f"{kind} ({name})" for kind, name in KINDS.items())
        raise ValueError(f"{here}: there is no kind {kind}: it is one of {known}")
    return Action(int(stage), kind, int(micro_batch))
