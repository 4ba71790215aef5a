"""The exercises of lesson 15: hints, and how an answer is checked."""

import copy
import math

import torch
import torch.distributed as dist

from .cases import F32, F64, values
from .judge import Wrong, equal, only_calls, same, show, type_of
from .watch import Other, group_of, plain, watched

FIELD = 2**32
PAIRS, ALONE = [[0, 2], [1, 3]], [[0], [1], [2], [3]]
OTHER_CALLS = {
    "all_gather": "it calls all_gather, which brings everybody's numbers to everybody: the sum is all that is needed",
    "broadcast": "it calls broadcast, which brings one rank's numbers to all: a sum needs all_reduce",
    "reduce": "it calls reduce, which brings the sum to one rank only: all_reduce brings it to all",
    "": "it calls {op}: one all_reduce of the numbers is all that is needed",
}


def _each(answer, inputs):
    """On one rank: the answer for each of the inputs, or what it raised; and whether an input was changed."""
    changed = []

    def all_of_them():
        results = []
        for args in inputs:
            own = copy.deepcopy(args)
            try:
                results.append(plain(answer(*own)))
            except ValueError as error:
                results.append(f"ValueError: {error}"[:200])
            changed.append(not _alike(args, own))
        return results

    seen = watched(all_of_them)
    seen.kept = changed
    return seen


def _mine(groups):
    """The argument `group` for this rank, where there are groups. Every rank has to call it."""
    made = {rank: group_of(members) for members in groups for rank in members}
    return {"group": made[dist.get_rank()]} if groups else {}


def _named(groups, n):
    if not groups:
        return f"{n} ranks"
    return "two groups of 2 ranks" if len(groups[0]) == 2 else "four groups of 1 rank"


def _alike(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.allclose(a, b, 0, 0, equal_nan=True)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_alike(a[k], b[k]) for k in a)
    return a == b if not isinstance(a, tuple) else all(map(_alike, a, b))


def _in_one_process(run, inputs, labels):
    """What came out for each of the inputs. Raises Wrong where it communicates or changes what it was given."""
    [seen] = run(_each, inputs, n=1)
    if seen.calls:
        raise Wrong(f"it calls {seen.calls[0].op}: this one is arithmetic, in one process")
    for changed, label in zip(seen.kept, labels, strict=True):
        if changed:
            raise Wrong("what it was given has changed: x = x + y makes a new tensor, x += y writes into it", label)
    return seen.result


def _whole(got, expected, labels, what):
    """Raise Wrong where a result is no int64 tensor from 0 to 2**32 - 1."""
    for value, want, label in zip(got, expected, labels, strict=True):
        if isinstance(value, str) and value.startswith("ValueError"):
            raise Wrong(f"it raises on numbers that are right: {value}", label)
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            raise Wrong(f"{what} is {str(value.dtype)[6:]}: whole numbers are asked for, int64", label)
        if isinstance(value, torch.Tensor) and value.shape == want.shape and value.dtype == torch.int64:
            if torch.equal(value % FIELD, want) and not torch.equal(value, want):
                said = "negative" if (value < 0).any() else "2**32 or more"
                why = f"the numbers are right modulo 2**32, but some are {said}: take % 2**32 at the end"
                raise Wrong(why, label, show(want), show(value))
            rounded = torch.equal(value, value.float().long()) and torch.allclose(value.double(), want.double(), 1e-5)
            if rounded and not torch.equal(want, want.float().long()):
                why = "right to about 7 digits only: whole numbers of 32 bits went through float32, which holds 24"
                raise Wrong(why, label, show(want), show(value))


def _numbers(size, seed):
    return torch.randint(FIELD, (size,), generator=torch.Generator().manual_seed(seed))


# ---- average_clients ------------------------------------------------------------------------------------------


def _average_clients(answer, hosted, rows, d, dtype, seed, groups):
    rank = dist.get_rank()
    mine = {c: values((d,), dtype, c, seed) for c in hosted[rank]}
    counts = {c: rows[c] for c in reversed(hosted[rank])}  # a dict is asked by its keys, not by its order
    given = copy.deepcopy((mine, counts))
    seen = watched(answer, *given, **_mine(groups))
    seen.kept = not _alike((mine, counts), given)
    return seen


class average_clients:
    hints = (
        "If one process had all clients: sum(rows[c] * update for c, update in updates.items()) / sum(rows.values()). "
        "Both sums can be taken over the ranks too.",
        "Each rank adds up rows · update over its own clients; dist.all_reduce(…, group=group) makes it the sum over "
        "all. The rows, one number, need an all_reduce of their own.",
        "Divide at the very end, once, by all rows: a mean taken on each rank and then over the ranks would count a "
        "client that is alone on its rank as much as five on another.",
    )

    @staticmethod
    def check(run):
        cases = [  # who is where; rows; d; dtype; groups
            ([[0, 1, 2], [3], [4, 5], [6, 7]], [5, 90, 2, 40, 8, 8, 1, 300], 7, F64, ()),
            ([[0], [1], [2], [3]], [6, 6, 6, 6], 5, F32, ()),
            ([[7, 1], [3], [5, 6, 9], [2]], dict(zip([7, 1, 3, 5, 6, 9, 2], [1, 2, 40, 3, 9, 100, 17], strict=True)),
             3, F64, PAIRS),
            ([[0, 3], [1], [2, 4, 5]], [1, 20, 3, 30, 5, 70], 6, F64, ()),
            ([[0, 1, 2], [3], [4], [5]], [4, 1, 15, 2, 3, 4], 4, F32, ALONE),
        ]  # fmt: skip
        for seed, (hosted, rows, d, dtype, groups) in enumerate(cases):
            n = len(hosted)
            about = f"clients {', '.join(map(str, hosted))} on {_named(groups, n)}"
            stuck = "the ranks do not make the same calls: how many there are must not depend on a rank's own clients"
            seen = run(_average_clients, hosted, rows, d, dtype, seed, groups, n=n, about=about, stuck=stuck)
            for members in groups or [list(range(n))]:
                _judge_clients([seen[r] for r in members], [hosted[r] for r in members], hosted, rows, d, dtype, seed,
                               members, about)  # fmt: skip


