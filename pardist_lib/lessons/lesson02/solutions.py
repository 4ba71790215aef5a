"""Reference solutions of lesson 02. Their signatures and docstrings are the blanks of the notebook."""

import torch
import torch.distributed as dist


def column_split(b: torch.Tensor, c_columns: torch.Tensor) -> torch.Tensor:
    """A = B × C, where each rank has its own columns of C. Called on every rank.

    b: (m, k), all of B, the same on every rank. c_columns: (k, columns), this rank's columns of C;
    every rank has equally many. Rank 0 has the first ones. Both stay as they are.
    Returns A, (m, n · columns) with n ranks, whole on every rank.
    Sends: one dist.all_gather of this rank's columns of A, nothing else.
    """
    columns = b @ c_columns  # (m, columns)
    parts = [torch.empty_like(columns) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, columns)
    return torch.cat(parts, dim=1)  # (m, n · columns)


def inner_split(b_columns: torch.Tensor, c_rows: torch.Tensor) -> torch.Tensor:
    """A = B × C, where the inner dimension is cut. Called on every rank.

    b_columns: (m, share), this rank's columns of B. c_rows: (share, w), the rows of C that belong
    to them. The shares may differ from rank to rank; a share may be 0. Both stay as they are.
    Returns A, (m, w), whole on every rank.
    Sends: one dist.all_reduce of m · w numbers, nothing else.
    """
    a = b_columns @ c_rows  # as large as A, and only a summand of it
    dist.all_reduce(a)
    return a


def summa_step(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, step: int, q: int) -> None:
    """One step of SUMMA on q × q ranks. Called on every rank.

    Rank i·q + j stands in row i and column j of the grid.
    a, b, c: this rank's blocks of A, B and C: (m, w), (m, k), (k, w), the same shapes on every
    rank. b and c stay as they are. step: 0 to q - 1.
    In place: a grows by (the block of B in this rank's row, column `step`) @ (the block of C in row
    `step`, this rank's column).
    Sends: dist.isend and dist.irecv (or send, recv) only: the ranks in column `step` send b to the
    others in their row, the ranks in row `step` send c to the others in their column.
    """
    i, j = divmod(dist.get_rank(), q)
    beside, below = [i * q + x for x in range(q) if x != j], [x * q + j for x in range(q) if x != i]
    b_block = b if j == step else torch.empty_like(b)
    c_block = c if i == step else torch.empty_like(c)
    if j == step:
        messages = [dist.isend(b, other) for other in beside]
    else:
        messages = [dist.irecv(b_block, i * q + step)]
    if i == step:
        messages += [dist.isend(c, other) for other in below]
    else:
        messages += [dist.irecv(c_block, step * q + j)]
    for message in messages:
        message.wait()
    a += b_block @ c_block


def split_bytes(split: str, m: int, k: int, w: int, n: int, item: int = 4) -> float:
    """How many bytes each of n ranks sends until every rank has the whole A = B × C.

    B is (m, k), C is (k, w), A is (m, w); a number has `item` bytes. All sizes can be divided as
    needed.
    split: "rows" or "columns": every rank finds its part of A, and a ring all-gather brings A
    together.
    "inner": every rank finds a summand of A, and a ring all-reduce adds them up.
    "grid": SUMMA on q × q ranks, n = q · q: each rank sends its block of B to the q - 1 others in
    its row and its block of C to the q - 1 others in its column, and a ring all-gather brings A
    together.
    """
    gather = (n - 1) / n * m * w * item
    if split == "inner":
        return 2 * gather
    if split == "grid":
        q = round(n**0.5)
        return (q - 1) * (m * k + k * w) / n * item + gather
    return gather


def halo_exchange(rows: torch.Tensor, halo: int) -> torch.Tensor:
    """This rank's rows of some images, and `halo` rows of each neighbour. Called on every rank.

    rows: (batch, channels, height, width): rank 0 has the top rows, the last rank the bottom ones;
    heights may differ, and are at least `halo`. It stays as it is. halo: 0 or more.
    Returns (batch, channels, height + 2 · halo, width): above, the last rows of rank - 1; below,
    the first rows of rank + 1; zeros where the image ends.
    Sends: dist.isend and dist.irecv (or send, recv) only: `halo` rows to each neighbour.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    height, messages = rows.shape[2], []
    above, below = (torch.zeros_like(rows[:, :, :halo]).contiguous() for _ in range(2))
    if rank > 0:
        messages.append(dist.isend(rows[:, :, :halo].contiguous(), rank - 1))
        messages.append(dist.irecv(above, rank - 1))
    if rank < n - 1:
        messages.append(dist.isend(rows[:, :, height - halo :].contiguous(), rank + 1))
        messages.append(dist.irecv(below, rank + 1))
    for message in messages:
        message.wait()
    return torch.cat([above, rows, below], dim=2)
