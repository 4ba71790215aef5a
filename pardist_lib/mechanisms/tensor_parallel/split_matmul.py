"""One matrix product on several ranks: A = B × C, cut into blocks that no rank ever holds all of.

B is (m, k), C is (k, w), A is (m, w); n ranks. Which operand is cut, and where, decides what has to be sent:

                  a rank holds           and finds                           the whole A on every rank
    by rows       B's rows, all of C     its rows of A                       rows gathered,    (n − 1)/n·A sent
    by columns    all of B, C's columns  its columns of A                    columns gathered, (n − 1)/n·A sent
    by inner      B's columns, C's rows  a summand of all of A, to be added  one all-reduce of A
    summa         a block of B and of C  its block of A, a sum over panels   blocks gathered, after B's and C's
                                         that travel                         panels have travelled

A tensor is cut as torch.tensor_split cuts, so n need not divide anything. Everything is differentiable: what a rank
gives to backward is the gradient of what this function returned to it. group: a process group, None for all ranks.

Source: van de Geijn, Watts, "SUMMA: Scalable Universal Matrix Multiplication Algorithm" (1997), for transposed
operands too, which is what backward needs.
"""

from bisect import bisect_right
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from ..collectives.autograd import copy_to_group, gather_from_group, reduce_from_group, reduce_scatter_to_group
from ..collectives.point_to_point import exchange, wait
from ..group import rank_and_size, split_sizes

# ---- one dimension is cut -------------------------------------------------------------------------------------


def matmul_by_rows(b, c, group=None, *, gather=False, sizes=None):
    """This rank's rows of A = B × C, from its rows of B and all of C; with `gather`, all of A.

    b: (this rank's rows, k); c: (k, w), the same on every rank. sizes: every rank's rows, where they differ.
    Returns (this rank's rows, w), or (m, w). Raises ValueError where shapes, dtypes or sizes do not fit.
    Forward sends nothing, with `gather` an all-gather, (n − 1)/n of A's bytes; backward one all-reduce of C's.
    """
    _check_factors("matmul_by_rows", b, c)
    a = b @ copy_to_group(c, group)
    return gather_from_group(a, 0, group, sizes) if gather else a


def matmul_by_columns(b, c, group=None, *, gather=False, sizes=None):
    """This rank's columns of A = B × C, from all of B and its columns of C; with `gather`, all of A.

    b: (m, k), the same on every rank; c: (k, this rank's columns). sizes: every rank's columns, where they differ.
    Returns (m, this rank's columns), or (m, w). Raises ValueError where shapes, dtypes or sizes do not fit.
    Forward sends nothing, with `gather` an all-gather, (n − 1)/n of A's bytes; backward one all-reduce of B's.
    """
    _check_factors("matmul_by_columns", b, c)
    a = copy_to_group(b, group) @ c
    return gather_from_group(a, 1, group, sizes) if gather else a


def matmul_by_inner(b, c, group=None, *, gather=False):
    """This rank's rows of A = B × C, from its columns of B and the same rows of C; with `gather`, all of A.

    b: (m, this rank's share of k); c: (this rank's share of k, w). Each rank's product is as large as A and is only
    a summand of it. Returns (split_sizes(m, n)[rank], w), or (m, w). Raises ValueError where shapes do not fit.
    Forward sends a reduce-scatter, (n − 1)/n of A's bytes, with `gather` one all-reduce of A's bytes; backward an
    all-gather, (n − 1)/n of A's bytes, with `gather` nothing.
    """
    _check_factors("matmul_by_inner", b, c)
    summand = b @ c
    return reduce_from_group(summand, group) if gather else reduce_scatter_to_group(summand, 0, group)


# ---- two dimensions are cut -----------------------------------------------------------------------------------