def _judge_clients(seen, hosted, everywhere, rows, d, dtype, seed, members, about):
    only_calls(seen, ("all_reduce",), OTHER_CALLS)
    for rank, one in zip(members, seen, strict=True):
        if one.kept:
            raise Wrong("updates or rows have changed: work on new tensors", f"rank {rank}, {about}")
    n, all_of_us = len(seen), [c for one in hosted for c in one]
    update = {c: values((d,), F64, c, seed).to(dtype).double() for one in everywhere for c in one}

    def weighted(clients):
        return sum(rows[c] * update[c] for c in clients) / sum(rows[c] for c in clients)

    own = [weighted(one) for one in hosted]
    plain_means = [torch.stack([update[c] for c in one]).mean(0) for one in hosted]
    total = sum(rows[c] for c in all_of_us)
    mean, elsewhere = weighted(all_of_us), [c for one in everywhere for c in one]
    outside = len(elsewhere) > len(all_of_us)
    mistakes = [
        ("every client counts the same: a client with more rows has to count more",
         torch.stack([update[c] for c in all_of_us]).mean(0)),
        ("a mean of means: it averages the ranks' means, so that a rank with few rows counts as much as one with many",
         torch.stack(own).mean(0)),
        ("a mean of means, twice: neither the rows nor how many clients a rank has is counted",
         torch.stack(plain_means).mean(0)),
        ("the sum of the ranks' means: one division by all rows, at the end", torch.stack(own).sum(0)),
        ("the mean of each rank's clients, weighted by its rows: within a rank every client counts the same",
         sum(sum(rows[c] for c in one) * m for one, m in zip(hosted, plain_means, strict=True)) / total),
        ("multiplied by the rows and never divided", mean * total),
        (f"divided by the {n} ranks, not by all {total} rows", mean * total / n),
        (f"divided by the {len(all_of_us)} clients, not by all {total} rows", mean * total / len(all_of_us)),
        (f"divided by the {n} ranks once too often", mean / n),
        ("divided by this rank's rows only: the others' rows have to be added up too",
         [mean * total / sum(rows[c] for c in one) for one in hosted]),
        ("nothing was exchanged: this is the mean of the rank's own clients", own),
        ("rows and updates were paired by their order: look both up by the client",
         sum(rows[a] * update[c] for one in hosted for a, c in zip(reversed(one), one, strict=True)) / total),
        ("a client's weight is upside down: more rows have to count more", _upside_down(update, rows, all_of_us)),
        ("the group argument is ignored: this is the mean over all ranks' clients",
         weighted(elsewhere) if outside else None),
        ("the group argument is ignored where the rows are added up",
         mean * total / sum(rows[c] for c in elsewhere) if outside else None),
    ]  # fmt: skip
    mistakes = [(why, [None if t is None else t.to(dtype) for t in (would if isinstance(would, list) else [would] * n)])
                for why, would in mistakes]  # fmt: skip
    same([one.result for one in seen], [mean.to(dtype)] * n, "the result", about, mistakes, labels=members)
    item = torch.finfo(dtype).bits // 8
    for rank, one in zip(members, seen, strict=True):
        made = sum(call.bytes for call in one.calls)
        if n > 1 and (made > d * item + 8 or len(one.calls) > 2):
            raise Wrong(
                f"the result is right, but {made} bytes in {len(one.calls)} calls are all-reduced: {d} numbers and one",
                f"rank {rank}, {about}", f"at most {d * item + 8} bytes in 2 calls", f"{made} bytes",
            )  # fmt: skip


def _upside_down(update, rows, clients):
    if len({rows[c] for c in clients}) == 1:
        return None
    return sum(update[c] / rows[c] for c in clients) / sum(1 / rows[c] for c in clients)


# ---- fixed_point ----------------------------------------------------------------------------------------------


