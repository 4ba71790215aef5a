"""The exercise exchange."""

import torch

from ..exercises.cases import call_with_tensor, every_case, unchanged, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, by_hand, equal, own_dtype, same, sent, show, type_of

hints = (
    "The neighbours are (rank - 1) % n and (rank + 1) % n: the remainder closes the ring.",
    "dist.send comes back when the other side receives. If all ranks send first, nobody ever receives. dist.isend "
    "and dist.irecv come back at once with a message that you wait for later.",
    "Start two isend and two irecv (into torch.empty_like(tensor)), keep the four messages in a list, then call "
    "wait() on each, then return what was received.",
)


def check(run):
    def one(n, shape, dtype, seed, about):
        seen = run(call_with_tensor, shape, dtype, seed, n=n, about=about)
        by_hand(seen)
        _judge_exchange(seen, [values(shape, dtype, rank, seed) for rank in range(n)], about)

    every_case(one)


def _judge_exchange(seen, before, about):
    n, size = len(seen), before[0].nbytes
    unchanged(seen, before, about)
    for rank, one in enumerate(seen):
        if not isinstance(one.result, (tuple, list)) or len(one.result) != 2:
            why = f"it returns {type_of(one.result)}: the pair (from_left, from_right) is asked for"
            raise Wrong(why, f"rank {rank}, {about}")
    if n > 2 and all(equal(one.result[0], one.result[1]) for one in seen if isinstance(one.result[1], torch.Tensor)):
        raise Wrong("from_left and from_right are the same: receive into two tensors", f"every rank, {about}")
    left, right = [before[r - 1] for r in range(n)], [before[(r + 1) % n] for r in range(n)]
    for i, (name, expected, other) in enumerate((("from_left", left, right), ("from_right", right, left))):
        mistakes = [
            ("left and right are swapped: from_left comes from rank - 1, from_right from rank + 1", other),
            (f"{name} is the rank's own tensor", before),
            (f"{name} is zero: was it received, or returned before?", [torch.zeros_like(b) for b in before]),
        ]
        got, end = [one.result[i] for one in seen], (0, n - 1)[i]
        bad = [r for r in range(n) if not equal(got[r], expected[r])]
        if n > 2 and bad == [end] and isinstance(got[end], torch.Tensor):
            why = f"{name} is wrong on rank {end} only: its neighbour there is rank {n - 1 - end}, the ring is closed"
            raise Wrong(why, f"rank {end}, {about}", show(expected[end]), show(got[end]))
        same(got, expected, name, about, mistakes)
    for rank, made in enumerate(sent(seen)):
        if made != 2 * size:
            own_dtype(seen, before[0].dtype, about)
            raise Wrong(
                f"the values are right, but rank {rank} sends {made:,} bytes: its tensor of {size} bytes goes once to "
                "each side, 2 messages", about, f"{2 * size} bytes", f"{made} bytes",
            )  # fmt: skip


exercise = Exercise(hints, check)
