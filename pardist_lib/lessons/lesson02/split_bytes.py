"""The exercise split_bytes."""

from math import isqrt

from ..exercises.cases import numbers
from ..exercises.exercise import Exercise

hints = (
    "All splits end with the whole A on every rank. A ring all-gather of something of S bytes sends (n - 1)/n · S "
    "from each rank, a ring all-reduce twice that (lesson 1).",
    "A has m · w numbers. Rows and columns: one all-gather of A. Inner: one all-reduce of A.",
    "Grid: a rank's block of B has m · k / n numbers, its block of C k · w / n, and q = √n: (q - 1) times both, "
    "and then an all-gather of A.",
)


def check(run):
    shapes = [(8, 16, 24, 4, 4), (100, 20, 40, 4, 8), (6, 12, 3, 1, 4), (90, 30, 60, 9, 2)]
    inputs = [(split, *shape) for shape in shapes for split in ("rows", "columns", "inner", "grid")]
    inputs += [(split, 12, 9, 6, 3, 4) for split in ("rows", "columns", "inner")]

    def right(split, m, k, w, n, item, gather=1.0, summed=2.0, panel=1.0):
        a = (n - 1) / n * m * w * item
        q = isqrt(n)
        moved = (q - 1) * (m * k + k * w) / n * item
        return {"inner": summed * a, "grid": panel * moved + gather * a}.get(split, a)

    labels = [f"split_bytes({split!r}, {', '.join(map(str, rest))})" for split, *rest in inputs]
    mistakes = [
        ("the inner split's summands are added by an all-reduce, which sends twice what an all-gather does",
         lambda *x: right(*x, summed=1.0)),
        ("\"grid\" ends with an all-gather of A, too", lambda *x: right(*x, gather=0.0)),
        ("\"grid\" lacks the blocks of B and C that travel before A is gathered", lambda *x: right(*x, panel=0.0)),
        ("a number's size is taken as 4 bytes: `item` tells", lambda *x: right(*x[:5], 4)),
        ("this counts numbers: a number has `item` bytes", lambda *x: right(*x[:5], 1)),
        ("this is what all ranks send together: the question is what one of them sends",
         lambda split, m, k, w, n, item: n * right(split, m, k, w, n, item)),
        ("a rank does not send all of A in an all-gather: (n - 1)/n of it",
         lambda split, m, k, w, n, item: {"inner": 2 * m * w * item}.get(
             split, m * w * item + (split == "grid") * (isqrt(n) - 1) * (m * k + k * w) / n * item)),
        ("this is only this rank's own part of A, sent once: in a ring n - 1 parts pass through every rank",
         lambda split, m, k, w, n, item: {"inner": 2 * (n - 1) / n * m * w * item}.get(split, m * w / n * item + (
             split == "grid") * (isqrt(n) - 1) * (m * k + k * w) / n * item)),
        ("in the grid a rank's block goes to the q - 1 others in its row or column, q = √n, not to n - 1",
         lambda split, m, k, w, n, item: right(split, m, k, w, n, item) if split != "grid" else
         (n - 1) * (m * k + k * w) / n * item + right("rows", m, k, w, n, item)),
        ("in the grid a rank's block goes to the q - 1 others: one of q has it already",
         lambda split, m, k, w, n, item: right(split, m, k, w, n, item) if split != "grid" else
         isqrt(n) * (m * k + k * w) / n * item + right("rows", m, k, w, n, item)),
        ("in the grid a rank sends blocks, one n-th of B and of C, not all of them",
         lambda split, m, k, w, n, item: right(split, m, k, w, n, item) if split != "grid" else
         (isqrt(n) - 1) * (m * k + k * w) * item + right("rows", m, k, w, n, item)),
        ("this is what an all-reduce is given: in a ring each rank sends 2(n - 1)/n times that",
         lambda split, m, k, w, n, item: m * w * item if split == "inner" else right(split, m, k, w, n, item)),
        ("in the grid, too, all n ranks bring A together: (n - 1)/n of it, not (q - 1)/q",
         lambda split, m, k, w, n, item: right(split, m, k, w, n, item) if split != "grid" else
         right(split, m, k, w, n, item, gather=0.0) + (isqrt(n) - 1) / isqrt(n) * m * w * item),
        ("in the grid the blocks of C travel, too",
         lambda split, m, k, w, n, item: right(split, m, k, 0 if split == "grid" else w, n, item) +
         (split == "grid") * right("rows", m, k, w, n, item)),
        ("in the grid the blocks of B travel, too",
         lambda split, m, k, w, n, item: right(split, 0 if split == "grid" else m, k, w, n, item) +
         (split == "grid") * right("rows", m, k, w, n, item)),
        ("in the grid a block goes to q - 1 others: one, only where q is 2",
         lambda split, m, k, w, n, item: right(split, m, k, w, n, item) if split != "grid" else
         (m * k + k * w) / n * item + right("rows", m, k, w, n, item)),
        ("in the grid a rank sends its block of B in one of the q steps, its block of C in one: not in all",
         lambda split, m, k, w, n, item: right(split, m, k, w, n, item, panel=isqrt(n))),
        ("\"rows\" and \"columns\" both gather A: B and C stay where they are",
         lambda split, m, k, w, n, item: (n - 1) / n * m * k * item if split == "rows" else
         (n - 1) / n * k * w * item if split == "columns" else right(split, m, k, w, n, item)),
    ]  # fmt: skip
    numbers(run, inputs, [right(*x) for x in inputs], labels, mistakes)


exercise = Exercise(hints, check)