class fixed_point:
    hints = (
        "Multiply by 2**fraction_bits, round, and only then think about the sign: in Python and in torch, -1 % 2**32 "
        "is 2**32 - 1.",
        "The check comes before the wrap: afterwards a number that was too large looks like any other. Each of the "
        "clients may use its part of 2**31 - 1, so that the sum stays within.",
        "`if not (whole.abs() <= limit).all(): raise ValueError(…)` also catches NaN, which is neither larger nor "
        "smaller than anything.",
    )

    @staticmethod
    def check(run):
        def limit(clients):
            return (2**31 - 1) // clients

        good = [
            (torch.tensor([0.0, 1.0, 2.5, 0.3, 0.7, 0.49]), 3, 4),
            (torch.tensor([-1.0, -0.3, -0.7, 2.0, -100.0]), 4, 8),
            (torch.tensor([[0.1, -0.1, 12.75], [3.0, -3.3, 1e-9]]), 10, 16),
            (torch.tensor([limit(8), -limit(8), limit(8) - 1.0], dtype=F64), 8, 0),
            (torch.tensor([limit(100) / 2**12, -limit(100) / 2**12], dtype=F64), 100, 12),
            (torch.tensor([limit(8) + 0.25, -limit(8) - 0.25], dtype=F64), 8, 0),
        ]
        bad = [
            (torch.tensor([1.0, 40000.0]), 3, 16, "a value that alone leaves 32 bits"),
            (torch.tensor([limit(8) + 1.0], dtype=F64), 8, 0, "a value that 8 clients cannot all bring"),
            (
                torch.tensor([0.0, -(limit(4) + 1.0)], dtype=F64),
                4,
                0,
                "a negative value that 4 clients cannot all bring",
            ),
            (torch.tensor([1.0, float("nan")]), 3, 8, "a value that is not a number"),
            (torch.tensor([float("inf")]), 3, 8, "an infinite value"),
        ]
        inputs = [(v.double(), *rest) for v, *rest in good] + [(v.double(), *rest) for v, *rest, _ in bad]
        labels = [f"values {show(v)}, {c} clients, {bits} fraction bits" for v, c, bits in inputs]
        got = _in_one_process(run, inputs, labels)
        edge = len(good) - 1
        if isinstance(got[edge], str) and not any(isinstance(value, str) for value in got[:edge]):
            why = "the range is checked before rounding: it is the whole number that may be as large as the limit"
            raise Wrong(why, labels[edge])
        _judge_encoding(inputs[: len(good)], got[: len(good)], labels)
        for value, label, (*_, kind) in zip(got[len(good) :], labels[len(good) :], bad, strict=True):
            if not (isinstance(value, str) and value.startswith("ValueError")):
                why = {
                    "a value that alone leaves 32 bits": "it is not refused: nothing is checked, and it would wrap",
                    "a value that is not a number": "NaN is not refused: it is neither larger nor smaller than a limit",
                }.get(kind, f"{kind} is not refused: each may use (2**31 - 1) // clients, or the sum can wrap")
                if isinstance(value, torch.Tensor) and kind == "a value that alone leaves 32 bits":
                    signed = (value + 2**31) % FIELD - 2**31
                    if signed.abs().max() <= limit(3):
                        why = "a value that is too large is cut off silently: a wrong sum is worse than a ValueError"
                raise Wrong(why, label, "ValueError", show(value) if isinstance(value, torch.Tensor) else repr(value))


def _judge_encoding(inputs, got, labels):
    def each(formula):
        return [formula(v, c, bits) for v, c, bits in inputs]

    expected = each(lambda v, c, bits: (v * 2**bits).round().long() % FIELD)
    _whole(got, expected, labels[: len(inputs)], "the result")
    mistakes = [
        ("cut off, not rounded: to whole numbers .long() goes towards zero", each(lambda v, c, b: (v * 2**b).long())),
        ("rounded down, not to the nearest: .floor()", each(lambda v, c, b: (v * 2**b).floor().long())),
        ("multiplied by fraction_bits, not by 2**fraction_bits", each(lambda v, c, b: (v * b).round().long())),
        ("divided by 2**fraction_bits: the fraction is lost", each(lambda v, c, b: (v / 2**b).round().long())),
        ("rounded first, then scaled: the fraction is lost", each(lambda v, c, b: (v.round() * 2**b).long())),
        ("negative numbers are one too small: modulo 2**32, not 2**32 - 1",
         each(lambda v, c, b: (v * 2**b).round().long() % (FIELD - 1))),
        ("the sign is lost: -1 has to become 2**32 - 1", each(lambda v, c, b: (v * 2**b).round().abs().long())),
        ("negative numbers are cut off at zero", each(lambda v, c, b: (v * 2**b).round().clamp(min=0).long())),
        ("divided by the number of clients: that makes their mean, and loses digits",
         each(lambda v, c, b: (v * 2**b / c).round().long())),
        ("shifted by 2**31: in the sum every client would bring that shift along",
         each(lambda v, c, b: (v * 2**b).round().long() + 2**31)),
    ]  # fmt: skip
    mistakes = [(why, [t % FIELD for t in would]) for why, would in mistakes]
    mistakes.append(("modulo 2**31: the field has 2**32 elements, half of them stand for negative numbers",
                     each(lambda v, c, b: (v * 2**b).round().long() % 2**31)))  # fmt: skip
    same(got, expected, "", mistakes=mistakes, labels=labels[: len(inputs)])


# ---- mask_vector ----------------------------------------------------------------------------------------------


