"""Wrong answers to split_bytes, as people really write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


def right_bytes(split, m, k, w, n, item=4):
    gather = (n - 1) / n * m * w * item
    q = round(n**0.5)
    moved = (q - 1) * (m * k + k * w) / n * item
    return {"inner": 2 * gather, "grid": moved + gather}.get(split, gather)


@mistake("split_bytes", "which sends twice what an all-gather does")
def inner_like_rows(split, m, k, w, n, item=4):
    return (n - 1) / n * m * w * item if split == "inner" else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "ends with an all-gather of A, too")
def grid_without_gather(split, m, k, w, n, item=4):
    gather = (n - 1) / n * m * w * item
    return right_bytes(split, m, k, w, n, item) - (split == "grid") * gather


@mistake("split_bytes", "lacks the blocks of B and C that travel")
def grid_without_panels(split, m, k, w, n, item=4):
    return (n - 1) / n * m * w * item * (2 if split == "inner" else 1)


@mistake("split_bytes", "`item` tells")
def four_bytes(split, m, k, w, n, item=4):
    return right_bytes(split, m, k, w, n)


@mistake("split_bytes", "this counts numbers")
def counts_numbers(split, m, k, w, n, item=4):
    return right_bytes(split, m, k, w, n, 1)


@mistake("split_bytes", "what all ranks send together")
def everybody(split, m, k, w, n, item=4):
    return n * right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "not to n - 1")
def to_all_others(split, m, k, w, n, item=4):
    moved = (n - 1) * (m * k + k * w) / n * item
    return moved + (n - 1) / n * m * w * item if split == "grid" else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "one n-th of B and of C")
def whole_operands(split, m, k, w, n, item=4):
    moved = (round(n**0.5) - 1) * (m * k + k * w) * item
    return moved + (n - 1) / n * m * w * item if split == "grid" else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "B and C stay where they are")
def gathers_operands(split, m, k, w, n, item=4):
    of = {"rows": m * k, "columns": k * w}.get(split)
    return (n - 1) / n * of * item if of else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "what an all-reduce is given")
def given_to_the_all_reduce(split, m, k, w, n, item=4):
    return m * w * item if split == "inner" else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "(n - 1)/n of it, not (q - 1)/q")
def gathers_along_a_row(split, m, k, w, n, item=4):
    q = round(n**0.5)
    moved = (q - 1) * (m * k + k * w) / n * item + (q - 1) / q * m * w * item
    return moved if split == "grid" else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "the blocks of C travel, too")
def only_b_travels(split, m, k, w, n, item=4):
    less = (round(n**0.5) - 1) * k * w / n * item if split == "grid" else 0
    return right_bytes(split, m, k, w, n, item) - less


@mistake("split_bytes", "one, only where q is 2")
def to_one_other(split, m, k, w, n, item=4):
    once = (m * k + k * w) / n * item + (n - 1) / n * m * w * item
    return once if split == "grid" else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "in one of the q steps")
def in_every_step(split, m, k, w, n, item=4):
    q = round(n**0.5)
    more = (q - 1) * (q - 1) * (m * k + k * w) / n * item if split == "grid" else 0
    return right_bytes(split, m, k, w, n, item) + more


@right("split_bytes")
def in_whole_numbers(split, m, k, w, n, item=4):
    q = int(n**0.5)
    gather = m * w * item * (n - 1) / n
    if split in ("rows", "columns"):
        return gather
    return 2 * gather if split == "inner" else item * k * (m + w) * (q - 1) / n + gather
