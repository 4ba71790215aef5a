"""The exercise column_split."""

import torch

from ..exercises.cases import F32, F64, I64
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, only_calls, same
from .shared import call_answer, inputs_kept, operands

hints = (
    "b @ c_columns is this rank's columns of A, complete: nothing is missing from them, they only have to be put "
    "side by side.",
    "parts = [torch.empty_like(mine) for _ in range(n)]; dist.all_gather(parts, mine) gives every rank all parts, "
    "in the order of ranks.",
    "Columns stand side by side: torch.cat(parts, dim=1). (Along dim 0 they would stand below each other.)",
)


def check(run):
    cases = [(4, (3, 5, 8), F64), (4, (6, 2, 4), F64), (4, (3, 5, 8), F32), (4, (2, 3, 4), I64),
             (3, (4, 2, 9), F64), (2, (1, 3, 4), F32)]  # fmt: skip

    def one(n, shape, dtype, seed, about):
        b, c = operands(shape, dtype, seed)
        parts = [(b, c_part.contiguous()) for c_part in c.chunk(n, 1)]
        seen = run(call_answer, parts, n=n, about=about)
        inputs_kept(seen, parts, ("b", "c_columns"), about)
        _judge_columns(seen, parts, about)

    cases(one, cases)


def _judge_columns(seen, parts, about):
    n = len(seen)
    made = [b @ c for b, c in parts]
    a, (m, w) = torch.cat(made, 1), made[0].shape
    results = [one.result for one in seen]
    ranks = f"every rank, {about}"
    for rank, result in enumerate(results):
        if isinstance(result, torch.Tensor) and result.shape != a.shape:
            if rank and equal(results[0], a):
                raise Wrong("only rank 0 has the whole A: every rank has to have it", f"rank {rank}, {about}")
            if result.shape == made[0].shape and torch.allclose(result.to(a.dtype), made[rank]):
                raise Wrong("each rank returns its own columns only: A has to be whole on every rank", ranks)
            if result.shape == (n * m, w):
                raise Wrong(
                    "the parts stand below each other: they are columns, so they are joined along dimension 1", ranks,
                    f"shape {tuple(a.shape)}", f"shape {tuple(result.shape)}",
                )  # fmt: skip
            if result.shape == a.T.shape:
                raise Wrong("the result is transposed", ranks, f"shape {tuple(a.shape)}", f"shape {tuple(a.T.shape)}")
        if isinstance(result, (list, tuple)):
            raise Wrong(f"it returns a {type(result).__name__} of parts: torch.cat makes one matrix of them", ranks)
    only = [torch.cat([made[i] if i == rank else torch.zeros_like(made[i]) for i in range(n)], 1) for rank in range(n)]
    missing = [a.clone() for _ in range(n)]
    for rank in range(n):
        missing[rank][:, rank * w : (rank + 1) * w] = 0
    mistakes = [
        ("the parts are joined one below the other and reshaped, which scrambles them: join them along dimension 1",
         [torch.cat(made).view(a.shape)] * n),
        ("every rank's columns are its own part, over and over: all_gather's list has everybody's",
         [torch.cat([made[rank]] * n, 1) for rank in range(n)]),
        *(("all parts are one tensor: [torch.empty_like(x)] * n puts the same one n times into the list, where a "
           "comprehension makes n", [torch.cat([part] * n, 1)] * n) for part in made),
        ("the other ranks' columns are zero: they have to be gathered", only),
        ("a rank's own columns are zero", missing),
        ("the parts are in reverse order: rank 0's columns come first", [torch.cat(made[::-1], 1)] * n),
        ("a rank's own columns come first: the order is that of ranks, the same everywhere",
         [torch.cat([made[rank], *made[:rank], *made[rank + 1 :]], 1) for rank in range(n)]),
        ("the parts are added up: columns are put side by side, nothing has to be added", [sum(made).repeat(1, n)] * n),
        ("everything is n times as large: columns are complete, nothing has to be added up", [a * n] * n),
    ]  # fmt: skip
    same(results, [a] * n, "A", about, mistakes)
    if not all(sum(call.bytes for call in one.calls) for one in seen):
        raise Wrong("A is right, though nothing was sent: where did the other ranks' columns come from?", about)
    because = {
        "": "A is right, but it calls {op}: one all_gather of a rank's own columns of A is enough",
        "all_reduce": "A is right, but by an all_reduce over zeros, which sends twice as much as an all_gather",
    }
    only_calls(seen, ("all_gather",), because)
    for rank, one in enumerate(seen):
        received = [call.bytes for call in one.calls]  # an all_gather counts as what it fills
        shown = f"rank {rank}, {about}", f"{a.nbytes} bytes", f"{sum(received)} bytes"
        if received == [n * parts[0][1].nbytes] != [a.nbytes]:
            why = "A is right, but the columns of C were gathered and every rank did the whole product"
            raise Wrong(f"{why}: gather the columns of A", *shown)
        if received != [a.nbytes]:
            why = f"A is right, but {len(received)} all_gather bring {sum(received)} bytes"
            raise Wrong(f"{why}: once the columns of A is enough", *shown)


exercise = Exercise(hints, check)