class mask_vector:
    hints = (
        "Both clients of a pair hold the same mask. If both added it, it would be in the sum twice: one adds, the "
        "other subtracts, and who does which has to be a rule that both know.",
        "The rule here: with a client of a higher number than mine I add, with one of a lower number I subtract.",
        "int64 holds the sum of very many numbers of 32 bits; one % 2**32 at the very end is enough, and in torch it "
        "is never negative.",
    )

    @staticmethod
    def check(run):
        cases = [(4, 2, 3), (4, 0, 3), (4, 3, 5), (8, 4, 1), (3, 1, 6), (50, 20, 4), (1, 0, 2)]
        inputs = []
        for seed, (n, me, size) in enumerate(cases):
            pairs = {o: _numbers(size, 1000 * seed + 10 + o) for o in reversed(range(n)) if o != me}
            inputs.append((_numbers(size, 1000 * seed + 1), me, _numbers(size, 1000 * seed + 2), pairs))
        labels = [f"client {me} of {n}, {size} numbers" for n, me, size in cases]
        got = _in_one_process(run, inputs, labels)

        def each(vector=1, own=1, sign=lambda other, me: 1 if other > me else -1, wrap=FIELD):
            return [
                (vector * v + own * o + sum(sign(c, me) * p for c, p in pairs.items())) % wrap
                for v, me, o, pairs in inputs
            ]

        expected = each()
        _whole(got, expected, labels, "the message")
        mistakes = [
            ("the signs are the wrong way round: with a higher number it adds, with a lower one it subtracts",
             each(sign=lambda c, me: -1 if c > me else 1)),
            ("every pair mask is added: the other side adds it too, and in the sum it stays, doubled",
             each(sign=lambda c, me: 1)),
            ("every pair mask is subtracted: the other side subtracts it too", each(sign=lambda c, me: -1)),
            ("the own mask is missing: without it a client that was declared gone is laid bare", each(own=0)),
            ("the own mask is subtracted: the server will subtract it, so here it is added", each(own=-1)),
            ("the vector itself is missing: this is nothing but masks", each(vector=0)),
            ("the pair masks are missing: only the own mask is on it", each(sign=lambda c, me: 0)),
            ("only the masks with higher numbers are on it: those with lower numbers are to be subtracted",
             each(sign=lambda c, me: int(c > me))),
            ("only the masks with lower numbers are on it: those with higher numbers are to be added",
             each(sign=lambda c, me: -int(c < me))),
            ("the signs alternate with the numbers: both sides of a pair have to see opposite ones",
             each(sign=lambda c, me: 1 if c % 2 == 0 else -1)),
            ("the sign depends on the other number alone: both sides of a pair have to see opposite ones",
             each(sign=lambda c, me: 1 if c % 2 else -1)),
            ("wrapped at 2**31: the field has 2**32 elements", each(wrap=2**31)),
            ("modulo 2**32 - 1: the field has 2**32 elements, from 0 on", each(wrap=FIELD - 1)),
        ]  # fmt: skip
        same(got, expected, "", mistakes=mistakes, labels=labels)


# ---- unmask_sum -----------------------------------------------------------------------------------------------


class unmask_sum:
    hints = (
        "Nobody silent: all pair masks have cancelled in the sum of the messages, and only own masks are left to be "
        "taken off.",
        "For a client that fell silent, every other one has a pair mask in its message that nothing cancels. What a "
        "client did because of it depends on the numbers, as in mask_vector: undo that.",
        "client added the mask where gone > client, so subtract it there; it subtracted it where gone < client, so add "
        "it there. One % 2**32 at the end.",
    )

    @staticmethod
    def check(run):
        cases = [(4, ()), (4, (2,)), (5, (0,)), (5, (4,)), (8, (1, 6)), (9, (0, 3, 8)), (3, ())]
        inputs, vectors = [], []
        for seed, (n, gone) in enumerate(cases):
            size, there = 3 + seed % 2, [c for c in range(n) if c not in gone]
            vector = {c: _numbers(size, 1000 * seed + c) for c in range(n)}
            own = {c: _numbers(size, 1000 * seed + 100 + c) for c in range(n)}
            pair = {frozenset((a, b)): _numbers(size, 1000 * seed + 200 + 20 * a + b) for a in range(n)
                    for b in range(a + 1, n)}  # fmt: skip
            messages = {
                c: (vector[c] + own[c]
                    + sum((1 if o > c else -1) * pair[frozenset((c, o))] for o in range(n) if o != c)) % FIELD
                for c in there
            }  # fmt: skip
            pairs = {g: {c: pair[frozenset((g, c))] for c in there} for g in gone}
            inputs.append((messages, {c: own[c] for c in there}, pairs))
            vectors.append(sum(vector[c] for c in there) % FIELD)
        labels = [f"{n} clients, " + (f"silent: {', '.join(map(str, gone))}" if gone else "nobody silent")
                  for n, gone in cases]  # fmt: skip
        got = _in_one_process(run, inputs, labels)

        def each(own=-1, sign=lambda gone, c: -1 if gone > c else 1, wrap=FIELD, some=slice(None)):
            return [
                (sum(m.values()) + own * sum(o.values())
                 + sum(sign(g, c) * p for g, masks in list(pairs.items())[some] for c, p in masks.items())) % wrap
                for m, o, pairs in inputs
            ]  # fmt: skip

        expected = each()
        for one, other in zip(expected, vectors, strict=True):
            assert torch.equal(one, other)
        _whole(got, expected, labels, "the sum")
        mistakes = [
            ("the pair masks of those who fell silent are still in it: nothing cancels them",
             each(sign=lambda g, c: 0)),
            ("the masks of those who fell silent are taken off with the wrong sign: that doubles them",
             each(sign=lambda g, c: 1 if g > c else -1)),
            ("all pair masks are subtracted: a client with a higher number than the silent one had subtracted its mask",
             each(sign=lambda g, c: -1)),
            ("all pair masks are added: a client with a lower number than the silent one had added its mask",
             each(sign=lambda g, c: 1)),
            ("the masks of one client that fell silent are taken off, not those of all", each(some=slice(1))),
            ("the masks of one client that fell silent are taken off, not those of all", each(some=slice(-1, None))),
            ("the own masks are still in it: take them off", each(own=0)),
            ("the own masks are added once more: take them off", each(own=1)),
            ("neither own masks nor pair masks were taken off: this is the sum of the messages",
             each(own=0, sign=lambda g, c: 0)),
            ("wrapped at 2**31: the field has 2**32 elements", each(wrap=2**31)),
        ]  # fmt: skip
        same(got, expected, "", mistakes=mistakes, labels=labels)


