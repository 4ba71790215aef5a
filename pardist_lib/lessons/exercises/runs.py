"""Ways to run an answer that several lessons use: on each of a list of inputs in one process, or on ranks in groups."""

import copy

import torch
import torch.distributed as dist

from ..worlds import group_of
from .judge import Wrong, only_calls, same, type_of
from .watch import plain, told, watched

# ---- in one process -------------------------------------------------------------------------------------------

CHANGED = "what it was given has changed: x = x + y makes a new tensor, x += y writes into it"


def results(run, inputs, labels, changed=CHANGED, catch=()):
    """What the answer gives for each of the inputs, which are tuples of arguments; a text for what is in `catch`.

    Raises Wrong where it communicates, or writes into its arguments (`changed` is the diagnosis).
    """
    [seen] = run(_each, inputs, catch, n=1)
    silent(seen)
    for stayed, label in zip(seen.kept, labels, strict=True):
        if not stayed:
            raise Wrong(changed, label)
    return seen.result


def _each(answer, inputs, catch):
    stayed = []

    def all_of_them():
        found = []
        for args in inputs:
            own = copy.deepcopy(args)
            try:
                found.append(plain(told(answer, *own)))
            except catch as error:
                found.append(f"{type(error).__name__}: {error}"[:200])
            stayed.append(alike(args, own))
        return found

    seen = watched(all_of_them)
    seen.kept = stayed
    return seen


def silent(seen):
    """Raise Wrong where an answer communicates that is to compute in one process."""
    if seen.calls:
        raise Wrong(f"it calls {seen.calls[0].op}: this one is plain arithmetic, in one process")


def pair(value, asked, where):
    """`value`; Wrong where it is no pair. asked: "(mean, rows)"."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        got = "" if value is None or "Other(" in repr(value) else f"{value!r:.60}"
        raise Wrong(f"it returns {type_of(value)}: the pair {asked} is asked for", where, got=got)
    return value


def alike(a, b):
    """Whether two arguments are the same, number by number; a NaN is like a NaN."""
    if isinstance(a, torch.Tensor):
        typed = isinstance(b, torch.Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)
        return typed and torch.allclose(a, b, 0, 0, equal_nan=True)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    return a == b


# ---- in groups ------------------------------------------------------------------------------------------------

ALONE = ((0,), (1,), (2,), (3,))  # four groups of one rank each; () stands for all ranks as one group


def named(groups, n):
    """ "3 ranks", "two groups of 2 ranks" """
    if not groups:
        return f"{n} ranks"
    return "two groups of 2 ranks" if len(groups[0]) == 2 else "four groups of 1 rank"


def _in_group(answer, arguments, groups):
    given = arguments[dist.get_rank()]
    own = copy.deepcopy(given)
    seen = watched(answer, *own, **own_group(groups))
    seen.kept = alike(given, own)
    return seen


def in_groups(run, arguments, groups, about, stuck="", on_rank=_in_group):
    """Call the answer with arguments[r] on rank r, in its group; yields each group's members, and their `Seen`.

    on_rank: on_rank(answer, arguments, groups) → Seen, where that is not all; without it, seen.kept says whether the
    arguments are as they were.
    """
    seen = run(on_rank, arguments, groups, n=len(arguments), about=about, stuck=stuck)
    for members in groups or [range(len(arguments))]:
        yield members, [seen[r] for r in members]


def own_group(groups):
    """On a rank: the keyword that gives an answer its group, {} where that is all ranks. Every rank has to call it."""
    made = {rank: group_of(members) for members in groups for rank in members}
    return {"group": made[dist.get_rank()]} if groups else {}


def only_all_reduce(members, seen, because, given, about):
    """Raise Wrong for other calls (because: as in `only_calls`), or where what was given has changed."""
    only_calls(seen, ("all_reduce",), because)
    for rank, one in zip(members, seen, strict=True):
        if not one.kept:
            raise Wrong(f"{given} changed: work on a new tensor", f"rank {rank}, {about}")


def same_mean(members, got, mean, dtype, about, mistakes):
    """Raise Wrong unless all members have this mean in `dtype`. mean, mistakes: as for `same`, in float64."""

    def converted(would):
        return None if would is None else would.to(dtype)

    known = [(why, [*map(converted, w)] if isinstance(w, list) else converted(w)) for why, w in mistakes]
    same(got, mean.to(dtype), "the result", about, known, labels=members)


def few_bytes(members, seen, mean, dtype, about):
    """Raise Wrong where more than a mean's numbers and one other, in two calls, are all-reduced."""
    most = mean.numel() * dtype.itemsize + 8
    for rank, one in zip(members, seen, strict=True):
        made = sum(call.bytes for call in one.calls)
        if len(members) > 1 and (made > most or len(one.calls) > 2):
            why = f"it is right, but {made} bytes in {len(one.calls)} calls are all-reduced"
            raise Wrong(
                f"{why}: {mean.numel()} numbers and 1 do",
                f"rank {rank}, {about}",
                f"at most {most} bytes in 2 calls",
                f"{made} bytes",
            )
