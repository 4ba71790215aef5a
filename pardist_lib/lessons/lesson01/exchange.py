"""exchange: a tensor to both neighbours at once. Typically wrong: all send first, or left and right are swapped."""

import torch

from ..exercises.cases import unchanged
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, own_dtype, same, sent, show, type_of
from .shared import on_every_tensor

hints = (
    "The neighbours are (rank - 1) % n and (rank + 1) % n: the remainder closes the ring.",
    "dist.send comes back when the other side receives. If all ranks send first, nobody ever receives. dist.isend "
    "and dist.irecv come back at once with a message that you wait for later.",
    "Start two isend and two irecv (into torch.empty_like(tensor)), keep the four messages in a list, then call "
    "wait() on each, then return what was received.",
)


def check(run):
    on_every_tensor(run, _judge)


def _judge(seen, before, about):
    n, size = len(seen), before[0].nbytes
    unchanged(seen, before, about)
    for rank, one in enumerate(seen):
        if not isinstance(one.result, (tuple, list)) or len(one.result) != 2:
            why = f"it returns {type_of(one.result)}: the pair (from_left, from_right) is asked for"
            raise Wrong(why, f"rank {rank}, {about}")
    if n > 2 and all(equal(one.result[0], one.result[1]) for one in seen if isinstance(one.result[1], torch.Tensor)):
        raise Wrong("from_left and from_right are the same: receive into two tensors", f"every rank, {about}")
    left, right = [before[r - 1] for r in range(n)], [before[(r + 1) % n] for r in range(n)]
    for i, name, expected, other, end in ((0, "from_left", left, right, 0), (1, "from_right", right, left, n - 1)):
        got = [one.result[i] for one in seen]
        if (
            n > 2
            and isinstance(got[end], torch.Tensor)
            and [r for r in range(n) if not equal(got[r], expected[r])] == [end]
        ):
            why = f"{name} is wrong on rank {end} only: its neighbour there is rank {n - 1 - end}, the ring is closed"
            raise Wrong(why, f"rank {end}, {about}", show(expected[end]), show(got[end]))
        mistakes = [
            ("left and right are swapped: from_left comes from rank - 1, from_right from rank + 1", other),
            (f"{name} is the rank's own tensor", before),
            (f"{name} is zero: was it received, or returned before?", torch.zeros_like(before[0])),
        ]
        same(got, expected, name, about, mistakes)
    for rank, made in enumerate(sent(seen)):
        if made != 2 * size:
            own_dtype(seen, before[0].dtype, about)
            why = (
                f"the values are right, but rank {rank} sends {made:,} bytes: its tensor of {size} bytes goes once to "
            )
            raise Wrong(f"{why}each side, 2 messages", about, f"{2 * size} bytes", f"{made} bytes")


WHY = (
    "Both messages are under way before anybody waits, so no rank can block another. Pipelines and halos do the "
    "same: Megatron-LM puts such calls into one batch_isend_irecv, so that NCCL starts them together."
)
exercise = Exercise(hints, check, minutes=15, level="medium", why=WHY)