# ---- clip_and_add ---------------------------------------------------------------------------------------------


class clip_and_add:
    hints = (
        "gradients.norm(dim=1) has one length for each row. Each row gets a factor of its own: min(1, clip / length).",
        "torch.clamp(…, max=1) is the min(1, …): without it short gradients would be made longer. A zero gradient "
        "gives clip / 0, which is infinite, and infinity times zero is not a number.",
        "norms = gradients.norm(dim=1, keepdim=True); scale = (clip / norms.clamp(min=1e-30)).clamp(max=1); and then "
        "(gradients * scale).sum(0)",
    )

    @staticmethod
    def check(run):
        def rows(b, d, seed, dtype=F64, spread=True):
            each = values((b, d), F64, 0, seed)
            scale = torch.logspace(-1, 1, b, dtype=F64)[:, None] if spread and b else 1.0
            return (each * scale).to(dtype)

        zero = rows(4, 3, 5)
        zero[1] = 0
        inputs = [
            (rows(6, 4, 1), 1.5),
            (rows(5, 7, 2, F32), 0.01),
            (rows(3, 2, 3), 100.0),
            (rows(1, 5, 4), 0.5),
            (zero, 0.7),
            (rows(0, 3, 6), 1.0),
            (rows(9, 1, 7), 2.0),
            (1e-6 * rows(4, 3, 8), 1e-7),
        ]
        labels = [f"{len(g)} rows of {g.shape[1]} numbers, {str(g.dtype)[6:]}, clip {c}" for g, c in inputs]
        labels[4] += ", one of them zero"
        got = _in_one_process(run, inputs, labels)
        for value, label in zip(got, labels, strict=True):
            if isinstance(value, str) and value.startswith("ValueError"):
                raise Wrong(f"it raises: {value}", label)

        def factor(g, c, norms, smallest=1.0):
            return (c / norms.clamp(min=1e-30)).clamp(max=smallest)

        def clipped(g, c, norm=lambda g: g.norm(dim=1, keepdim=True), most=1.0):
            return (g * factor(g, c, norm(g), most)).sum(0)

        def total(g, c, by=1):
            return g.sum(0) / by * min(1.0, c / max((g.sum(0) / by).norm().item(), 1e-30))

        expected = [clipped(g, c) for g, c in inputs]
        mistakes = [
            ("the sum was clipped, not the single rows: one long row still decides where it points",
             [total(g, c) for g, c in inputs]),
            ("the mean was clipped, not the single rows", [total(g, c, max(len(g), 1)) for g, c in inputs]),
            ("a short row's length was taken to be 1e-3: rows may be shorter than that, only zero needs care",
             [clipped(g, c, lambda g: g.norm(dim=1, keepdim=True).clamp(min=1e-3)) for g, c in inputs]),
            ("the mean was clipped, not the single rows, and multiplied back",
             [total(g, c, max(len(g), 1)) * len(g) for g, c in inputs]),
            ("nothing is clipped", [g.sum(0) for g, c in inputs]),
            ("every row was made as long as clip: short ones stay as they are, the factor is at most 1",
             [clipped(g, c, most=math.inf) for g, c in inputs]),
            ("each number was cut off at ±clip: it is the row's length that is bounded",
             [g.clamp(-c, c).sum(0) for g, c in inputs]),
            ("one factor for all rows, from the longest: each row has its own",
             [g.sum(0) * min(1.0, c / max(g.norm(dim=1).max().item(), 1e-30)) if len(g) else None for g, c in inputs]),
            ("the mean of the clipped rows: the sum was asked for",
             [clipped(g, c) / len(g) if len(g) else None for g, c in inputs]),
            ("the length is the sum of absolute values: the Euclidean one was asked for",
             [clipped(g, c, lambda g: g.abs().sum(1, keepdim=True)) for g, c in inputs]),
            ("divided by the squared length: the root is missing",
             [clipped(g, c, lambda g: g.square().sum(1, keepdim=True)) for g, c in inputs]),
            ("1e-6 was added to the length: max(length, something tiny) keeps the zero away and changes nothing else",
             [(g * (c / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)).sum(0) for g, c in inputs]),
            ("rows longer than clip are left out: they are to be shortened",
             [(g * (g.norm(dim=1, keepdim=True) <= c)).sum(0) for g, c in inputs]),
            ("the lengths are taken over the columns: dim=1 runs along a row",
             [(g * factor(g, c, g.norm(dim=0, keepdim=True))).sum(0) for g, c in inputs]),
        ]  # fmt: skip
        if isinstance(got[4], torch.Tensor) and got[4].isnan().any():
            raise Wrong("a row that is zero makes the sum not a number: clip / 0 is infinite, and times 0 is NaN",
                        labels[4], show(expected[4]), show(got[4]))  # fmt: skip
        few = [[values[i] for i in range(len(inputs)) if i != 5] for values in (got, expected, labels)]
        mistakes = [(why, [t for i, t in enumerate(would) if i != 5]) for why, would in mistakes]
        same(few[0], few[1], "", mistakes=mistakes, labels=few[2])
        same(got[5:6], expected[5:6], "", labels=labels[5:6])  # no rows at all


