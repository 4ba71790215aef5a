"""The exercise summa_step."""

from contextlib import ExitStack
from math import isqrt
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pardist_lib.ranks.report import plural

from ..exercises.cases import F32, F64, I64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, by_hand, equal, peers, same, sent
from ..exercises.watch import Seen
from .shared import call_in_world, inputs_kept

hints = (
    "divmod(rank, q) gives this rank's row i and column j. In its row are the ranks i·q + 0 … i·q + q - 1, in its "
    "column 0·q + j … (q - 1)·q + j.",
    "A rank in column `step` has the block of B that its whole row needs: it sends b. All others of the row "
    "receive it from rank i·q + step. For C the same with rows and columns exchanged, from rank step·q + j.",
    "Start all messages with isend and irecv (into torch.empty_like(b)), keep them in a list, wait() for each, and "
    "only then multiply: a += b_block @ c_block.",
)


def check(run):
    cases = [
        (4, (3, 3, 3), F64),
        (4, (2, 3, 4), F64),
        (4, (1, 4, 2), F32),
        (4, (2, 2, 3), I64),
        (1, (2, 3, 4), F64),
    ]

    def one(n, shape, dtype, seed, about):
        q, (m, k, w) = isqrt(n), shape
        parts = [[values(s, dtype, r, 10 * seed + i) for i, s in enumerate(((m, w), (m, k), (k, w)))] for r in range(n)]
        for step in range(q):
            where = f"step {step}, q = {q}, blocks {(m, w)}, {(m, k)}, {(k, w)}, {str(dtype)[6:]}"
            seen = run(call_in_world, parts, step, q, n=n if n > 1 else 4, about=where)[:n]
            by_hand(seen)
            inputs_kept(seen, parts, ("", "b", "c"), where)
            _judge_step(seen, parts, step, q, where)

    cases(one, cases)
    parts = [[values(s, F64, r, 90 + i) for i, s in enumerate(((2, 3), (2, 4), (4, 3)))] for r in range(9)]
    for step in range(3):
        where = f"step {step}, q = 3, blocks (2, 3), (2, 4), (4, 3), float64"
        played = {}
        for one_rank in run(_play, parts, step, 3, about=where):
            played |= one_rank.kept
        _judge_played([played[rank] for rank in range(9)], parts, step, 3, where)


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