class Grid(NamedTuple):
    """Ranks in rows and columns: this rank is in row `row`, column `column`. Rank 0 is top left, rank 1 beside it."""

    rows: int
    columns: int
    row: int
    column: int
    group: object = None

    def block(self, matrix):
        """This rank's block of a matrix, a view."""
        return matrix.tensor_split(self.rows)[self.row].tensor_split(self.columns, 1)[self.column]

    def beside(self):
        """The other ranks of this row, {column: number within the group}."""
        return {j: self.row * self.columns + j for j in range(self.columns) if j != self.column}

    def below(self):
        """The other ranks of this column, {row: number within the group}."""
        return {i: i * self.columns + self.column for i in range(self.rows) if i != self.row}


def process_grid(rows, columns, group=None):
    """The ranks of a group as a `Grid`. Sends nothing, and makes no groups.

    Raises ValueError where the group does not have rows × columns ranks.
    """
    rank, n = rank_and_size(group)
    if rows < 1 or columns < 1 or rows * columns != n:
        fitting = ", ".join(f"{r}×{n // r}" for r in range(1, n + 1) if n % r == 0)
        raise ValueError(f"process_grid: {rows}×{columns} ranks asked for, the group has {n}: {fitting} would fit")
    return Grid(rows, columns, *divmod(rank, columns), group)


def summa(b, c, shape, grid, *, gather=False, panel=None):
    """This rank's block of A = B × C, from its blocks of B and of C; with `gather`, all of A.

    b, c: what grid.block cuts from B, (m, k), and from C, (k, w). shape: (m, k, w), of the whole product.
    panel: inner indices in one step at most; by default as many as one rank has, so that a message is a whole block.
    Returns what grid.block cuts from A, or (m, w). Raises ValueError where b or c is not this rank's block.

    In each step the ranks that have the next columns of B send them along their rows of the grid, those that have the
    next rows of C send them along their columns, and every rank adds the product of the two to its block. The next
    step's messages are under way while a rank multiplies. Forward a rank sends its block of B to columns − 1 ranks
    and its block of C to rows − 1 ranks; backward it does so again, and sends as many summands of their gradients as
    it was sent panels; with `gather`, an all-gather of A more.
    """
    m, k, w = shape
    _check_factors("summa", b, c, inner=False)
    for name, block, whole in (("b", b, (m, k)), ("c", c, (k, w))):
        mine = split_sizes(whole[0], grid.rows)[grid.row], split_sizes(whole[1], grid.columns)[grid.column]
        if tuple(block.shape) != mine:
            raise ValueError(
                f"summa: {name} has shape {tuple(block.shape)}, but row {grid.row}, column {grid.column} of a "
                f"{grid.rows}×{grid.columns} grid has {mine} of a {whole} matrix: grid.block(matrix) cuts it"
            )
    a = _Summa.apply(b, c, k, grid, panel or max(k, 1))
    if not gather:
        return a
    high, wide = split_sizes(m, grid.rows), split_sizes(w, grid.columns)
    shapes = [(h, v) for h in high for v in wide]
    counts = [h * v for h, v in shapes]
    parts = gather_from_group(a.flatten(), 0, grid.group, counts).split(counts)
    blocks = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return torch.cat([torch.cat(blocks[i : i + grid.columns], 1) for i in range(0, len(blocks), grid.columns)])


class _Summa(torch.autograd.Function):
    @staticmethod
    def forward(ctx, b, c, inner, grid, panel):
        ctx.save_for_backward(b, c)
        ctx.how = inner, grid, panel
        a = b.new_zeros(b.shape[0], c.shape[1])
        for b_panel, c_panel, _ in _broadcast_panels(b, c, inner, grid, panel):
            a.addmm_(b_panel, c_panel)
        return a

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        b, c = ctx.saved_tensors
        inner, grid, panel = ctx.how
        b_grad, c_grad = torch.zeros_like(b), torch.zeros_like(c)
        for b_panel, c_panel, at in _broadcast_panels(b, c, inner, grid, panel):
            # this rank's block of A gives a summand; a panel's owner needs the sum over its row, or its column
            _add_up(grad @ c_panel.T, b_grad[:, at.in_b], at.owner_column, grid.column, grid.beside(), grid.group)
            _add_up(b_panel.T @ grad, c_grad[at.in_c], at.owner_row, grid.row, grid.below(), grid.group)
        return b_grad, c_grad, None, None, None