# ---- noisy_sum ------------------------------------------------------------------------------------------------

D = 20_000  # numbers; the measured deviation of that many is right to 0.5 %


def _noisy(answer, clip, sigma, dtype, seed, groups, d, rows):
    """On a rank: the answer, and what it did with the generator and with the message it sent."""
    rank = dist.get_rank()
    total = values((d,), dtype, rank, seed) * rows
    kept, generator = total.clone(), torch.Generator().manual_seed(99_991 + 77 * seed + rank)
    state = torch.get_rng_state()
    options = _mine(groups)
    sent, plain_call = [], dist.all_reduce

    def noticing(tensor, *args, **kwargs):
        sent.append(tensor.detach().clone())
        return plain_call(tensor, *args, **kwargs)

    dist.all_reduce = noticing
    try:
        seen = watched(answer, total, clip, sigma, generator, **options)
    finally:
        dist.all_reduce = plain_call
    elsewhere = not torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(state)
    fresh = torch.Generator().manual_seed(99_991 + 77 * seed + rank)
    untouched = torch.equal(fresh.get_state(), generator.get_state())
    seen.kept = {"before": kept, "after": total, "untouched": untouched, "global": elsewhere, "sent": sent}
    return seen


class noisy_sum:
    hints = (
        "Noise of several ranks adds up in squares: n shares of standard deviation s together have s · √n.",
        "So every rank's share is sigma · clip / √n. Add it first, then all_reduce: what leaves the rank has its noise "
        "on it, and all ranks end with the same sum.",
        "share = sigma * clip / dist.get_world_size(group) ** 0.5; result = total + share * "
        "torch.randn(total.shape, generator=generator, dtype=total.dtype); dist.all_reduce(result, group=group)",
    )

    @staticmethod
    def check(run):
        cases = [(4, 0.3, 5.0, F64, ()), (2, 3.0, 1.25, F32, ()), (4, 4.0, 0.7, F64, ALONE),
                 (4, 0.3, 2.0, F64, PAIRS), (3, 0.2, 6.0, F32, ())]  # fmt: skip
        cases += [(4, 0.5, 3.0, F64, ())]  # the last: no row took part in this step
        for seed, (n, clip, sigma, dtype, groups) in enumerate(cases):
            rows = seed < len(cases) - 1
            about = f"{_named(groups, n)}, clip {clip}, sigma {sigma}" + ("" if rows else ", all totals zero")
            seen = run(_noisy, clip, sigma, dtype, seed, groups, D, rows, n=n, about=about)
            for members in groups or [list(range(n))]:
                _judge_noise([seen[r] for r in members], seen, members, clip, sigma, about, rows)


