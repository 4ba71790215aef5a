"""The exercise inner_split."""

import torch

from ..exercises.cases import F32, F64, I64
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, only_calls, same
from .shared import call_answer, inputs_kept, operands

hints = (
    "b_columns @ c_rows has the shape of A already. What is missing in its numbers?",
    "A[i, j] is a sum over the inner index, and every rank has the terms of its own share. Terms are added, not "
    "put side by side.",
    "a = b_columns @ c_rows; dist.all_reduce(a); return a.",
)


def check(run):
    cases = [(4, (8, 8, 8), F64), (4, (3, 10, 2), F64), (4, (3, 8, 5), F32), (4, (2, 9, 3), I64),
             (3, (4, 6, 2), F64), (2, (1, 5, 4), F32), (4, (3, 3, 4), F64)]  # fmt: skip

    def one(n, shape, dtype, seed, about):
        b, c = operands(shape, dtype, seed)
        shares = [_share(shape[1], n, rank, seed == 0) for rank in range(n)]
        parts = [(b[:, s].contiguous(), c[s].contiguous()) for s in shares]
        about += ", shares " + " ".join(str(s.stop - s.start) for s in shares)
        empty = any(s.start == s.stop for s in shares)
        stuck = "the ranks do not make the same calls: one whose share is 0 has to bring its zeros, too" * empty
        seen = run(call_answer, parts, n=n, about=about, stuck=stuck)
        inputs_kept(seen, parts, ("b_columns", "c_rows"), about)
        _judge_inner(seen, parts, b @ c, about)

    cases(one, cases)


def _share(k, n, rank, even):
    """This rank's part of k indices, as a slice; where not even, ranks before the last one get more or none."""
    if even:
        return slice(k // n * rank, k // n * (rank + 1))
    ends = [k * (r + 1) * (r + 1) // (n * n) for r in range(n)]
    return slice(ends[rank - 1] if rank else 0, ends[rank])


def _judge_inner(seen, parts, a, about):
    n, made = len(seen), [b @ c for b, c in parts]
    results, ranks = [one.result for one in seen], f"every rank, {about}"
    (m, w), joined = a.shape, "the ranks' products are put side by side"
    for result in results:
        if isinstance(result, torch.Tensor) and result.shape in ((n * m, w), (m, n * w), (n, m, w)):
            why = f"{joined}: each is a summand as large as A, they have to be added up"
            raise Wrong(why, ranks, f"shape {tuple(a.shape)}", f"shape {tuple(result.shape)}")
        if isinstance(result, (list, tuple)):
            raise Wrong(f"it returns a {type(result).__name__} of summands: they have to be added up", ranks)
    if any(call.op == "reduce" for call in seen[0].calls) and [equal(result, a) for result in results].count(True) == 1:
        raise Wrong("only rank 0 has the sum: every rank has to have it, as all_reduce does", ranks)
    stacked = torch.stack(made)
    sums = [None] * n
    if len({b.shape for b, _ in parts}) == 1:
        sums = [sum(b for b, _ in parts) @ sum(c for _, c in parts)] * n
    mistakes = [
        ("only rank 0 has the sum: every rank has to have it", [None, *made[1:]]),
        ("each rank returns its own summand: the sum over the ranks is missing", made),
        ("this is the mean of the summands: A is their sum", [a / n if a.is_floating_point() else a // n] * n),
        ("this is the largest summand, element by element: A is their sum", [stacked.amax(0)] * n),
        ("this is the product of the summands: A is their sum", [stacked.prod(0)] * n),
        ("the result is transposed", [a.T if m == w else None] * n),
        ("a rank's own summand counts twice", [a + mine for mine in made]),
        ("a rank's own summand is missing", [a - mine for mine in made]),
        ("every rank returns rank 0's summand: they have to be added up", [made[0]] * n),
        ("B and C were added up over the ranks before multiplying: the products are what is to be added", sums),
    ]  # fmt: skip
    same(results, [a] * n, "A", about, mistakes)
    rings = ("all_reduce", "reduce_scatter", "all_gather")
    why = "A is right, but it calls {op}: one all_reduce of a rank's product is enough"
    only_calls(seen, rings, {"": why})
    for rank, one in enumerate(seen):
        given, ops, where = [call.bytes for call in one.calls], [call.op for call in one.calls], f"rank {rank}, {about}"
        if not given:
            raise Wrong("A is right, though nothing was sent: where did the other ranks' summands come from?", where)
        if ops == ["all_gather"] and given == [n * a.nbytes]:
            why = f"A is right, but every summand goes to every rank: that sends {n - 1} · A from each"
            raise Wrong(f"{why}, an all_reduce 2({n} - 1)/{n} · A", where)
        if "all_reduce" not in ops and "reduce_scatter" not in ops:
            why = "A is right, but the operands were gathered and every rank did the whole product"
            raise Wrong(f"{why}: multiply first, then add up", where)
        if ops != ["all_reduce"] or given != [a.nbytes]:
            raise Wrong(f"A is right, but {sum(given)} bytes are handed over in {len(given)} calls", where,
                        f"{a.nbytes} bytes in one all_reduce", ", ".join(ops))  # fmt: skip


exercise = Exercise(hints, check)
