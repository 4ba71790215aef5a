"""tied_gradient: both parts of a table's gradient, added up on both ends. Typically wrong: on one, or a mean."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, PAIRS, values, what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, own_dtype, same, sent
from ..exercises.runs import ALONE, in_groups, named, own_group
from ..exercises.watch import plain, watched
from .shared import receivers

hints = (
    "Both ends need the same sum, or their copies of the table differ after one step. So each sends its part to the "
    "other one, and adds what it gets. The ranks between do nothing.",
    "dist.send comes back when the other side receives: if both ends send first, both wait for ever. dist.isend comes "
    "back at once; wait() for it after dist.recv.",
    "rank 0 and rank n - 1 count in the group: dist.get_rank(group), group_dst= and group_src=. A gradient that is "
    "None is sent as zeros: torch.zeros_like(weight).",
)
CASES = [  # ranks, groups, shape, dtype, the ranks whose .grad is None, what is new
    (4, (), (5, 3), F64, (), ""),
    (3, (), (4, 2), F32, (), "with 3 ranks (is a 4 written into it?)"),
    (2, (), (6,), F64, (), "with 2 ranks, both of them ends"),
    (4, (), (5, 3), F64, (3,), "where the last rank's .grad is None"),
    (4, (), (2, 2), F64, (0,), "where the first rank's .grad is None"),
    (4, PAIRS, (3, 4), F64, (), "in two groups of 2 ranks"),
    (4, ALONE, (3, 2), F64, (), "in a group of one rank, whose only table is first and last"),
]
BECAUSE = {
    "all_reduce": "it calls all_reduce, in which all ranks take part, those without a table, too: two messages between "
    "the ends are enough, by send and receive",
    "broadcast": "it calls broadcast: two messages between the ends are enough, by send and receive",
    "barrier": "it calls barrier: send and receive wait as long as is needed",
    "": "it calls {op}: two messages between the ends are enough, by send and receive",
}


def check(run):
    for seed, (n, groups, shape, dtype, empty, new) in enumerate(CASES):
        about = f"a table of shape {shape} on {named(groups, n)}"
        given = [(shape, dtype, seed, rank in empty) for rank in range(n)]
        with what_is_new(new):
            for members, seen in in_groups(run, given, groups, about, on_rank=_on_rank):
                _judge(members, seen, shape, dtype, seed, empty, about)


def _part(rank, shape, dtype, seed):
    return values(shape, dtype, 40 + rank, seed)


def _on_rank(answer, arguments, groups):
    options, rank = own_group(groups), dist.get_rank()
    shape, dtype, seed, empty = arguments[rank]
    place, n = dist.get_rank(**options), dist.get_world_size(**options)
    weight = None
    if place in (0, n - 1):
        weight = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
        weight.grad = None if empty else _part(rank, shape, dtype, seed)
    seen = watched(answer, weight, **options)
    seen.kept = None if weight is None else {"grad": plain(weight.grad), "moved": bool((weight != 1).any())}
    return seen


def _judge(members, seen, shape, dtype, seed, empty, about):
    only_calls(seen, ("send", "recv"), BECAUSE)
    ends = sorted({0, len(members) - 1})
    parts = [
        torch.zeros(shape, dtype=dtype) if members[e] in empty else _part(members[e], shape, dtype, seed) for e in ends
    ]
    mine, labels = [seen[e].kept for e in ends], [members[e] for e in ends]
    for rank, kept in zip(labels, mine, strict=True):
        if kept["moved"]:
            raise Wrong("the table itself has changed: its .grad is what is added up", f"rank {rank}, {about}")
        if kept["grad"] is None:
            why = ".grad is None afterwards: a rank that found no gradient needs the other one's, too"
            raise Wrong(why, f"rank {rank}, {about}")
    total, size = sum(parts), parts[0].nbytes
    mistakes = [
        ("only the first rank has the sum: the last one's table takes another step", [total, *parts[1:]]),
        ("only the last rank has the sum: the first one's table takes another step", [*parts[:-1], total]),
        ("each end has its own part still: the copies of the table are different after one step", parts),
        ("this is the mean: a table that is used in two places has the sum of both gradients", total / 2),
        ("the parts are exchanged, not added up", parts[::-1]),
        ("both have the last rank's part: the first one's is lost", parts[-1]),
        ("both have the first rank's part: the last one's is lost", parts[0]),
        ("the sum counts twice: what was sent had the other's part in it already", 2 * total),
        ("its own part counts twice", [total + p for p in parts]),
        ("the other one's part counts twice", [2 * total - p for p in parts]),
    ]
    if len(ends) == 1:
        mistakes = [("a gradient is added to itself: there is one table, and its .grad is whole", 2 * total)]
    same([kept["grad"] for kept in mine], total, "the table's .grad", about, mistakes, labels=labels)
    own_dtype(seen, dtype, about)
    for place, (rank, made, to) in enumerate(zip(members, sent(seen), map(receivers, seen), strict=True)):
        other = members[len(members) - 1 - place]
        due = size if place in ends and len(ends) == 2 else 0
        if made != due or to - {other}:
            why = f"the sum is right, but rank {rank} sends {made} bytes to {sorted(to) or 'nobody'}"
            raise Wrong(why, about, f"{due} bytes" + (f" to rank {other}" if due else ""), f"{made} bytes")


WHY = (
    "One weight in two places has the sum of both places' gradients, and both copies must take the same step. "
    "Megatron-LM all-reduces in a group of first and last stage; PyTorch's pipelines leave it to you. On nccl a send "
    "and a receive that cross have to be started together, by dist.batch_isend_irecv."
)
exercise = Exercise(hints, check, minutes=12, level="medium", why=WHY)