def _judge_noise(mine, everyone, members, clip, sigma, about, rows=True):
    only_calls(mine, ("all_reduce",), OTHER_CALLS)
    n, stated = len(mine), sigma * clip
    kept = [one.kept for one in mine]
    for rank, one, k in zip(members, mine, kept, strict=True):
        if not torch.equal(k["before"], k["after"]):
            raise Wrong("`total` has changed: work on a new tensor", f"rank {rank}, {about}")
        got, want = one.result, k["before"]
        if not isinstance(got, torch.Tensor) or got.shape != want.shape or got.dtype != want.dtype:
            same([got], [want], "the result", about, labels=[rank])
            raise Wrong(f"it returns {type_of(got)}", f"rank {rank}, {about}")
        if not got.isfinite().all():
            raise Wrong("the result is not finite", f"rank {rank}, {about}")
    total = sum(k["before"].double() for k in kept)
    noise = [one.result.double() - total for one in mine]
    spread = [x.std().item() for x in noise]
    shown = {"expected": f"noise of standard deviation {stated:.4g}", "got": f"{spread[0]:.4g}"}
    whole = sum(one.kept["before"].double() for one in everyone)
    if len(everyone) > n and _share(mine[0].result.double() - total, whole - total) > 0.5:
        raise Wrong("the group argument is ignored: this is the sum over all ranks", about)
    if n > 1 and not mine[0].calls:
        raise Wrong("nothing is sent: the sum over the ranks is asked for", about)
    if any(not torch.equal(x, noise[0]) for x in noise) and n > 1:
        raise Wrong("the ranks end with different sums: noise that is added after all_reduce is another one on every "
                    "rank, and the messages went out without any", about)  # fmt: skip
    if any(k["global"] for k in kept):
        raise Wrong("noise is drawn without the generator that was given: torch.randn(…, generator=generator)", about)
    added = [(k["sent"] or [one.result])[0] for one, k in zip(mine, kept, strict=True)]
    added = [a.double() - k["before"].double() for a, k in zip(added, kept, strict=True) if a.shape == (D,)]
    if mine[0].kept["before"].dtype == F64:
        for rank, own in zip(members, added, strict=False):
            _judge_share(own, f"rank {rank}, {about}")
    quiet = [r for r, k in zip(members, kept, strict=True) if k["untouched"]]
    if spread[0] < 1e-3 * stated:
        why = "there is no noise" + ("" if rows else " where the total is zero: that no row took part is a secret too")
        raise Wrong(why, about, **shown)
    if quiet and len(added) == n and added[members.index(quiet[0])].any():
        raise Wrong("the generator that was given has not moved on: the next call would add the same noise again, and "
                    "the difference of two messages would have none", f"rank {quiet[0]}, {about}")  # fmt: skip
    if quiet:
        raise Wrong(f"rank {quiet[0]} adds no noise: its message goes out as it is", f"rank {quiet[0]}, {about}")
    size = mine[0].kept["before"].nbytes
    for rank, one, k in zip(members, mine, kept, strict=True):
        for message in k["sent"][:1]:
            if n > 1 and message.numel() == D and torch.equal(message.double(), k["before"].double()):
                raise Wrong("the message goes out without noise: add this rank's share before all_reduce",
                            f"rank {rank}, {about}")  # fmt: skip
        if n > 1 and sum(c.bytes for c in one.calls) != size:
            made = sum(c.bytes for c in one.calls)
            raise Wrong(f"{made:,} bytes are all-reduced: once the {size:,} bytes of the sum is enough", about)
    scale = _share(mine[0].result.double(), total) if rows else 1.0
    if abs(scale - 1) > 0.15:
        raise Wrong(f"the sum itself is {scale:.2g} times what it should be, noise apart", about)
    centre = sum(x.mean().item() for x in noise) / n
    if abs(centre) > 8 * max(spread[0], stated) / math.sqrt(D):
        raise Wrong(f"the noise is not centred: its mean is {centre:.3g}; or is the sum itself another one?", about)
    off = spread[0] / stated
    reasons = [
        ("the noise is added at full scale on every rank: together it is √ranks times too large", math.sqrt(n)),
        ("divided by the number of ranks, not by its root: together there is too little noise", 1 / math.sqrt(n)),
        ("clip is missing: sigma is in units of clip", 1 / clip),
        ("clip is missing, and every rank adds at full scale", math.sqrt(n) / clip),
        ("sigma is missing: the noise is sigma · clip", 1 / sigma),
        ("sigma · clip was taken for the variance: torch.randn is multiplied by the standard deviation",
         stated**-0.5),
        ("the noise was divided by the root of the ranks twice", 1 / n),
        ("the noise is multiplied by √ranks: it has to be divided by it", n),
        ("sigma is squared", sigma), ("clip is squared", clip),
    ]  # fmt: skip
    if len(everyone) > n:
        reasons.insert(0, ("the group argument is ignored in the share: this group has fewer ranks",
                           math.sqrt(n / len(everyone))))  # fmt: skip
    if abs(off - 1) > 0.04:
        for why, factor in reasons:
            if abs(off / factor - 1) < 0.04:
                raise Wrong(why, about, **shown)
        raise Wrong(f"the noise is {off:.3g} times as large as it should be", about, **shown)
    shape = (noise[0] / noise[0].std()).pow(4).mean().item()  # 3 for Gaussian noise, 1.8 for uniform
    if n == 1 and abs(shape - 3) > 0.3:
        raise Wrong("the noise is not Gaussian: draw it with torch.randn", about, "kurtosis 3", f"{shape:.2f}")
    shares = [(k["sent"][0].double() - k["before"].double()).std().item() for k in kept if k["sent"]]
    if n > 1 and len(shares) == n and max(shares) > 1.1 * min(shares):
        raise Wrong("the ranks' shares of the noise are not equally large", about, "equal shares",
                    ", ".join(f"{s:.3g}" for s in shares))  # fmt: skip


def _judge_share(own, where):
    """Raise Wrong where one rank's noise, float64, leaves some direction without any."""
    if not own.any():
        return
    if (own == 0).any():
        bare = (own == 0).nonzero().flatten()
        raise Wrong(f"{len(bare):,} of the {D:,} numbers go out without noise, the first at place {bare[0].item()}: "
                    "every one needs its own", where)  # fmt: skip
    steps = (own.abs() / own.square().mean().sqrt() * 1e6).round()
    if len(steps.unique()) < 0.9 * D:
        raise Wrong("the same noise is on several numbers: their difference has none. Every number needs its own",
                    where, f"{D:,} different ones", f"{len(steps.unique()):,}")  # fmt: skip
    if abs(own.mean()) < 1e-9 * own.std():
        raise Wrong("the noise adds up to zero over the numbers: their sum goes out without any", where)


