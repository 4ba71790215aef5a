"""column_split: columns of A from columns of C. Typically wrong: how parts are joined, what is gathered."""

import torch

from ..exercises.cases import F32, F64, I64, untouched
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, only_calls, same
from .shared import call_parts, operands, products

hints = (
    "b @ c_columns is this rank's columns of A, complete: nothing is missing from them, they only have to be put "
    "side by side.",
    "parts = [torch.empty_like(mine) for _ in range(n)]; dist.all_gather(parts, mine) gives every rank all parts, "
    "in the order of ranks.",
    "Columns stand side by side: torch.cat(parts, dim=1). (Along dim 0 they would stand below each other.)",
)


def check(run):
    cases = [(4, (3, 5, 8), F64), (4, (6, 2, 4), F64), (4, (3, 5, 8), F32), (4, (2, 3, 4), I64), (3, (4, 2, 9), F64),
             (2, (1, 3, 4), F32)]  # fmt: skip

    def one(seed, n, shape, dtype, about):
        b, c = operands(shape, dtype, seed)
        parts = [(b, columns.contiguous()) for columns in c.chunk(n, 1)]
        seen = run(call_parts, ("b", "c_columns"), parts, n=n, about=about)
        untouched(seen, about)
        made = [b @ columns for _, columns in parts]
        _judge_values([one.result for one in seen], torch.cat(made, 1), made, about)
        _judge_traffic(seen, torch.cat(made, 1), n * parts[0][1].nbytes, about)

    products(cases, one)


def _judge_values(results, a, made, about):
    n, (m, w), nothing = len(made), made[0].shape, torch.zeros_like(made[0])
    scrambled = (
        "the parts are joined one below the other and reshaped, which scrambles them: join them along dimension 1"
    )
    one_tensor = "all parts are one tensor: [torch.empty_like(x)] * n puts the same one n times into the list, where a "
    one_tensor += "comprehension makes n"

    def joined(of):
        return [torch.cat([of(rank, i) for i in range(n)], 1) for rank in range(n)]

    elsewhere = getattr(results[-1], "shape", a.shape) if equal(results[0], a) else a.shape
    elsewhere = None if elsewhere == a.shape else elsewhere
    mistakes = [
        *((f"it returns a {kind.__name__} of parts: torch.cat joins them", kind) for kind in (list, tuple)),
        ("only rank 0 has the whole A: every rank has to have it", elsewhere),
        ("each rank returns its own columns only: A has to be whole on every rank", made),
        ("the parts stand below each other: they are columns, so they are joined along dimension 1",
         torch.Size([n * m, w])),
        ("the result is transposed", a.T.shape if a.T.shape != a.shape else None),
        (scrambled, torch.cat(made).view(a.shape)),
        ("every rank's columns are its own part, over and over: all_gather's list has everybody's",
         joined(lambda rank, i: made[rank])),
        *((one_tensor, torch.cat([part] * n, 1)) for part in made),
        ("the other ranks' columns are zero: they have to be gathered",
         joined(lambda rank, i: made[i] if i == rank else nothing)),
        ("a rank's own columns are zero", joined(lambda rank, i: nothing if i == rank else made[i])),
        ("the parts are in reverse order: rank 0's columns come first", torch.cat(made[::-1], 1)),
        ("a rank's own columns come first: the order is that of ranks, the same everywhere",
         joined(lambda rank, i: made[rank if i == 0 else i - (i <= rank)])),
        ("the parts are added up: columns are put side by side, nothing has to be added", sum(made).repeat(1, n)),
        ("everything is n times as large: columns are complete, nothing has to be added up", a * n),
    ]  # fmt: skip
    same(results, a, "A", about, mistakes)


def _judge_traffic(seen, a, bytes_of_c, about):
    if not all(sum(call.bytes for call in one.calls) for one in seen):
        raise Wrong("A is right, though nothing was sent: where did the other ranks' columns come from?", about)
    because = {
        "": "A is right, but it calls {op}: one all_gather of a rank's own columns of A is enough",
        "all_reduce": "A is right, but by an all_reduce over zeros, which sends twice as much as an all_gather",
    }
    only_calls(seen, ("all_gather",), because)
    for rank, one in enumerate(seen):
        received = [call.bytes for call in one.calls]  # an all_gather counts as what it fills
        if received != [a.nbytes]:
            why = f"{len(received)} all_gather bring {sum(received)} bytes: once the columns of A is enough"
            if received == [bytes_of_c]:
                why = "the columns of C were gathered and every rank did the whole product: gather the columns of A"
            where = f"rank {rank}, {about}"
            raise Wrong(f"A is right, but {why}", where, f"{a.nbytes} bytes", f"{sum(received)} bytes")


WHY = (
    "A column of A needs only its column of C; side by side they are A. Megatron-LM's ColumnParallelLinear "
    "gathers only when asked (gather_output): the next layer takes the columns as they are (lesson 3)."
)
exercise = Exercise(hints, check, minutes=10, level="easy", why=WHY)
