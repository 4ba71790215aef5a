"""The exercise my_all_gather."""

import torch

from pardist_lib.ranks.report import plural

from ..exercises.cases import call_with_tensor, every_case, unchanged, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, by_hand, equal, own_dtype, same, sent

hints = (
    "Make the result first: tensor.new_empty(n, *tensor.shape), and put the rank's own tensor into row rank.",
    "Either each rank sends its tensor to every other (isend to all, then receive from all), or all pass on to the "
    "right what they received in the step before: n - 1 steps.",
    "In step s of the ring a rank sends row (rank - s) % n to the right and receives row (rank - s - 1) % n from "
    "the left. Use isend before recv, and wait() after it.",
)


def check(run):
    def one(n, shape, dtype, seed, about):
        seen = run(call_with_tensor, shape, dtype, seed, n=n, about=about)
        by_hand(seen)
        _judge_gather(seen, [values(shape, dtype, rank, seed) for rank in range(n)], about)

    every_case(one)


def _tensor(value):
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _judge_gather(seen, before, about):
    n, size = len(seen), before[0].nbytes
    unchanged(seen, before, about)
    rows = torch.stack(before)
    shifted = [torch.stack([before[(rank + i) % n] for i in range(n)]) for rank in range(n)]
    backward = [torch.stack([before[(rank - i) % n] for i in range(n)]) for rank in range(n)]
    hand_over = "row r must be rank r's on every rank, here the rows are in order of arrival"
    mistakes = [
        (hand_over, shifted),
        (hand_over, backward),
        (hand_over, [torch.stack([before[r], *before[:r], *before[r + 1 :]]) for r in range(n)]),
        ("the rows are in reverse order: row r must be rank r's", [rows.flip(0)] * n),
        ("every row is the rank's own tensor", [torch.stack([b] * n) for b in before]),
        ("every row is the left neighbour's tensor: what was received has to be passed on, not the own tensor again",
         [torch.stack([before[r] if i == r else before[r - 1] for i in range(n)]) for r in range(n)]),
        ("the tensors are added up: gathering keeps each one", [rows.sum(0).expand_as(rows)] * n),
    ]  # fmt: skip
    got = [one.result for one in seen]
    for rank, result in enumerate(got):
        if isinstance(result, (list, tuple)):
            why = f"it returns a {type(result).__name__}: torch.stack makes one tensor of it"
            raise Wrong(why, f"rank {rank}, {about}")
        if isinstance(result, torch.Tensor) and result.shape != rows.shape:
            if torch.equal(result.flatten(), rows.flatten()):
                why = f"the values are right, but the shape is {tuple(result.shape)}"
                raise Wrong(f"{why}, where {tuple(rows.shape)} is asked for", f"rank {rank}, {about}")
    late = [[i for i in range(n) if g.shape == rows.shape and not equal(g[i], rows[i])] for g in got if _tensor(g)]
    if late == [[rank] for rank in range(n)]:
        raise Wrong(
            "a rank's own row is not filled: nobody sends it, the rank has to put it there", f"every rank, {about}"
        )
    if late == [[(rank + 1) % n] for rank in range(n)] or late == [[(rank - 1) % n] for rank in range(n)]:
        raise Wrong("one row is not filled on any rank: n - 1 steps are needed", f"every rank, {about}")
    same(got, [rows] * n, "the result", about, mistakes)
    made, fair = sent(seen), (n - 1) * size
    if made != [fair] * n:
        own_dtype(seen, before[0].dtype, about)
        rank = max(range(n), key=lambda r: made[r])
        many = plural([r for r in range(n) if made[r] == made[rank]])
        if max(made) > sum(made) / n * 1.5:
            why = f"everything passes through {many}: it sends {made[rank]:,} bytes, where n - 1 tensors are {fair:,}"
        else:
            why = f"{made[rank]:,} bytes leave {many}: n - 1 tensors of {size} bytes are enough"
        raise Wrong(
            f"the rows are right, but {why}",
            about,
            f"{fair:,} bytes from each rank",
            ", ".join(f"{b:,}" for b in made) + " bytes",
        )


exercise = Exercise(hints, check)