def _share(found, of):
    """How much of the tensor `of` is in `found`: 1 where it is all there."""
    return (found @ of / (of @ of)).item()


# ---- rate_and_steps -------------------------------------------------------------------------------------------


class rate_and_steps:
    hints = (
        "A row takes part with the same probability wherever it is: what counts is all rows together, and all rows "
        "that take part in one step.",
        "rate = batch / sum(rows). After s steps a row has taken part s · rate times on average: that has to be at "
        "least epochs.",
        "math.ceil(epochs / rate), the smallest whole number that is enough. (Mind that epochs / rate may come out as "
        "6000.000000000001: round first.)",
    )

    @staticmethod
    def check(run):
        inputs = [([15000] * 4, 150, 15), ([900, 300, 240], 60, 4), ([100], 7, 3), ([30, 10], 40, 5),
                  ([1000, 2, 400, 38], 90, 1), ([50, 50], 12.5, 2), ([360] * 4, 144, 20),
                  ([301, 300, 240], 60, 4)]  # fmt: skip
        labels = [f"rows {rows}, batch {batch}, {epochs} epochs" for rows, batch, epochs in inputs]
        got = _in_one_process(run, inputs, labels)
        for value, label in zip(got, labels, strict=True):
            if not isinstance(value, (tuple, list)) or len(value) != 2:
                raise Wrong(f"it returns {_kind(value)}: the pair (rate, steps) is asked for", label)

        def ratio(formula):
            return [torch.tensor(float(formula(*args)), dtype=F64) for args in inputs]

        rates, steps = [_number(v[0]) for v in got], [_number(v[1]) for v in got]
        same(rates, ratio(lambda r, b, e: b / sum(r)), "", labels=[f"the rate, {label}" for label in labels], mistakes=[
            ("rate and steps are swapped", ratio(lambda r, b, e: math.ceil(round(e * sum(r) / b, 9)))),
            ("divided by one rank's rows: a row may be on any rank, all rows count", ratio(lambda r, b, e: b / r[0])),
            ("divided by the mean of the ranks' rows: all rows count", ratio(lambda r, b, e: b / (sum(r) / len(r)))),
            ("the batch was divided by the ranks: it is of all ranks together",
             ratio(lambda r, b, e: b / len(r) / sum(r))),
            ("upside down: that is the number of steps in an epoch", ratio(lambda r, b, e: sum(r) / b)),
            ("1 over all rows: every row takes part, not one in each step", ratio(lambda r, b, e: 1 / sum(r))),
            ("multiplied by the epochs: the rate is that of one step", ratio(lambda r, b, e: e * b / sum(r))),
            ("divided by the epochs: the rate is that of one step", ratio(lambda r, b, e: b / sum(r) / e)),
            ("the batch itself: a probability is asked for", ratio(lambda r, b, e: b)),
            ("rows that the ranks do not divide evenly are lost: all rows count",
             ratio(lambda r, b, e: b / (sum(r) // len(r) * len(r)))),
            ("divided by the largest rank's rows", ratio(lambda r, b, e: b / max(r))),
        ])  # fmt: skip
        same(steps, ratio(lambda r, b, e: math.ceil(round(e * sum(r) / b, 9))), "", mistakes=[
            ("rounded to the nearest: that can be one step too few", ratio(lambda r, b, e: round(e * sum(r) / b))),
            ("rounded down: the last row would have taken part too rarely", ratio(lambda r, b, e: int(e * sum(r) / b))),
            ("the epochs are missing: these are the steps of one", ratio(lambda r, b, e: math.ceil(sum(r) / b))),
            ("these are the epochs: each of them has many steps", ratio(lambda r, b, e: e)),
            ("one rank's steps: a batch is taken from all ranks together",
             ratio(lambda r, b, e: math.ceil(e * r[0] / b))),
            ("multiplied by the ranks: a step is one step of all ranks together",
             ratio(lambda r, b, e: len(r) * math.ceil(round(e * sum(r) / b, 9)))),
            ("rounded up for each epoch, then multiplied: round once, at the end",
             ratio(lambda r, b, e: e * math.ceil(sum(r) / b))),
            ("one step too many where it fits exactly", ratio(lambda r, b, e: int(round(e * sum(r) / b, 9)) + 1)),
            ("a step for every row: in a step batch of them take part", ratio(lambda r, b, e: e * sum(r))),
            ("not a whole number of steps", ratio(lambda r, b, e: e * sum(r) / b)),
        ], labels=[f"the steps, {label}" for label in labels], tolerance=(1e-12, 1e-12))  # fmt: skip
        for value, label in zip(got, labels, strict=True):
            if isinstance(value[1], (bool, float)) or not equal(_number(value[1]), _number(value[1]).round()):
                raise Wrong("the number of steps is to be an int", label, got=repr(value[1]))


def _number(value):
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    ordinary = isinstance(value, (int, float)) and not isinstance(value, bool)
    return torch.tensor(float(value), dtype=F64) if ordinary else value


def _kind(value):
    return f"a {value.type}" if isinstance(value, Other) else "nothing (None)" if value is None else repr(value)[:60]
