"""split_bytes: what each split sends. Typically wrong: n where √n counts, or the all-gather that ends them all."""

from math import isqrt

from ..exercises.cases import formula
from ..exercises.exercise import Exercise

hints = (
    "All splits end with the whole A on every rank. A ring all-gather of something of S bytes sends (n - 1)/n · S "
    "from each rank, a ring all-reduce twice that (lesson 1).",
    "A has m · w numbers. Rows and columns: one all-gather of A. Inner: one all-reduce of A.",
    "Grid: a rank's block of B has m · k / n numbers, its block of C k · w / n, and q = √n: (q - 1) times both, "
    "and then an all-gather of A.",
)


def _gathered(m, k, w, n, q):
    """How many numbers a rank sends until A, of which each has its part, is whole everywhere."""
    return (n - 1) / n * m * w


def _blocks(m, k, w, n, q):
    """… of this rank's blocks of B and of C."""
    return (m * k + k * w) / n


def _sent(rows=_gathered, columns=_gathered, inner=lambda *x: 2 * _gathered(*x), moved=None, gathered=_gathered):
    """split_bytes, where something is changed. In the grid: moved, blocks of B and C; gathered, of A."""
    moved = moved or (lambda *x: (x[-1] - 1) * _blocks(*x))

    def split_bytes(split, m, k, w, n, item):
        x = m, k, w, n, isqrt(n)
        if split == "grid":
            return item * (moved(*x) + gathered(*x))
        return item * {"rows": rows, "columns": columns, "inner": inner}[split](*x)

    return split_bytes


def check(run):
    shapes = [(8, 16, 24, 4, 4), (100, 20, 40, 4, 8), (6, 12, 3, 1, 4), (90, 30, 60, 9, 2)]
    inputs = [(split, *shape) for shape in shapes for split in ("rows", "columns", "inner", "grid")]
    inputs += [(split, 12, 9, 6, 3, 4) for split in ("rows", "columns", "inner")]
    right = _sent()

    def whole(m, k, w, n, q):
        return m * w

    def own(m, k, w, n, q):
        return m * w / n

    mistakes = [
        ("the inner split's summands are added by an all-reduce, which sends twice what an all-gather does",
         _sent(inner=_gathered)),
        ("\"grid\" ends with an all-gather of A, too", _sent(gathered=lambda *x: 0)),
        ("\"grid\" lacks the blocks of B and C that travel before A is gathered", _sent(moved=lambda *x: 0)),
        ("a number's size is taken as 4 bytes: `item` tells", lambda *x: right(*x[:5], 4)),
        ("this counts numbers: a number has `item` bytes", lambda *x: right(*x[:5], 1)),
        ("this is what all ranks send together: the question is what one of them sends", lambda *x: x[4] * right(*x)),
        ("a rank does not send all of A in an all-gather: (n - 1)/n of it",
         _sent(whole, whole, lambda *x: 2 * whole(*x), gathered=whole)),
        ("this is only this rank's own part of A, sent once: in a ring n - 1 parts pass through every rank",
         _sent(own, own, gathered=own)),
        ("in the grid a rank's block goes to the q - 1 others in its row or column, q = √n, not to n - 1",
         _sent(moved=lambda *x: (x[3] - 1) * _blocks(*x))),
        ("in the grid a rank's block goes to the q - 1 others: one of q has it already",
         _sent(moved=lambda *x: x[4] * _blocks(*x))),
        ("in the grid a rank sends blocks, one n-th of B and of C, not all of them",
         _sent(moved=lambda *x: (x[4] - 1) * x[3] * _blocks(*x))),
        ("this is what an all-reduce is given: in a ring each rank sends 2(n - 1)/n times that", _sent(inner=whole)),
        ("in the grid, too, all n ranks bring A together: (n - 1)/n of it, not (q - 1)/q",
         _sent(gathered=lambda m, k, w, n, q: (q - 1) / q * m * w)),
        ("in the grid the blocks of C travel, too", _sent(moved=lambda m, k, w, n, q: (q - 1) * m * k / n)),
        ("in the grid the blocks of B travel, too", _sent(moved=lambda m, k, w, n, q: (q - 1) * k * w / n)),
        ("in the grid a block goes to q - 1 others: one, only where q is 2", _sent(moved=_blocks)),
        ("in the grid a rank sends its block of B in one of the q steps, its block of C in one: not in all",
         _sent(moved=lambda *x: x[4] * (x[4] - 1) * _blocks(*x))),
        ("\"rows\" and \"columns\" both gather A: B and C stay where they are",
         _sent(lambda m, k, w, n, q: (n - 1) / n * m * k, lambda m, k, w, n, q: (n - 1) / n * k * w)),
    ]  # fmt: skip
    formula(run, right, inputs, mistakes)


WHY = (
    "What stays whole decides: an all-gather of A, twice that for summands, or blocks that shrink with √n. NCCL "
    "sends the same bytes when it takes rings; DTensor weighs such costs when it chooses how to redistribute its "
    "operands."
)
exercise = Exercise(hints, check, minutes=20, level="medium", why=WHY)