class Panel(NamedTuple):
    """Some inner indices that lie in one block of B and in one block of C."""

    first: int
    last: int  # excluded
    owner_column: int  # of the grid, where B's columns first … last are
    owner_row: int  # where C's rows first … last are
    in_b: slice  # their place in the owners' blocks
    in_c: slice


def panels(inner, rows, columns, widest=None):
    """The steps of `summa` on a rows × columns grid, a list of `Panel`; B's inner cuts and C's need not coincide."""
    in_b, in_c = ([0, *accumulate(split_sizes(inner, parts))] for parts in (columns, rows))
    steps = []
    for start, end in pairwise(sorted({*in_b, *in_c})):
        for first in range(start, end, widest or inner):
            last = min(first + (widest or inner), end)
            owners = bisect_right(in_b, first) - 1, bisect_right(in_c, first) - 1
            places = [slice(first - cuts[i], last - cuts[i]) for cuts, i in zip((in_b, in_c), owners, strict=True)]
            steps.append(Panel(first, last, *owners, *places))
    return steps


def _broadcast_panels(b, c, inner, grid, widest):
    """(B's panel, C's panel, its `Panel`) on every rank, one after the other; the next is on its way meanwhile."""
    steps = panels(inner, grid.rows, grid.columns, widest)
    coming = _send(b, c, steps[0], grid) if steps else None
    for here, after in zip(steps, [*steps[1:], None], strict=False):
        b_panel, c_panel, works = coming
        coming = after and _send(b, c, after, grid)
        wait(works)
        yield b_panel, c_panel, here


def _send(b, c, at, grid):
    """Start one step's messages: (B's panel, C's panel, what to wait for)."""
    wide, sends, receives = at.last - at.first, [], []
    if at.owner_column == grid.column:
        b_panel = b[:, at.in_b].contiguous()
        sends += [(b_panel, peer) for peer in grid.beside().values()]
    else:
        b_panel = b.new_empty(b.shape[0], wide)
        receives.append((b_panel, grid.beside()[at.owner_column]))
    if at.owner_row == grid.row:
        c_panel = c[at.in_c].contiguous()
        sends += [(c_panel, peer) for peer in grid.below().values()]
    else:
        c_panel = c.new_empty(wide, c.shape[1])
        receives.append((c_panel, grid.below()[at.owner_row]))
    return b_panel, c_panel, exchange(sends, receives, grid.group)


def _add_up(summand, total, owner, here, peers, group):
    """The sum of a row's, or a column's, summands into `total` of the member `owner`; `here`: this rank's number."""
    if owner != here:
        return wait(exchange([(summand.contiguous(), peers[owner])], group=group))
    theirs = [torch.empty_like(summand, memory_format=torch.contiguous_format) for _ in peers]
    wait(exchange(receives=list(zip(theirs, peers.values(), strict=True)), group=group))
    total.copy_(sum(theirs, summand))


# ---- what does not fit ----------------------------------------------------------------------------------------


def _check_factors(name, b, c, inner=True):
    """Raise ValueError unless b and c are matrices that can be multiplied."""
    if b.dim() != 2 or c.dim() != 2:
        raise ValueError(f"{name} multiplies matrices: b has shape {tuple(b.shape)}, c {tuple(c.shape)}")
    if b.dtype != c.dtype or b.device != c.device:
        raise ValueError(f"{name}: b is {b.dtype} on {b.device}, c {c.dtype} on {c.device}: they have to be alike")
    if inner and b.shape[1] != c.shape[0]:
        raise ValueError(
            f"{name}: b {tuple(b.shape)} has {b.shape[1]} columns, c {tuple(c.shape)} has {c.shape[0]} rows: they are "
            "one dimension, the inner one, and have to be equal (if it is cut, both are cut alike)"
        )
