"""run_row: a rank's actions with their messages. Typically wrong: all sends wait, and two ranks wait for each other."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, PAIRS, values, what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, by_hand, own_dtype, same, sent
from ..exercises.runs import ALONE, in_groups, named, own_group
from ..exercises.watch import plain, watched
from .shared import receivers

hints = (
    "Who gives a micro-batch to whom? F takes from rank - 1 and gives to rank + 1; B the other way round. First and "
    "last rank leave one of them out.",
    "Under 1F1B one rank sends y on, while the next one sends a gradient back. If both wait in send, nobody receives. "
    "A send that does not wait, dist.isend, lets the rank go on to its next receive.",
    "Keep what isend returns in a list, and wait() for all of it after the last action. A tensor that is under way "
    "must not be changed; dist.recv needs a new torch.empty_like(like) for each message.",
    "for action in row: kind, i = action[0], int(action[1:]); F: x = recv from rank - 1 (if rank > 0), y = forward(i, "
    "x), isend y to rank + 1 (if rank < n - 1). group_src= and group_dst= count in the group.",
)
STUCK = (
    "the ranks wait for each other: one is in send while the next one sends, too, and nobody receives. dist.isend goes "
    "on at once; wait() for it at the end"
)
ORDERS = {
    "GPipe": lambda rank, n, m: m,
    "1F1B": lambda rank, n, m: n - rank - 1,
    "1F1B, one ahead": lambda r, n, m: n - r,
}
CASES = [  # ranks, groups, order, micro-batches, dtype, what is new
    (4, (), "GPipe", 3, F64, ""),
    (2, (), "1F1B", 4, F64, "GPipe runs, 1F1B does not"),
    (4, (), "1F1B", 6, F32, ""),
    (3, (), "1F1B, one ahead", 5, F64, ""),
    (4, PAIRS, "1F1B", 3, F64, "in two groups of 2 ranks"),
    (4, ALONE, "1F1B", 2, F64, "in a group of one rank, the first and the last"),
]
SHAPE = (64, 65)  # 33 KB in float64: no message is small enough to be sent without a receiver


def check(run):
    for seed, (n, groups, order, m, dtype, new) in enumerate(CASES):
        about = f"{order}, {m} micro-batches on {named(groups, n)}"
        given = [(order, m, dtype, seed)] * n
        with what_is_new(new):
            for members, seen in in_groups(run, given, groups, about, STUCK if "1F1B" in order else "", _on_rank):
                _judge(members, seen, order, m, dtype, seed, about)


def _row(order, rank, n, m):
    ahead = min(ORDERS[order](rank, n, m), m)
    row = [f"F{i}" for i in range(ahead)]
    for i in range(m - ahead):
        row += [f"F{ahead + i}", f"B{i}"]
    return row + [f"B{i}" for i in range(m - ahead, m)]


def _y(rank, i, x, dtype, seed):
    """A stage's forward: another on every rank, so that nothing can be mistaken."""
    return values(SHAPE, dtype, i, seed) if x is None else x * 0.5 + rank + 1


def _g(rank, i, grad, dtype, seed):
    return values(SHAPE, dtype, 100 + i, seed) if grad is None else grad * 2 - rank


def _on_rank(answer, arguments, groups):
    options = own_group(groups)
    rank, n = dist.get_rank(**options), dist.get_world_size(**options)
    order, m, dtype, seed = arguments[dist.get_rank()]
    calls, held, overwritten = [], {}, []

    def forward(i, x):
        held[i] = x, None if x is None else x.clone()
        calls.append(("F", i, None if x is None else plain(x)))
        return _y(rank, i, x, dtype, seed)

    def backward(i, grad):
        x, copy = held.get(i, (None, None))
        if x is not None and not torch.equal(x, copy):
            overwritten.append(i)
        calls.append(("B", i, None if grad is None else plain(grad)))
        return _g(rank, i, grad, dtype, seed)

    like = torch.zeros(SHAPE, dtype=dtype)
    seen = watched(answer, _row(order, rank, n, m), forward, backward, like, **options)
    seen.kept = {"calls": calls, "changed": bool(like.any()), "overwritten": overwritten}
    return seen


