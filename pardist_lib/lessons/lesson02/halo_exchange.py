"""The exercise halo_exchange."""

import torch

from ..exercises.cases import F32, F64, I64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, by_hand, own_dtype, same, sent
from .shared import call_in_world, inputs_kept

hints = (
    "The rows that rank - 1 needs from you are your first `halo` rows; rank + 1 needs your last ones. Rank 0 has "
    "no rank above, the last rank none below: zeros stay there.",
    "rows[:, :, :halo] is not contiguous in memory, and messages have to be: .contiguous() copies it.",
    "Start isend and irecv for each neighbour there is, into tensors made with torch.zeros_like, wait for all, "
    "then torch.cat([above, rows, below], dim=2).",
)


def check(run):
    cases = [  # ranks, (batch, channels), heights, width, halo, dtype
        (4, (1, 1), [3, 3, 3, 3], 3, 1, F64), (4, (2, 3), [4, 4, 4, 4], 5, 1, F64),
        (4, (2, 2), [3, 3, 3, 3], 3, 2, F64), (4, (1, 2), [4, 2, 3, 5], 3, 2, F64),
        (4, (1, 2), [2, 3, 2, 2], 4, 1, F32), (3, (2, 1), [3, 3, 4], 2, 3, I64), (2, (1, 1), [2, 1], 3, 1, F64),
        (4, (1, 2), [2, 2, 1, 1], 2, 0, F64), (1, (1, 2), [3], 2, 2, F64),
    ]  # fmt: skip
    known = set()
    for seed, (n, (batch, channels), heights, width, halo, dtype) in enumerate(cases):
        about = f"batch {batch}, channels {channels}, heights {' '.join(map(str, heights))}, width {width}, "
        about += f"halo {halo}, {str(dtype)[6:]}, {n} rank{'s' * (n > 1)}"
        new = {
            f"it works with 4 ranks, but not with {n} (is a 4 written into it?)": n != 4,
            f"it works for halo = 1, but not for halo = {halo}": halo > 1,
            "it does not work for halo = 0 (rows[:, :, -0:] are all rows, not none)": halo == 0,
            "it works for one image with one channel only": batch * channels > 1,
            "it works where all heights are equal, but not for unequal ones": len(set(heights)) > 1,
            f"it works for float64, but not for {str(dtype)[6:]}": dtype != F64,
        }
        kinds = {i: text for i, (text, holds) in enumerate(new.items()) if holds}
        whole = values((batch, channels, sum(heights), width), dtype, 0, seed)
        parts = [(part.contiguous(),) for part in whole.split(heights, 2)]
        try:
            seen = run(call_in_world, parts, halo, n=n if n > 1 else 4, about=about)[:n]
            by_hand(seen)
            inputs_kept(seen, parts, ("rows",), about)
            _judge_halo(seen, whole, heights, halo, about)
        except Wrong as wrong:
            if len(fresh := [text for i, text in kinds.items() if i not in known]) == 1:
                wrong.diagnosis = f"{fresh[0]}: {wrong.diagnosis}"
            raise
        known |= kinds.keys()


def _judge_halo(seen, whole, heights, halo, about):
    n = len(seen)
    pieces = whole.split(heights, 2)
    nothing = whole.new_zeros(*whole.shape[:2], halo, whole.shape[3])
    first, last = [p[:, :, :halo] for p in pieces], [p[:, :, p.shape[2] - halo :] for p in pieces]

    def joined(above, below):
        return [torch.cat([above(r), pieces[r], below(r)], 2) for r in range(n)]

    up = lambda r: last[r - 1] if r else nothing  # noqa: E731
    down = lambda r: first[r + 1] if r < n - 1 else nothing  # noqa: E731
    expected = joined(up, down)
    results = [one.result for one in seen]
    _judge_halo_shape(results, expected, heights, halo, about)
    mistakes = [
        ("above and below are swapped", joined(down, up)),
        ("the image is closed to a ring: above rank 0 and below the last rank there are zeros",
         joined(lambda r: last[r - 1], lambda r: first[(r + 1) % n])),
        ("the neighbours' far rows arrived: rank - 1 sends its last rows down, rank + 1 its first rows up",
         joined(lambda r: first[r - 1] if r else nothing, lambda r: last[r + 1] if r < n - 1 else nothing)),
        ("the rank's own rows are repeated: the halo is the neighbours'", joined(first.__getitem__, last.__getitem__)),
        ("the rank's own rows are repeated where the image ends: zeros are asked for",
         joined(lambda r: last[r - 1] if r else first[r], lambda r: first[r + 1] if r < n - 1 else last[r])),
        ("the halo is zero: it was never received", joined(lambda r: nothing, lambda r: nothing)),
        ("only the halo above arrived", joined(up, lambda r: nothing)),
        ("only the halo below arrived", joined(lambda r: nothing, down)),
        ("each rank exchanges with one neighbour only: those in the middle have two",
         joined(lambda r: up(r) if r % 2 else nothing, lambda r: nothing if r % 2 else down(r))),
        ("the halo's rows are upside down", joined(lambda r: up(r).flip(2), lambda r: down(r).flip(2))),
    ]  # fmt: skip
    same(results, expected, "the result", about, mistakes)
    row = whole[:, :, :1].nbytes
    for rank, made in enumerate(sent(seen)):
        sides = (rank > 0) + (rank < n - 1)
        if made != (fair := sides * halo * row):
            if sum(call.op == "send" for call in seen[rank].calls) == sides:
                own_dtype(seen, whole.dtype, about)
            all_of_it = made >= sides * heights[rank] * row > fair
            more = ": all its rows are sent, `halo` of them are enough" if all_of_it else ""
            why = f"the result is right, but rank {rank} sends {made} bytes{more}"
            raise Wrong(why, about, f"{fair} bytes", f"{made} bytes")


def _judge_halo_shape(results, expected, heights, halo, about):
    """Raise Wrong where a result has four dimensions, but not the right ones."""
    given = [r.shape for r in results if isinstance(r, torch.Tensor) and r.dim() == 4]
    wanted = [e.shape for e in expected]
    if len(given) < len(wanted) or given == wanted:
        return
    n, rank = len(wanted), next(r for r in range(len(wanted)) if given[r] != wanted[r])
    extra = [shape[2] - height for shape, height in zip(given, heights, strict=True)]
    if given[rank][3] == wanted[rank][3] + 2 * halo:
        why = "the halo is at the left and the right: rows are dimension 2"
    elif set(extra) == {0}:
        why = "the rows come back without any halo"
    elif extra == [halo * ((r > 0) + (r < n - 1)) for r in range(n)]:
        why = "where the image ends, the rows of zeros are missing"
    else:
        why = f"{extra[rank]} rows are added to rank {rank}'s: `halo` above and `halo` below make {2 * halo}"
    raise Wrong(why, f"rank {rank}, {about}", f"shape {tuple(wanted[rank])}", f"shape {tuple(given[rank])}")


exercise = Exercise(hints, check)
