"""The exercises of lesson 02: hints, and how an answer is checked."""

from contextlib import ExitStack
from math import isqrt
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pardist_lib.ranks.report import plural

from .cases import F32, F64, I64, numbers, values
from .judge import Wrong, by_hand, equal, only_calls, own_dtype, peers, same, sent
from .watch import Seen, watched, world


def _operands(shape, dtype, seed):
    """B and C, whole: (m, k) and (k, w)."""
    m, k, w = shape
    return values((m, k), dtype, 0, seed), values((k, w), dtype, 1, seed)


def _share(k, n, rank, even):
    """This rank's part of k indices, as a slice; where not even, ranks before the last one get more or none."""
    if even:
        return slice(k // n * rank, k // n * (rank + 1))
    ends = [k * (r + 1) * (r + 1) // (n * n) for r in range(n)]
    return slice(ends[rank - 1] if rank else 0, ends[rank])


def _call(answer, parts, *args):
    """On a rank: give the answer its own parts, and keep what they are afterwards."""
    mine = [part.clone() for part in parts[dist.get_rank()]]
    seen = watched(answer, *mine, *args)
    seen.kept = mine
    return seen


def _call_in_world(answer, parts, *args):
    """The same; parts for one rank only are given in a world of one, a group that all four ranks have to make."""
    if len(parts) > 1:
        return _call(answer, parts, *args)
    with world(1) as inside:
        return _call(answer, parts, *args) if inside else Seen()


def _inputs_kept(seen, parts, names, about):
    for rank, one in enumerate(seen):
        for name, before, after in zip(names, parts[rank], one.kept, strict=True):
            if name and not torch.equal(before, after):
                raise Wrong(f"`{name}` was changed: it has to stay as it is", f"rank {rank}, {about}")


def _cases(one, cases):
    """Call `one(n, shape, dtype, seed, about)` for each case; a failure in a later one tells what is new in it."""
    first_n, first_shape, first_dtype = cases[0]
    known = set()
    for seed, (n, shape, dtype) in enumerate(cases):
        new = {
            f"it works with {first_n} ranks, but not with {n} (is a {first_n} written into it?)": n != first_n,
            f"it works for {str(first_dtype)[6:]}, but not for {str(dtype)[6:]}": dtype != first_dtype,
            f"it works for (m, k, w) = {first_shape}, but not for other sizes": shape != first_shape,
        }
        kinds = {i: text for i, (text, holds) in enumerate(new.items()) if holds}
        m, k, w = shape
        try:
            one(n, shape, dtype, seed, f"B ({m}, {k}), C ({k}, {w}), {str(dtype)[6:]}, {n} ranks")
        except Wrong as wrong:
            if len(fresh := [text for i, text in kinds.items() if i not in known]) == 1:
                wrong.diagnosis = f"{fresh[0]}: {wrong.diagnosis}"
            raise
        known |= kinds.keys()


# ---- by columns -----------------------------------------------------------------------------------------------


class column_split:
    hints = (
        "b @ c_columns is this rank's columns of A, complete: nothing is missing from them, they only have to be put "
        "side by side.",
        "parts = [torch.empty_like(mine) for _ in range(n)]; dist.all_gather(parts, mine) gives every rank all parts, "
        "in the order of ranks.",
        "Columns stand side by side: torch.cat(parts, dim=1). (Along dim 0 they would stand below each other.)",
    )

    @staticmethod
    def check(run):
        cases = [(4, (3, 5, 8), F64), (4, (6, 2, 4), F64), (4, (3, 5, 8), F32), (4, (2, 3, 4), I64),
                 (3, (4, 2, 9), F64), (2, (1, 3, 4), F32)]  # fmt: skip

        def one(n, shape, dtype, seed, about):
            b, c = _operands(shape, dtype, seed)
            parts = [(b, c_part.contiguous()) for c_part in c.chunk(n, 1)]
            seen = run(_call, parts, n=n, about=about)
            _inputs_kept(seen, parts, ("b", "c_columns"), about)
            _judge_columns(seen, parts, about)

        _cases(one, cases)


def _judge_columns(seen, parts, about):
    n = len(seen)
    made = [b @ c for b, c in parts]
    a, (m, w) = torch.cat(made, 1), made[0].shape
    results = [one.result for one in seen]
    ranks = f"every rank, {about}"
    for rank, result in enumerate(results):
        if isinstance(result, torch.Tensor) and result.shape != a.shape:
            if rank and equal(results[0], a):
                raise Wrong("only rank 0 has the whole A: every rank has to have it", f"rank {rank}, {about}")
            if result.shape == made[0].shape and torch.allclose(result.to(a.dtype), made[rank]):
                raise Wrong("each rank returns its own columns only: A has to be whole on every rank", ranks)
            if result.shape == (n * m, w):
                raise Wrong(
                    "the parts stand below each other: they are columns, so they are joined along dimension 1", ranks,
                    f"shape {tuple(a.shape)}", f"shape {tuple(result.shape)}",
                )  # fmt: skip
            if result.shape == a.T.shape:
                raise Wrong("the result is transposed", ranks, f"shape {tuple(a.shape)}", f"shape {tuple(a.T.shape)}")
        if isinstance(result, (list, tuple)):
            raise Wrong(f"it returns a {type(result).__name__} of parts: torch.cat makes one matrix of them", ranks)
    only = [torch.cat([made[i] if i == rank else torch.zeros_like(made[i]) for i in range(n)], 1) for rank in range(n)]
    missing = [a.clone() for _ in range(n)]
    for rank in range(n):
        missing[rank][:, rank * w : (rank + 1) * w] = 0
    mistakes = [
        ("the parts are joined one below the other and reshaped, which scrambles them: join them along dimension 1",
         [torch.cat(made).view(a.shape)] * n),
        ("every rank's columns are its own part, over and over: all_gather's list has everybody's",
         [torch.cat([made[rank]] * n, 1) for rank in range(n)]),
        *(("all parts are one tensor: [torch.empty_like(x)] * n puts the same one n times into the list, where a "
           "comprehension makes n", [torch.cat([part] * n, 1)] * n) for part in made),
        ("the other ranks' columns are zero: they have to be gathered", only),
        ("a rank's own columns are zero", missing),
        ("the parts are in reverse order: rank 0's columns come first", [torch.cat(made[::-1], 1)] * n),
        ("a rank's own columns come first: the order is that of ranks, the same everywhere",
         [torch.cat([made[rank], *made[:rank], *made[rank + 1 :]], 1) for rank in range(n)]),
        ("the parts are added up: columns are put side by side, nothing has to be added", [sum(made).repeat(1, n)] * n),
        ("everything is n times as large: columns are complete, nothing has to be added up", [a * n] * n),
    ]  # fmt: skip
    same(results, [a] * n, "A", about, mistakes)
    if not all(sum(call.bytes for call in one.calls) for one in seen):
        raise Wrong("A is right, though nothing was sent: where did the other ranks' columns come from?", about)
    because = {
        "": "A is right, but it calls {op}: one all_gather of a rank's own columns of A is enough",
        "all_reduce": "A is right, but by an all_reduce over zeros, which sends twice as much as an all_gather",
    }
    only_calls(seen, ("all_gather",), because)
    for rank, one in enumerate(seen):
        received = [call.bytes for call in one.calls]  # an all_gather counts as what it fills
        shown = f"rank {rank}, {about}", f"{a.nbytes} bytes", f"{sum(received)} bytes"
        if received == [n * parts[0][1].nbytes] != [a.nbytes]:
            why = "A is right, but the columns of C were gathered and every rank did the whole product"
            raise Wrong(f"{why}: gather the columns of A", *shown)
        if received != [a.nbytes]:
            why = f"A is right, but {len(received)} all_gather bring {sum(received)} bytes"
            raise Wrong(f"{why}: once the columns of A is enough", *shown)


# ---- by the inner dimension -----------------------------------------------------------------------------------


class inner_split:
    hints = (
        "b_columns @ c_rows has the shape of A already. What is missing in its numbers?",
        "A[i, j] is a sum over the inner index, and every rank has the terms of its own share. Terms are added, not "
        "put side by side.",
        "a = b_columns @ c_rows; dist.all_reduce(a); return a.",
    )

    @staticmethod
    def check(run):
        cases = [(4, (8, 8, 8), F64), (4, (3, 10, 2), F64), (4, (3, 8, 5), F32), (4, (2, 9, 3), I64),
                 (3, (4, 6, 2), F64), (2, (1, 5, 4), F32), (4, (3, 3, 4), F64)]  # fmt: skip

        def one(n, shape, dtype, seed, about):
            b, c = _operands(shape, dtype, seed)
            shares = [_share(shape[1], n, rank, seed == 0) for rank in range(n)]
            parts = [(b[:, s].contiguous(), c[s].contiguous()) for s in shares]
            about += ", shares " + " ".join(str(s.stop - s.start) for s in shares)
            empty = any(s.start == s.stop for s in shares)
            stuck = "the ranks do not make the same calls: one whose share is 0 has to bring its zeros, too" * empty
            seen = run(_call, parts, n=n, about=about, stuck=stuck)
            _inputs_kept(seen, parts, ("b_columns", "c_rows"), about)
            _judge_inner(seen, parts, b @ c, about)

        _cases(one, cases)


def _judge_inner(seen, parts, a, about):
    n, made = len(seen), [b @ c for b, c in parts]
    results, ranks = [one.result for one in seen], f"every rank, {about}"
    (m, w), joined = a.shape, "the ranks' products are put side by side"
    for result in results:
        if isinstance(result, torch.Tensor) and result.shape in ((n * m, w), (m, n * w), (n, m, w)):
            why = f"{joined}: each is a summand as large as A, they have to be added up"
            raise Wrong(why, ranks, f"shape {tuple(a.shape)}", f"shape {tuple(result.shape)}")
        if isinstance(result, (list, tuple)):
            raise Wrong(f"it returns a {type(result).__name__} of summands: they have to be added up", ranks)
    if any(call.op == "reduce" for call in seen[0].calls) and [equal(result, a) for result in results].count(True) == 1:
        raise Wrong("only rank 0 has the sum: every rank has to have it, as all_reduce does", ranks)
    stacked = torch.stack(made)
    sums = [None] * n
    if len({b.shape for b, _ in parts}) == 1:
        sums = [sum(b for b, _ in parts) @ sum(c for _, c in parts)] * n
    mistakes = [
        ("only rank 0 has the sum: every rank has to have it", [None, *made[1:]]),
        ("each rank returns its own summand: the sum over the ranks is missing", made),
        ("this is the mean of the summands: A is their sum", [a / n if a.is_floating_point() else a // n] * n),
        ("this is the largest summand, element by element: A is their sum", [stacked.amax(0)] * n),
        ("this is the product of the summands: A is their sum", [stacked.prod(0)] * n),
        ("the result is transposed", [a.T if m == w else None] * n),
        ("a rank's own summand counts twice", [a + mine for mine in made]),
        ("a rank's own summand is missing", [a - mine for mine in made]),
        ("every rank returns rank 0's summand: they have to be added up", [made[0]] * n),
        ("B and C were added up over the ranks before multiplying: the products are what is to be added", sums),
    ]  # fmt: skip
    same(results, [a] * n, "A", about, mistakes)
    rings = ("all_reduce", "reduce_scatter", "all_gather")
    why = "A is right, but it calls {op}: one all_reduce of a rank's product is enough"
    only_calls(seen, rings, {"": why})
    for rank, one in enumerate(seen):
        given, ops, where = [call.bytes for call in one.calls], [call.op for call in one.calls], f"rank {rank}, {about}"
        if not given:
            raise Wrong("A is right, though nothing was sent: where did the other ranks' summands come from?", where)
        if ops == ["all_gather"] and given == [n * a.nbytes]:
            why = f"A is right, but every summand goes to every rank: that sends {n - 1} · A from each"
            raise Wrong(f"{why}, an all_reduce 2({n} - 1)/{n} · A", where)
        if "all_reduce" not in ops and "reduce_scatter" not in ops:
            why = "A is right, but the operands were gathered and every rank did the whole product"
            raise Wrong(f"{why}: multiply first, then add up", where)
        if ops != ["all_reduce"] or given != [a.nbytes]:
            raise Wrong(f"A is right, but {sum(given)} bytes are handed over in {len(given)} calls", where,
                        f"{a.nbytes} bytes in one all_reduce", ", ".join(ops))  # fmt: skip


# ---- a step of SUMMA ------------------------------------------------------------------------------------------


class summa_step:
    hints = (
        "divmod(rank, q) gives this rank's row i and column j. In its row are the ranks i·q + 0 … i·q + q - 1, in its "
        "column 0·q + j … (q - 1)·q + j.",
        "A rank in column `step` has the block of B that its whole row needs: it sends b. All others of the row "
        "receive it from rank i·q + step. For C the same with rows and columns exchanged, from rank step·q + j.",
        "Start all messages with isend and irecv (into torch.empty_like(b)), keep them in a list, wait() for each, and "
        "only then multiply: a += b_block @ c_block.",
    )

    @staticmethod
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
            parts = [
                [values(s, dtype, r, 10 * seed + i) for i, s in enumerate(((m, w), (m, k), (k, w)))] for r in range(n)
            ]
            for step in range(q):
                where = f"step {step}, q = {q}, blocks {(m, w)}, {(m, k)}, {(k, w)}, {str(dtype)[6:]}"
                seen = run(_call_in_world, parts, step, q, n=n if n > 1 else 4, about=where)[:n]
                by_hand(seen)
                _inputs_kept(seen, parts, ("", "b", "c"), where)
                _judge_step(seen, parts, step, q, where)

        _cases(one, cases)
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


# ---- formulas -------------------------------------------------------------------------------------------------


class split_bytes:
    hints = (
        "All splits end with the whole A on every rank. A ring all-gather of something of S bytes sends (n - 1)/n · S "
        "from each rank, a ring all-reduce twice that (lesson 1).",
        "A has m · w numbers. Rows and columns: one all-gather of A. Inner: one all-reduce of A.",
        "Grid: a rank's block of B has m · k / n numbers, its block of C k · w / n, and q = √n: (q - 1) times both, "
        "and then an all-gather of A.",
    )

    @staticmethod
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


# ---- the halo -------------------------------------------------------------------------------------------------


class halo_exchange:
    hints = (
        "The rows that rank - 1 needs from you are your first `halo` rows; rank + 1 needs your last ones. Rank 0 has "
        "no rank above, the last rank none below: zeros stay there.",
        "rows[:, :, :halo] is not contiguous in memory, and messages have to be: .contiguous() copies it.",
        "Start isend and irecv for each neighbour there is, into tensors made with torch.zeros_like, wait for all, "
        "then torch.cat([above, rows, below], dim=2).",
    )

    @staticmethod
    def check(run):
        cases = [  # ranks, (batch, channels), heights, width, halo, dtype
            (4, (1, 1), [3, 3, 3, 3], 3, 1, F64), (4, (2, 3), [4, 4, 4, 4], 5, 1, F64),
            (4, (2, 2), [3, 3, 3, 3], 3, 2, F64), (4, (1, 2), [4, 2, 3, 5], 3, 2, F64),
            (4, (1, 2), [2, 3, 2, 2], 4, 1, F32), (3, (2, 1), [3, 3, 4], 2, 3, I64), (2, (1, 1), [2, 1], 3, 1, F64),
            (4, (1, 2), [2, 2, 1, 1], 2, 0, F64), (1, (1, 2), [3], 2, 2, F64),
        ]  # fmt: skip
        known = set()
        for seed, (n, (batch, channels), heights, width, halo, dtype) in enumerate(cases):
            about = f"batch {batch}, channels {channels}, heights {' '.join(map(str, heights))}, width {width}, "
            about += f"halo {halo}, {str(dtype)[6:]}, {n} rank{'s' * (n > 1)}"
            new = {
                f"it works with 4 ranks, but not with {n} (is a 4 written into it?)": n != 4,
                f"it works for halo = 1, but not for halo = {halo}": halo > 1,
                "it does not work for halo = 0 (rows[:, :, -0:] are all rows, not none)": halo == 0,
                "it works for one image with one channel only": batch * channels > 1,
                "it works where all heights are equal, but not for unequal ones": len(set(heights)) > 1,
                f"it works for float64, but not for {str(dtype)[6:]}": dtype != F64,
            }
            kinds = {i: text for i, (text, holds) in enumerate(new.items()) if holds}
            whole = values((batch, channels, sum(heights), width), dtype, 0, seed)
            parts = [(part.contiguous(),) for part in whole.split(heights, 2)]
            try:
                seen = run(_call_in_world, parts, halo, n=n if n > 1 else 4, about=about)[:n]
                by_hand(seen)
                _inputs_kept(seen, parts, ("rows",), about)
                _judge_halo(seen, whole, heights, halo, about)
            except Wrong as wrong:
                if len(fresh := [text for i, text in kinds.items() if i not in known]) == 1:
                    wrong.diagnosis = f"{fresh[0]}: {wrong.diagnosis}"
                raise
            known |= kinds.keys()


def _judge_halo(seen, whole, heights, halo, about):
    n = len(seen)
    pieces = whole.split(heights, 2)
    nothing = whole.new_zeros(*whole.shape[:2], halo, whole.shape[3])
    first, last = [p[:, :, :halo] for p in pieces], [p[:, :, p.shape[2] - halo :] for p in pieces]

    def joined(above, below):
        return [torch.cat([above(r), pieces[r], below(r)], 2) for r in range(n)]

    up = lambda r: last[r - 1] if r else nothing  # noqa: E731
    down = lambda r: first[r + 1] if r < n - 1 else nothing  # noqa: E731
    expected = joined(up, down)
    results = [one.result for one in seen]
    _judge_halo_shape(results, expected, heights, halo, about)
    mistakes = [
        ("above and below are swapped", joined(down, up)),
        ("the image is closed to a ring: above rank 0 and below the last rank there are zeros",
         joined(lambda r: last[r - 1], lambda r: first[(r + 1) % n])),
        ("the neighbours' far rows arrived: rank - 1 sends its last rows down, rank + 1 its first rows up",
         joined(lambda r: first[r - 1] if r else nothing, lambda r: last[r + 1] if r < n - 1 else nothing)),
        ("the rank's own rows are repeated: the halo is the neighbours'", joined(first.__getitem__, last.__getitem__)),
        ("the rank's own rows are repeated where the image ends: zeros are asked for",
         joined(lambda r: last[r - 1] if r else first[r], lambda r: first[r + 1] if r < n - 1 else last[r])),
        ("the halo is zero: it was never received", joined(lambda r: nothing, lambda r: nothing)),
        ("only the halo above arrived", joined(up, lambda r: nothing)),
        ("only the halo below arrived", joined(lambda r: nothing, down)),
        ("each rank exchanges with one neighbour only: those in the middle have two",
         joined(lambda r: up(r) if r % 2 else nothing, lambda r: nothing if r % 2 else down(r))),
        ("the halo's rows are upside down", joined(lambda r: up(r).flip(2), lambda r: down(r).flip(2))),
    ]  # fmt: skip
    same(results, expected, "the result", about, mistakes)
    row = whole[:, :, :1].nbytes
    for rank, made in enumerate(sent(seen)):
        sides = (rank > 0) + (rank < n - 1)
        if made != (fair := sides * halo * row):
            if sum(call.op == "send" for call in seen[rank].calls) == sides:
                own_dtype(seen, whole.dtype, about)
            all_of_it = made >= sides * heights[rank] * row > fair
            more = ": all its rows are sent, `halo` of them are enough" if all_of_it else ""
            why = f"the result is right, but rank {rank} sends {made} bytes{more}"
            raise Wrong(why, about, f"{fair} bytes", f"{made} bytes")


def _judge_halo_shape(results, expected, heights, halo, about):
    """Raise Wrong where a result has four dimensions, but not the right ones."""
    given = [r.shape for r in results if isinstance(r, torch.Tensor) and r.dim() == 4]
    wanted = [e.shape for e in expected]
    if len(given) < len(wanted) or given == wanted:
        return
    n, rank = len(wanted), next(r for r in range(len(wanted)) if given[r] != wanted[r])
    extra = [shape[2] - height for shape, height in zip(given, heights, strict=True)]
    if given[rank][3] == wanted[rank][3] + 2 * halo:
        why = "the halo is at the left and the right: rows are dimension 2"
    elif set(extra) == {0}:
        why = "the rows come back without any halo"
    elif extra == [halo * ((r > 0) + (r < n - 1)) for r in range(n)]:
        why = "where the image ends, the rows of zeros are missing"
    else:
        why = f"{extra[rank]} rows are added to rank {rank}'s: `halo` above and `halo` below make {2 * halo}"
    raise Wrong(why, f"rank {rank}, {about}", f"shape {tuple(wanted[rank])}", f"shape {tuple(given[rank])}")