def _judge(members, seen, order, m, dtype, seed, about):
    n, size = len(members), torch.zeros(SHAPE, dtype=dtype).nbytes
    by_hand(seen)
    own_dtype(seen, dtype, about)
    xs, grads = {}, {}  # (place, micro-batch): what is due to arrive there
    for i in range(m):
        x = grad = None
        for place in range(n):
            xs[place, i] = x
            x = _y(place, i, x, dtype, seed)
        for place in reversed(range(n)):
            grads[place, i] = grad
            grad = _g(place, i, grad, dtype, seed)
    for place, (rank, one) in enumerate(zip(members, seen, strict=True)):
        where, row = f"rank {rank}, {about}", _row(order, place, n, m)
        done = [f"{kind}{i}" for kind, i, _ in one.kept["calls"]]
        if done != row:
            if not done:
                why = "neither forward nor backward is called"
            elif sorted(done) == sorted(row):
                why = "its actions are not done in the order of the row, and who waits for them has another one"
            else:
                why = "each action of the row is to be done once"
            raise Wrong(why, where, " ".join(row), " ".join(done))
        for kind, i, got in one.kept["calls"]:
            due = (xs if kind == "F" else grads)[place, i]
            _arrived(kind, i, got, due, place, (xs, grads), m, where)
        if one.kept["overwritten"]:
            why = f"x of micro-batch {one.kept['overwritten'][0]} is overwritten before its backward, which needs it"
            raise Wrong(f"what arrives is right, but {why}: each receive needs a tensor of its own", where)
        if one.kept["changed"]:
            raise Wrong("`like` was written into: it only says which shape and dtype a message has", where)
    for place, (rank, made, to) in enumerate(zip(members, sent(seen), map(receivers, seen), strict=True)):
        beside = {members[other] for other in (place - 1, place + 1) if 0 <= other < n}
        if made != m * size * len(beside) or to != beside:
            why = f"what arrives is right, but rank {rank} sends {made:,} bytes to {sorted(to) or 'nobody'}"
            raise Wrong(why, about, f"{m * size * len(beside):,} bytes, to {sorted(beside) or 'nobody'}",
                        f"{made:,} bytes")  # fmt: skip


def _arrived(kind, i, got, due, place, known, m, where):
    name, what = ("forward", "x") if kind == "F" else ("backward", "grad")
    end = "the first rank" if kind == "F" else "the last rank"
    if due is None:
        if got is not None:
            raise Wrong(f"{name}({i}, …) is given a tensor on {end}, which receives none: None", where)
        return
    if got is None:
        giver = "before" if kind == "F" else "after"
        raise Wrong(f"{name}({i}, …) is given None: its {what} comes from the rank {giver}", where)
    xs, grads = known
    mistakes = [
        (f"{what} is zero: was it received?", torch.zeros_like(due)),
        *((f"this is micro-batch {k}'s: a message that came later has overwritten it, or the order is another one",
           (xs if kind == "F" else grads)[place, k]) for k in range(m) if k != i),
        ("a gradient arrives where an activation is due", grads.get((place, i))),
        ("an activation arrives where a gradient is due", xs.get((place, i))),
    ]  # fmt: skip
    same([got], due, "", where, mistakes, labels=[f"{what} of {kind}{i}, {where}"])


WHY = (
    "No send waits, and every receive is of something that its sender has no reason to hold back: a table that can run "
    "then runs. So it is on gloo. On nccl a pair's messages go in the order in which they are started, and those that "
    "cross have to be started together, by dist.batch_isend_irecv: Megatron-LM and PyTorch's Schedule1F1B do."
)
exercise = Exercise(hints, check, minutes=25, level="hard", why=WHY)
