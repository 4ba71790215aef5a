"""inner_split: each rank has a summand of A. Typically wrong: summands side by side, or only one rank with the sum."""

import torch

from ..exercises.cases import F32, F64, I64, untouched
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, only_calls, same
from .shared import call_parts, operands, products

hints = (
    "b_columns @ c_rows has the shape of A already. What is missing in its numbers?",
    "A[i, j] is a sum over the inner index, and every rank has the terms of its own share. Terms are added, not "
    "put side by side.",
    "a = b_columns @ c_rows; dist.all_reduce(a); return a.",
)


def check(run):
    cases = [(4, (8, 8, 8), F64), (4, (3, 10, 2), F64), (4, (3, 8, 5), F32), (4, (2, 9, 3), I64), (3, (4, 6, 2), F64),
             (2, (1, 5, 4), F32), (4, (3, 3, 4), F64)]  # fmt: skip

    def one(seed, n, shape, dtype, about):
        b, c = operands(shape, dtype, seed)
        ends = [
            shape[1] * r // n if seed == 0 else shape[1] * r * r // n**2 for r in range(n + 1)
        ]  # equal in the first
        shares = list(map(slice, ends, ends[1:]))
        parts, sizes = [(b[:, s].contiguous(), c[s].contiguous()) for s in shares], [s.stop - s.start for s in shares]
        about += f", shares {' '.join(map(str, sizes))}"
        stuck = "the ranks do not make the same calls: one whose share is 0 has to bring its zeros, too" * (0 in sizes)
        seen = run(call_parts, ("b_columns", "c_rows"), parts, n=n, about=about, stuck=stuck)
        untouched(seen, about)
        _judge_values(seen, parts, b @ c, about)
        _judge_traffic(seen, b @ c, about)

    products(cases, one)


def _judge_values(seen, parts, a, about):
    n, made, results = len(seen), [b @ c for b, c in parts], [one.result for one in seen]
    (m, w), stacked, everywhere = a.shape, torch.stack(made), f"every rank, {about}"
    if any(call.op == "reduce" for call in seen[0].calls) and [equal(result, a) for result in results].count(True) == 1:
        raise Wrong("only rank 0 has the sum: every rank has to have it, as all_reduce does", everywhere)
    sums = None
    if len({b.shape for b, _ in parts}) == 1:
        sums = sum(b for b, _ in parts) @ sum(c for _, c in parts)
    beside = "the ranks' products are put side by side: each is a summand as large as A, they have to be added up"
    mistakes = [
        *((f"it returns a {kind.__name__} of summands: they have to be added up", kind) for kind in (list, tuple)),
        *((beside, torch.Size(shape)) for shape in ((n * m, w), (m, n * w), (n, m, w))),
        ("only rank 0 has the sum: every rank has to have it", [None, *made[1:]]),
        ("each rank returns its own summand: the sum over the ranks is missing", made),
        ("this is the mean of the summands: A is their sum", a / n if a.is_floating_point() else a // n),
        ("this is the largest summand, element by element: A is their sum", stacked.amax(0)),
        ("this is the product of the summands: A is their sum", stacked.prod(0)),
        ("the result is transposed", a.T if m == w else None),
        ("a rank's own summand counts twice", [a + mine for mine in made]),
        ("a rank's own summand is missing", [a - mine for mine in made]),
        ("every rank returns rank 0's summand: they have to be added up", made[0]),
        ("B and C were added up over the ranks before multiplying: the products are what is to be added", sums),
    ]
    same(results, a, "A", about, mistakes)


def _judge_traffic(seen, a, about):
    n = len(seen)
    why = "A is right, but it calls {op}: one all_reduce of a rank's product is enough"
    only_calls(seen, ("all_reduce", "reduce_scatter", "all_gather"), {"": why})
    for rank, one in enumerate(seen):
        given, ops, shown = [call.bytes for call in one.calls], [call.op for call in one.calls], ()
        if not given:
            why = "A is right, though nothing was sent: where did the other ranks' summands come from?"
        elif ops == ["all_gather"] and given == [n * a.nbytes]:
            why = f"A is right, but every summand goes to every rank: that sends {n - 1} · A from each, an all_reduce "
            why += f"2({n} - 1)/{n} · A"
        elif "all_reduce" not in ops and "reduce_scatter" not in ops:
            why = (
                "A is right, but the operands were gathered and every rank did the whole product: multiply first, then "
            )
            why += "add up"
        elif ops != ["all_reduce"] or given != [a.nbytes]:
            why = f"A is right, but {sum(given)} bytes are handed over in {len(given)} calls"
            shown = f"{a.nbytes} bytes in one all_reduce", ", ".join(ops)
        else:
            continue
        raise Wrong(why, f"rank {rank}, {about}", *shown)


WHY = (
    "Each rank has one part of every sum, so the parts are added. Megatron-LM's RowParallelLinear ends in this "
    "all-reduce, or, with sequence parallelism, in a reduce-scatter, which leaves each rank only its part of the "
    "sum."
)
exercise = Exercise(hints, check, minutes=10, level="easy", why=WHY)
