"""summa_step: one step on q × q ranks. Typically wrong: rows and columns of the grid, and who sends which block."""

from contextlib import ExitStack
from math import isqrt
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pardist_lib.ranks.report import plural

from ..exercises.cases import F32, F64, I64, call, untouched, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, by_hand, equal, peers, same, sent
from ..exercises.watch import Seen
from ..worlds import world
from .shared import products

hints = (
    "divmod(rank, q) gives this rank's row i and column j. In its row are the ranks i·q + 0 … i·q + q - 1, in its "
    "column 0·q + j … (q - 1)·q + j.",
    "A rank in column `step` has the block of B that its whole row needs: it sends b. All others of the row "
    "receive it from rank i·q + step. For C the same with rows and columns exchanged, from rank step·q + j.",
    "Start all messages with isend and irecv (into torch.empty_like(b)), keep them in a list, wait() for each, and "
    "only then multiply: a += b_block @ c_block.",
)


def check(run):
    cases = [(4, (3, 3, 3), F64), (4, (2, 3, 4), F64), (4, (1, 4, 2), F32), (4, (2, 2, 3), I64), (1, (2, 3, 4), F64)]

    def one(seed, n, shape, dtype, _):
        q, parts = isqrt(n), _blocks(n, shape, dtype, 10 * seed)
        for step in range(q):
            about = _case(step, q, shape, dtype)
            seen = run(_stepped, parts, step, q, n=n if n > 1 else 4, about=about)[:n]
            by_hand(seen)
            untouched(seen, about)
            _judge_step(seen, parts, step, q, about)

    products(cases, one)
    parts = _blocks(9, (2, 4, 3), F64, 90)
    for step in range(3):
        about, played = _case(step, 3, (2, 4, 3), F64), {}
        for some in run(_play, parts, step, 3, about=about):
            played |= some.kept
        _judge_played([played[rank] for rank in range(9)], parts, step, 3, about)


def _blocks(n, shape, dtype, seed):
    """Each rank's blocks of A, B and C."""
    m, k, w = shape
    return [[values(s, dtype, r, seed + i) for i, s in enumerate(((m, w), (m, k), (k, w)))] for r in range(n)]


def _case(step, q, shape, dtype):
    m, k, w = shape
    return f"step {step}, q = {q}, blocks {(m, w)}, {(m, k)}, {(k, w)}, {str(dtype)[6:]}"


def _stepped(answer, parts, step, q):
    """On a rank: one step with its own blocks. (A world of one has to be made by all ranks.)"""
    with world(len(parts)) as inside:
        if not inside:
            return Seen()
        a, b, c = parts[dist.get_rank()]
        seen = call(lambda b, c: answer(a, b, c, step, q), {"b": b, "c": c})
        seen.kept["a"] = a
        return seen


class _Done:
    """What isend and irecv give back where a message is there at once."""

    def wait(self, *_):
        return True

    is_completed = wait


