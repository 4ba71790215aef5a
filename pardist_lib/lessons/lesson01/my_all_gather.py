"""my_all_gather: every rank's tensor on every rank. Typically wrong: the order of rows, or all through one rank."""

import torch

from pardist_lib.ranks.report import plural

from ..exercises.cases import unchanged
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, own_dtype, same, sent
from .shared import on_every_tensor

hints = (
    "Make the result first: tensor.new_empty(n, *tensor.shape), and put the rank's own tensor into row rank.",
    "Either each rank sends its tensor to every other (isend to all, then receive from all), or all pass on to the "
    "right what they received in the step before: n - 1 steps.",
    "In step s of the ring a rank sends row (rank - s) % n to the right and receives row (rank - s - 1) % n from "
    "the left. Use isend before recv, and wait() after it.",
)


def check(run):
    on_every_tensor(run, _judge)


def _judge(seen, before, about):
    n, rows, got = len(seen), torch.stack(before), [one.result for one in seen]
    unchanged(seen, before, about)
    tensors = [g for g in got if isinstance(g, torch.Tensor) and g.dim() > 0]
    late = [[i for i in range(n) if g.shape == rows.shape and not equal(g[i], rows[i])] for g in tensors]
    if late == [[rank] for rank in range(n)]:
        why = "a rank's own row is not filled: nobody sends it, the rank has to put it there"
        raise Wrong(why, f"every rank, {about}")
    if late in ([[(rank + i) % n] for rank in range(n)] for i in (1, -1)):
        raise Wrong("one row is not filled on any rank: n - 1 steps are needed", f"every rank, {about}")
    arrival = "row r must be rank r's on every rank, here the rows are in order of arrival"
    neighbour = (
        "every row is the left neighbour's tensor: what was received has to be passed on, not the own tensor again"
    )

    def stacked(of):
        return [torch.stack([before[of(rank, i) % n] for i in range(n)]) for rank in range(n)]

    of_shape = f"the values are right, but the shape is {{}}, where {tuple(rows.shape)} is asked for"
    mistakes = [
        *((f"it returns a {kind.__name__}: torch.stack makes one tensor of it", kind) for kind in (list, tuple)),
        *((of_shape.format(tuple(t.shape)), rows.view(t.shape)) for t in tensors if t.numel() == rows.numel()),
        (arrival, stacked(lambda rank, i: rank + i)),
        (arrival, stacked(lambda rank, i: rank - i)),
        (arrival, stacked(lambda rank, i: rank if i == 0 else i - (i <= rank))),
        ("the rows are in reverse order: row r must be rank r's", rows.flip(0)),
        ("every row is the rank's own tensor", stacked(lambda rank, i: rank)),
        (neighbour, stacked(lambda rank, i: rank - (i != rank))),
        ("the tensors are added up: gathering keeps each one", rows.sum(0).expand_as(rows)),
    ]
    same(got, rows, "the result", about, mistakes)
    _judge_traffic(sent(seen), before[0].nbytes, seen, before, about)


def _judge_traffic(made, size, seen, before, about):
    n = len(made)
    fair = (n - 1) * size
    if made != [fair] * n:
        own_dtype(seen, before[0].dtype, about)
        many = plural([r for r in range(n) if made[r] == max(made)])
        why = f"{max(made):,} bytes leave {many}: n - 1 tensors of {size} bytes are enough"
        if max(made) > sum(made) / n * 1.5:
            why = f"everything passes through {many}: it sends {max(made):,} bytes, where n - 1 tensors are {fair:,}"
        got = ", ".join(f"{b:,}" for b in made) + " bytes"
        raise Wrong(f"the rows are right, but {why}", about, f"{fair:,} bytes from each rank", got)


WHY = (
    "Each rank sends n - 1 tensors, the least when everyone sends alike. NCCL chooses between a ring, for large "
    "tensors, and ways with fewer steps for small ones; FSDP gathers a layer's weights by this call just before "
    "it needs them."
)
exercise = Exercise(hints, check, minutes=20, level="medium", why=WHY)