def _judge_played(played, parts, step, q, about):
    """played: for each rank its block of A, what it sent [(peer, tensor)], and from whom it received."""
    known = f"it works with q = 2, but not with q = {q}: "
    for rank, (_, _, came_from) in enumerate(played):
        owners = sorted({rank // q * q + step, step * q + rank % q} - {rank})
        shown = f"rank {rank}, {about}", f"from {_named(owners)}", f"from {_named(came_from)}"
        if strange := [peer for peer in came_from if peer not in owners]:
            why = (
                f"rank {rank} receives from {_named(strange)}: b comes from column `step` of the row, c from row `step`"
            )
            raise Wrong(f"{known}{why} of the column", *shown)
        if sorted(came_from) != owners:
            raise Wrong(f"{known}a block that a rank lacks is not received, or more than once", *shown)
    for rank, (_, to, _) in enumerate(played):
        i, j = divmod(rank, q)
        fair = [(i * q + x, parts[rank][1]) for x in range(q) if j == step and x != j]
        fair += [(x * q + j, parts[rank][2]) for x in range(q) if i == step and x != i]
        receivers, asked, where = [peer for peer, _ in to], [peer for peer, _ in fair], f"rank {rank}, {about}"
        if sorted(receivers) != sorted(asked):
            why = "each block goes to all q - 1 others of a row or column, from its owner"
            raise Wrong(known + why, where, f"to {_named(asked)}", f"to {_named(receivers)}")
        for peer, block in fair:
            if not any(p == peer and equal(tensor, block) for p, tensor in to):
                raise Wrong(f"{known}another tensor than the rank's own block goes to rank {peer}", where)
    own = [part[0] for part in parts]
    grown = [own[r] + parts[r // q * q + step][1] @ parts[step * q + r % q][2] for r in range(q * q)]
    mistakes = [(f"{known}`a` is as it was before the call", own)]
    same([a for a, *_ in played], grown, "a", about, mistakes)


def _named(ranks):
    return plural(sorted(ranks)) if ranks else "nobody"


def _judge_step(seen, parts, step, q, about):
    n, square = len(seen), len({p.shape for p in parts[0]}) == 1
    a, b, c = ([p[i] for p in parts] for i in range(3))
    grown = [a[r] + b[r // q * q + step] @ c[step * q + r % q] for r in range(n)]
    after, returned = [one.kept[0] for one in seen], [one.result for one in seen]
    if all(map(torch.equal, after, a)) and n > 1:
        if all(isinstance(r, torch.Tensor) and torch.allclose(r, g) for r, g in zip(returned, grown, strict=True)):
            raise Wrong("it returns the right block, but `a` itself is unchanged: a += …, not a = a + …", about)
    other = (step + 1) % q
    product = [g - x for g, x in zip(grown, a, strict=True)]
    mistakes = [
        ("`a` is overwritten: this step's product has to be added to what is there", product),
        ("every rank multiplies its own blocks: in a step, the blocks of column `step` and row `step` travel",
         [a[r] + b[r] @ c[r] for r in range(n)]),
        ("`step` is ignored: these are step 0's blocks", [a[r] + b[r // q * q] @ c[r % q] for r in range(n)]),
        ("rows and columns of the grid are exchanged: rank i·q + j stands in row i = rank // q, column j = rank % q",
         [a[r] + b[r % q * q + step] @ c[step * q + r // q] for r in range(n)]),
        ("B's blocks travel along the columns and C's along the rows: it is the other way round",
         [a[r] + b[step * q + r % q] @ c[r // q * q + step] for r in range(n)]),
        ("only B's block travelled: C's is this rank's own", [a[r] + b[r // q * q + step] @ c[r] for r in range(n)]),
        ("only C's block travelled: B's is this rank's own", [a[r] + b[r] @ c[step * q + r % q] for r in range(n)]),
        ("these are the blocks of another step",
         [a[r] + b[r // q * q + other] @ c[other * q + r % q] for r in range(n)]),
        ("all steps at once: one is asked for",
         [a[r] + sum(b[r // q * q + s] @ c[s * q + r % q] for s in range(q)) for r in range(n)]),
        ("the product is subtracted", [2 * x - g for g, x in zip(grown, a, strict=True)]),
        ("the product is added twice", [2 * g - x for g, x in zip(grown, a, strict=True)]),
    ]  # fmt: skip
    if square:
        mistakes.append(("the product is C @ B: the block of B comes first",
                         [a[r] + c[step * q + r % q] @ b[r // q * q + step] for r in range(n)]))  # fmt: skip
    same(after, grown, "a", about, [*mistakes, ("`a` is as it was before the call: add to it with +=", a)], a)
    made, to = sent(seen), peers(seen)
    for rank in range(n):
        i, j = divmod(rank, q)
        fair = ((j == step) * b[rank].nbytes + (i == step) * c[rank].nbytes) * (q - 1)
        if strangers := sorted(p for p in to[rank] if p // q != i and p % q != j):
            who = f"{plural(strangers)}, which {'is' if len(strangers) == 1 else 'are'}"
            raise Wrong(f"a is right, but rank {rank} sends to {who} neither in its row nor in its column", about)
        if made[rank] != fair:
            why = "a is right, but more is sent than is needed: b goes along the row from column `step` only, c along "
            raise Wrong(
                f"{why}the column from row `step` only", f"rank {rank}, {about}", f"{fair} bytes", f"{made[rank]} bytes"
            )


exercise = Exercise(hints, check)
