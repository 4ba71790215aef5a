"""Worlds of another size than the reader's ranks: some of them that see no others, or four where there are others."""

from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import distributed_c10d

from pardist_lib.ranks import Ranks

_groups = {}


def group_of(members):
    """A group of these ranks, made once. Every rank has to call it."""
    members = tuple(members)
    if members not in _groups:
        _groups[members] = dist.new_group(list(members))
    return _groups[members]


@contextmanager
def world(n):
    """Inside, ranks 0 to n-1 are all there are: an answer cannot tell it from a torchrun of n ranks.

    Yields whether this rank is one of them.
    """
    whole = distributed_c10d._get_default_group()
    if n == whole.size():
        yield True
        return
    smaller = group_of(range(n))
    if whole.rank() >= n:
        yield False
        return
    distributed_c10d._update_default_pg(smaller)
    try:
        yield True
    finally:
        distributed_c10d._update_default_pg(whole)


def in_world(n, fn, *args):
    """`fn(*args)` in a world of n ranks; None on the ranks outside."""
    with world(n) as inside:
        return fn(*args) if inside else None


@contextmanager
def four_of(ranks, why):
    """The reader's ranks where they are four; else four others for the length of a `with`, and one line that says so.

    For the few cells that only four ranks can run. why: what in the cell is made for four, as the line shall say it.
    """
    if ranks.n == 4:
        yield ranks
        return
    print(f"made for four ranks, as {why}: four others run this cell, and not your {ranks.n}")
    with Ranks(4) as four:
        yield four
