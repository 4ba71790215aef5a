"""What lesson 02's pictures need besides the cuts themselves: who owns what, and the knobs at its end."""

from collections import Counter

import torch
import torch.distributed as dist

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.group import split_sizes
from pardist_lib.mechanisms.tensor_parallel.split_matmul import (
    matmul_by_columns,
    matmul_by_inner,
    matmul_by_rows,
    process_grid,
    summa,
)


def owners(length, n):
    """Which of n ranks has each of `length` rows, or columns: (length,)."""
    return torch.arange(n).repeat_interleave(torch.tensor(split_sizes(length, n)))


def sides(n):
    """(rows, columns) of the grid nearest to a square in which n ranks can stand: 8 → (2, 4)."""
    rows = max(d for d in range(1, n + 1) if n % d == 0 and d * d <= n)
    return rows, n // rows


def watch(ranks, cut, n, rows, inner, columns):
    """A product of small numbers on the first n of `ranks`, cut by "rows", "columns", "inner" or "summa": the picture,
    with what was sent below it."""
    from pardist_lib.pictures import matmul  # here: ranks import this file, too, and draw nothing

    g = torch.Generator().manual_seed(0)
    b = torch.randint(0, 4, (rows, inner), generator=g)
    c = torch.randint(0, 4, (inner, columns), generator=g)
    trace = ranks.trace(in_world, n, _product, cut, b, c)
    summands, made = zip(*trace.results[:n], strict=True)
    high, wide = sides(n)
    a = made[0]
    if cut == "summa":  # blocks, put together
        a = torch.cat([torch.cat(made[i : i + wide], 1) for i in range(0, n, wide)])

    def grid(x, y):
        return owners(x, high)[:, None] * wide + owners(y, wide)

    held = {
        "rows": (owners(rows, n)[:, None], -1, owners(rows, n)[:, None]),
        "columns": (-1, owners(columns, n), owners(columns, n)),
        "inner": (owners(inner, n), owners(inner, n)[:, None], -1),
        "summa": (grid(rows, inner), grid(inner, columns), grid(rows, columns)),
    }[cut]
    shown = summands if cut == "inner" and n > 1 else ()
    note = f"{n} rank{'s' * (n > 1)}: {'' if torch.equal(a, b @ c) else 'not '}the A of one process"
    return matmul(b, c, a, held, summands=shown, title=cut, note=note, lines=_messages(trace))


def _product(cut, b, c):
    """On a rank: (its summand, where A is summed; its block of A by SUMMA, else all of A)."""
    r, n = dist.get_rank(), dist.get_world_size()
    if cut == "summa":
        grid = process_grid(*sides(n))
        return None, summa(grid.block(b), grid.block(c), (len(b), *c.shape), grid)
    if cut == "inner":
        b, c = b.tensor_split(n, 1)[r], c.tensor_split(n)[r]
        return b @ c, matmul_by_inner(b, c, gather=True)
    if cut == "rows":
        return None, matmul_by_rows(b.tensor_split(n)[r], c, gather=True, sizes=split_sizes(len(b), n))
    mine = c.tensor_split(n, 1)[r]
    return None, matmul_by_columns(b, mine, gather=True, sizes=split_sizes(c.shape[1], n))


def _messages(trace):
    """Who sent how much to whom, two to a line."""
    sent = Counter()
    for e in trace.collectives:
        if e.name == "send":
            sent[f"rank {e.rank} → rank {e.peer}:"] += e.bytes
        elif e.name != "recv" and e.rank == 0:
            sent[f"every rank: {e.name} of"] += e.bytes
    said = [f"{what} {size:,} bytes" for what, size in sorted(sent.items())]
    return ["      ".join(said[i : i + 2]) for i in range(0, len(said), 2)] or ["nothing is sent"]
