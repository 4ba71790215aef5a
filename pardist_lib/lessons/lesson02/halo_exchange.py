"""halo_exchange: the neighbours' rows of an image. Typically wrong: where it ends, which rows, and in which order."""

import torch

from ..exercises.cases import F32, F64, I64, one_by_one, untouched, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, by_hand, own_dtype, same, sent
from .shared import call_parts

hints = (
    "The rows that rank - 1 needs from you are your first `halo` rows; rank + 1 needs your last ones. Rank 0 has "
    "no rank above, the last rank none below: zeros stay there.",
    "rows[:, :, :halo] is not contiguous in memory, and messages have to be: .contiguous() copies it.",
    "Start isend and irecv for each neighbour there is, into tensors made with torch.zeros_like, wait for all, "
    "then torch.cat([above, rows, below], dim=2).",
)

CASES = [  # ranks, (batch, channels), heights, width, halo, dtype
    (4, (1, 1), [3, 3, 3, 3], 3, 1, F64), (4, (2, 3), [4, 4, 4, 4], 5, 1, F64), (4, (2, 2), [3, 3, 3, 3], 3, 2, F64),
    (4, (1, 2), [4, 2, 3, 5], 3, 2, F64), (4, (1, 2), [2, 3, 2, 2], 4, 1, F32), (3, (2, 1), [3, 3, 4], 2, 3, I64),
    (2, (1, 1), [2, 1], 3, 1, F64), (4, (1, 2), [2, 2, 1, 1], 2, 0, F64), (1, (1, 2), [3], 2, 2, F64),
]  # fmt: skip


def _news(n, images, heights, width, halo, dtype):
    return {
        f"it works with 4 ranks, but not with {n} (is a 4 written into it?)": n != 4,
        f"it works for halo = 1, but not for halo = {halo}": halo > 1,
        "it does not work for halo = 0 (rows[:, :, -0:] are all rows, not none)": halo == 0,
        "it works for one image with one channel only": images != (1, 1),
        "it works where all heights are equal, but not for unequal ones": len(set(heights)) > 1,
        f"it works for float64, but not for {str(dtype)[6:]}": dtype != F64,
    }


def check(run):
    def one(seed, n, images, heights, width, halo, dtype):
        about = f"batch {images[0]}, channels {images[1]}, heights {' '.join(map(str, heights))}, width {width}, "
        about += f"halo {halo}, {str(dtype)[6:]}, {n} rank{'s' * (n > 1)}"
        whole = values((*images, sum(heights), width), dtype, 0, seed)
        parts = [(part.contiguous(),) for part in whole.split(heights, 2)]
        seen = run(call_parts, ("rows",), parts, halo, n=n if n > 1 else 4, about=about)[:n]
        by_hand(seen)
        untouched(seen, about)
        _judge_values([one.result for one in seen], whole, heights, halo, about)
        _judge_traffic(seen, whole, heights, halo, about)

    one_by_one(CASES, _news, one)


def _judge_values(results, whole, heights, halo, about):
    n, pieces = len(heights), whole.split(heights, 2)
    nothing = whole.new_zeros(*whole.shape[:2], halo, whole.shape[3])
    first, last = [p[:, :, :halo] for p in pieces], [p[:, :, p.shape[2] - halo :] for p in pieces]

    def joined(above, below):
        return [torch.cat([above(r), pieces[r], below(r)], 2) for r in range(n)]

    def up(r, end=nothing):
        return last[r - 1] if r else end

    def down(r, end=nothing):
        return first[r + 1] if r < n - 1 else end

    def none(r):
        return nothing

    expected = joined(up, down)
    _judge_shape(results, expected, heights, halo, about)
    mistakes = [
        ("above and below are swapped", joined(down, up)),
        ("the image is closed to a ring: above rank 0 and below the last rank there are zeros",
         joined(lambda r: up(r, last[-1]), lambda r: down(r, first[0]))),
        ("the neighbours' far rows arrived: rank - 1 sends its last rows down, rank + 1 its first rows up",
         joined(lambda r: first[r - 1] if r else nothing, lambda r: last[r + 1] if r < n - 1 else nothing)),
        ("the rank's own rows are repeated: the halo is the neighbours'", joined(first.__getitem__, last.__getitem__)),
        ("the rank's own rows are repeated where the image ends: zeros are asked for",
         joined(lambda r: up(r, first[r]), lambda r: down(r, last[r]))),
        ("the halo is zero: it was never received", joined(none, none)),
        ("only the halo above arrived", joined(up, none)),
        ("only the halo below arrived", joined(none, down)),
        ("each rank exchanges with one neighbour only: those in the middle have two",
         joined(lambda r: up(r) if r % 2 else nothing, lambda r: nothing if r % 2 else down(r))),
        ("the halo's rows are upside down", joined(lambda r: up(r).flip(2), lambda r: down(r).flip(2))),
    ]  # fmt: skip
    same(results, expected, "the result", about, mistakes)


def _judge_traffic(seen, whole, heights, halo, about):
    row = whole[:, :, :1].nbytes
    for rank, made in enumerate(sent(seen)):
        sides = (rank > 0) + (rank < len(seen) - 1)
        if made != (fair := sides * halo * row):
            if sum(call.op == "send" for call in seen[rank].calls) == sides:
                own_dtype(seen, whole.dtype, about)
            more = ": all its rows are sent, `halo` of them are enough" * (made >= sides * heights[rank] * row > fair)
            why = f"the result is right, but rank {rank} sends {made} bytes{more}"
            raise Wrong(why, about, f"{fair} bytes", f"{made} bytes")


def _judge_shape(results, expected, heights, halo, about):
    """Raise Wrong where the results have four dimensions, but not the right ones."""
    given = [r.shape for r in results if isinstance(r, torch.Tensor) and r.dim() == 4]
    wanted, n = [e.shape for e in expected], len(expected)
    if len(given) < n or given == wanted:
        return
    rank = next(r for r in range(n) if given[r] != wanted[r])
    extra = [shape[2] - height for shape, height in zip(given, heights, strict=True)]
    why = f"{extra[rank]} rows are added to rank {rank}'s: `halo` above and `halo` below make {2 * halo}"
    if given[rank][3] == wanted[rank][3] + 2 * halo:
        why = "the halo is at the left and the right: rows are dimension 2"
    elif set(extra) == {0}:
        why = "the rows come back without any halo"
    elif extra == [halo * ((r > 0) + (r < n - 1)) for r in range(n)]:
        why = "where the image ends, the rows of zeros are missing"
    raise Wrong(why, f"rank {rank}, {about}", f"shape {tuple(wanted[rank])}", f"shape {tuple(given[rank])}")


WHY = (
    "Each rank sends only the rows that its neighbours' filters reach. Stencil codes on MPI do the same and "
    "compute the inner rows meanwhile; DTensor sends halos too, along the last dimension of the images only."
)
exercise = Exercise(hints, check, minutes=25, level="medium", why=WHY)