def _play(answer, parts, step, q):
    """On a rank: be some of q · q ranks in turn. A message brings the sender's block; what is sent is only noted."""
    seen, first, n = Seen(kept={}), dist.get_rank(), dist.get_world_size()
    for me in range(first, q * q, n):
        mine, to, came_from = [part.clone() for part in parts[me]], [], []

        def send(tensor, dst=None, *_, group_dst=None, to=to, **__):
            to.append((group_dst if dst is None else dst, tensor.clone()))
            return _Done()

        def receive(tensor, src=None, *_, group_src=None, me=me, came_from=came_from, **__):
            peer = group_src if src is None else src
            came_from.append(peer)
            block = parts[peer][1 if peer // q == me // q else 2] if peer in range(q * q) else tensor.new_empty(0)
            if block.numel() == tensor.numel():
                tensor.copy_(block.reshape(tensor.shape))
            return _Done()

        fakes = dict(send=send, isend=send, recv=receive, irecv=receive, get_world_size=lambda *_: q * q)
        fakes["get_rank"] = lambda *_, me=me: me
        fakes["P2POp"] = lambda op, tensor, peer=None, *_, group_peer=None, **__: (
            op, tensor, group_peer if peer is None else peer)  # fmt: skip
        fakes["batch_isend_irecv"] = lambda calls: [op(tensor, peer) for op, tensor, peer in calls]
        own = getattr(answer, "__globals__", {})
        real = {id(getattr(dist, name)): fake for name, fake in fakes.items()}
        with ExitStack() as now:
            now.enter_context(patch.dict(own, {name: real[id(v)] for name, v in own.items() if id(v) in real}))
            for module in (dist, distributed_c10d):
                now.enter_context(patch.multiple(module, **fakes))
            answer(*mine, step, q)
        seen.kept[me] = mine[0], to, came_from
    return seen


def _grown(parts, q, steps, of_b=None, of_c=None):
    """What `a` becomes on each rank; of_b(i, j, step), of_c(i, j, step): whose blocks it multiplies."""
    of_b, of_c = of_b or (lambda i, j, step: i * q + step), of_c or (lambda i, j, step: step * q + j)
    grown = []
    for rank, (a, _, _) in enumerate(parts):
        i, j = divmod(rank, q)
        grown.append(a + sum(parts[of_b(i, j, s)][1] @ parts[of_c(i, j, s)][2] for s in steps))
    return grown


def _receivers(parts, rank, step, q):
    """[(peer, block)] of what a rank has to send: b to the others in its row, c to the others in its column."""
    (i, j), (_, b, c) = divmod(rank, q), parts[rank]
    to = [(i * q + x, b) for x in range(q) if j == step] + [(x * q + j, c) for x in range(q) if i == step]
    return [(peer, block) for peer, block in to if peer != rank]


def _judge_played(played, parts, step, q, about):
    """played: for each rank its block of A, what it sent [(peer, tensor)], and from whom it received."""
    known = f"it works with q = 2, but not with q = {q}: "
    for rank, (_, _, came_from) in enumerate(played):
        owners = sorted({rank // q * q + step, step * q + rank % q} - {rank})
        why = "a block that a rank lacks is not received, or more than once"
        if strange := [peer for peer in came_from if peer not in owners]:
            why = f"rank {rank} receives from {_named(strange)}: b comes from column `step` of the row, c from row "
            why += "`step` of the column"
        if sorted(came_from) != owners:
            raise Wrong(known + why, f"rank {rank}, {about}", f"from {_named(owners)}", f"from {_named(came_from)}")
    for rank, (_, to, _) in enumerate(played):
        fair, where = _receivers(parts, rank, step, q), f"rank {rank}, {about}"
        receivers, asked = [peer for peer, _ in to], [peer for peer, _ in fair]
        if sorted(receivers) != sorted(asked):
            why = "each block goes to all q - 1 others of a row or column, from its owner"
            raise Wrong(known + why, where, f"to {_named(asked)}", f"to {_named(receivers)}")
        for peer, block in fair:
            if not any(p == peer and equal(tensor, block) for p, tensor in to):
                raise Wrong(f"{known}another tensor than the rank's own block goes to rank {peer}", where)
    mistakes = [(f"{known}`a` is as it was before the call", [part[0] for part in parts])]
    same([a for a, *_ in played], _grown(parts, q, [step]), "a", about, mistakes)


def _named(ranks):
    return plural(ranks) if ranks else "nobody"


def _judge_step(seen, parts, step, q, about):
    a, b, c = zip(*parts, strict=True)
    grown, after, returned = _grown(parts, q, [step]), [one.kept["a"] for one in seen], [one.result for one in seen]
    if len(seen) > 1 and all(map(torch.equal, after, a)) and all(map(equal, returned, grown)):
        raise Wrong("it returns the right block, but `a` itself is unchanged: a += …, not a = a + …", about)
    other, product = (step + 1) % q, [g - x for g, x in zip(grown, a, strict=True)]

    def own(i, j, step):
        return i * q + j

    def instead(of_b=None, of_c=None, steps=(step,)):
        return _grown(parts, q, steps, of_b, of_c)

    mistakes = [
        ("`a` is overwritten: this step's product has to be added to what is there", product),
        ("every rank multiplies its own blocks: in a step, the blocks of column `step` and row `step` travel",
         instead(own, own)),
        ("`step` is ignored: these are step 0's blocks", instead(steps=[0])),
        ("rows and columns of the grid are exchanged: rank i·q + j stands in row i = rank // q, column j = rank % q",
         instead(lambda i, j, step: j * q + step, lambda i, j, step: step * q + i)),
        ("B's blocks travel along the columns and C's along the rows: it is the other way round",
         instead(lambda i, j, step: step * q + j, lambda i, j, step: i * q + step)),
        ("only B's block travelled: C's is this rank's own", instead(of_c=own)),
        ("only C's block travelled: B's is this rank's own", instead(of_b=own)),
        ("these are the blocks of another step", instead(steps=[other])),
        ("all steps at once: one is asked for", instead(steps=range(q))),
        ("the product is subtracted", [x - p for x, p in zip(a, product, strict=True)]),
        ("the product is added twice", [g + p for g, p in zip(grown, product, strict=True)]),
    ]  # fmt: skip
    if len({block.shape for block in parts[0]}) == 1:
        swapped = [x + c[step * q + r % q] @ b[r // q * q + step] for r, x in enumerate(a)]
        mistakes.append(("the product is C @ B: the block of B comes first", swapped))
    same(after, grown, "a", about, [*mistakes, ("`a` is as it was before the call: add to it with +=", a)], a)
    for rank, (made, to) in enumerate(zip(sent(seen), peers(seen), strict=True)):
        if strangers := sorted(p for p in to if p // q != rank // q and p % q != rank % q):
            who = f"{plural(strangers)}, which {'is' if len(strangers) == 1 else 'are'}"
            raise Wrong(f"a is right, but rank {rank} sends to {who} neither in its row nor in its column", about)
        if made != (fair := sum(block.nbytes for _, block in _receivers(parts, rank, step, q))):
            why = "a is right, but more is sent than is needed: b goes along the row from column `step` only, c along "
            why += "the column from row `step` only"
            raise Wrong(why, f"rank {rank}, {about}", f"{fair} bytes", f"{made} bytes")


WHY = (
    "Every rank gets the two blocks whose product belongs to its part of A, and nothing else. ScaLAPACK-like "
    "libraries broadcast along rows and columns; Megatron-LM cuts each weight in one dimension only (lesson 3)."
)
exercise = Exercise(hints, check, minutes=35, level="hard", why=WHY)
