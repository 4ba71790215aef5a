"""The exercises of lesson 08: hints, and how an answer is checked."""

import math

import torch
import torch.distributed as dist

from .cases import F32, F64, values
from .judge import Wrong, equal, only_calls, same, show, type_of
from .watch import group_of, plain, watched

PAIRS, ALONE = [[0, 2], [1, 3]], [[0], [1], [2], [3]]
INF, NAN = math.inf, math.nan


def _mine(groups):
    """The argument `group` for this rank, where there are groups. Every rank has to call it."""
    made = {rank: group_of(members) for members in groups for rank in members}
    return {"group": made[dist.get_rank()]} if groups else {}


def _named(groups, n):
    if not groups:
        return f"{n} rank{'s' * (n > 1)}"
    return "two groups of 2 ranks" if len(groups[0]) == 2 else "four groups of 1 rank"


def _number(value, said, label):
    """A Python number out of what an answer returned; Wrong for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Wrong(f"{said} is {type_of(value)}: a number is asked for", label)
    return float(value)


def _pair(value, said, label):
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise Wrong(f"it returns {type_of(value)}: the pair {said} is asked for", label)
    return value


def _unsent(seen):
    if seen.calls:
        raise Wrong(f"it calls {seen.calls[0].op}: this one is arithmetic, in one process")


# ---- next_scale -----------------------------------------------------------------------------------------------


def _histories(answer, histories):
    """On one rank: the states (scale, good steps) that the answer goes through in each history."""

    def all_of_them():
        found = []
        for scale, good, interval, overflows in histories:
            states, state = [], (scale, good)
            for overflow in overflows:
                state = answer(*state, overflow, interval)
                states.append(plain(state))
                if not isinstance(state, (tuple, list)) or len(state) != 2:
                    break
            found.append(states)
        return found

    return watched(all_of_them)


def _rule(overflow_factor=0.5, after=0, back=True, reset_on_overflow=True, reset_on_growth=True, grow_on_overflow=False,
          keep_growing=False, growth=2.0, below=0):  # fmt: skip
    """A rule for the scale, right or with one mistake, as a function (scale, good, overflow, interval) -> state."""

    def rule(scale, good, overflow, interval):
        if overflow:
            scale = scale * (2.0 if grow_on_overflow else overflow_factor if back else 1.0)
            return scale, 0 if reset_on_overflow else good + (reset_on_overflow is None)
        good += 1
        if (good >= interval + after) if keep_growing else (good == interval + after):
            return scale * growth, 0 if reset_on_growth else good
        return scale, good

    return rule


def _bounded(most):
    def rule(scale, good, overflow, interval):
        new, good = _rule()(scale, good, overflow, interval)
        return (min(new, most) if new > scale else new), good

    return rule


class next_scale:
    hints = (
        "Three cases, and each returns both numbers: an overflow, an ordinary good step, a good step that completes "
        "the interval.",
        "This step counts too: where good_steps + 1 == interval, the scale doubles now, and counting begins at 0.",
        "An overflow makes the count 0 as well: `interval` good steps *in a row* are needed.",
    )

    @staticmethod
    def check(run):
        histories = [
            (65536.0, 0, 3, [False] * 7),
            (65536.0, 0, 4, [False, False, True, False, False, False, False, True, True, False]),
            (1024.0, 0, 2000, [True] * 3 + [False] * 3),
            (8.0, 1998, 2000, [False] * 4),
            (4.0, 0, 1, [False, False, True, False]),
            (1.0, 2, 5, [True, False, False, False, False, False, False, True]),
            (2.0**44, 0, 2, [False] * 4),
        ]
        [seen] = run(_histories, histories, n=1)
        _unsent(seen)
        wrong_rules = [
            ("the scale never falls: an overflow has to halve it", _rule(back=False)),
            ("the scale never grows: after `interval` good steps it doubles", _rule(growth=1.0)),
            ("it grows after an overflow, which makes the next one certain: it has to fall",
             _rule(grow_on_overflow=True)),
            ("it grows one good step too late: this step counts too", _rule(after=1)),
            ("it grows one good step too early", _rule(after=-1)),
            ("an overflow does not start the count anew: the good steps have to be in a row",
             _rule(reset_on_overflow=False)),
            ("an overflow counts as a good step", _rule(reset_on_overflow=None)),
            ("the count goes on after the scale has doubled: it starts at 0 again", _rule(reset_on_growth=False)),
            ("once there have been `interval` good steps the scale doubles in every step: start the count at 0 again",
             _rule(reset_on_growth=False, keep_growing=True)),
            ("an overflow makes the scale a quarter: half is asked for", _rule(0.25)),
            ("an overflow makes the scale 1: half is asked for",
             lambda s, g, o, i: (1.0, 0) if o else _rule()(s, g, o, i)),
            ("a step that overflows completes the interval, and doubles the scale before it is halved: it is no good "
             "step", lambda s, g, o, i: (s if o and g + 1 == i else _rule()(s, g, o, i)[0], _rule()(s, g, o, i)[1])),
            ("`interval` is ignored: it is not always 2,000", lambda s, g, o, i: _rule()(s, g, o, 2000)),
            *((f"the scale is held at {b:g}: nothing here bounds it", _bounded(b))
              for b in (65504.0, 65536.0, 2.0**24, 2.0**32)),
        ]  # fmt: skip
        cases = []
        for (scale, good, interval, overflows), states in zip(histories, seen.result, strict=True):
            said = "".join("x" if o else "." for o in overflows)
            about = f"scale {scale:g}, {good} good steps, interval {interval}, then {said} (x: overflow)"
            got = []
            for state in states:
                new, count = _pair(state, "(scale, good_steps)", about)
                got.append([_number(new, "the scale", about), _number(count, "the count", about)])

            def through(rule, first=(scale, good), overflows=overflows, interval=interval):
                found, state = [], first
                for overflow in overflows:
                    state = rule(*state, overflow, interval)
                    found.append(state)
                return torch.tensor(found, dtype=F64)

            mine, would = torch.tensor(got, dtype=F64), [through(rule) for _, rule in wrong_rules]
            cases.append((about, mine, through(_rule()), would))
        wholly = [all(torch.equal(mine, would[i]) for _, mine, _, would in cases) for i in range(len(wrong_rules))]
        for about, mine, expected, would in cases:
            order = sorted(range(len(wrong_rules)), key=lambda i: not wholly[i])
            likely = [(wrong_rules[i][0], would[i]) for i in order if torch.equal(would[i], mine)]
            for column, what in ((0, "the scale after each step"), (1, "the count after each step")):
                known = [(why, [w[:, column]]) for why, w in likely]
                same([mine[:, column]], [expected[:, column]], what, "", known, labels=[f"{what}, {about}"])


# ---- step_or_skip ---------------------------------------------------------------------------------------------

LARGEST = "largest"
STUCK = (
    "not every rank makes the same calls: each makes one all_reduce of a single number, whether it saw an overflow or "
    "not, and however many gradients it has"
)
SIZES = [5, 3, 0, 7]  # elements of each rank's shard


def _spoilt_gradient(rank, dtype, seed, bad):
    gradient = values((SIZES[rank],), dtype, rank, seed) * 1000
    if bad.get(rank) == LARGEST:
        gradient[:] = 0.9 * torch.finfo(dtype).max  # finite, but their sum is not
    elif rank in bad and len(gradient):
        gradient[len(gradient) // 2] = bad[rank]
    return gradient


def _step_or_skip(answer, spoils, scale, lr, dtype, groups):
    """On a rank: one step after the other, on fresh shards; [(returned, parameters, whether gradients changed)]."""
    rank, options = dist.get_rank(), _mine(groups)
    kept = []

    def all_of_them():
        said = []
        for seed, bad in enumerate(spoils):
            p, g = values((SIZES[rank],), dtype, rank, 50 + seed), _spoilt_gradient(rank, dtype, seed, bad)
            before = g.clone()
            said.append(plain(answer(p, g, scale, lr, **options)))
            kept.append((p, torch.allclose(before, g, 0, 0, equal_nan=True)))
        return said

    seen = watched(all_of_them)
    seen.kept = kept
    return seen


class step_or_skip:
    hints = (
        "Two questions, one after the other: is anything wrong on *this* rank (gradients.isfinite().all()), and is "
        "anything wrong on *any* rank?",
        "The second needs the others: a tensor that is 1.0 where this rank's gradients are bad, else 0.0, and "
        "dist.all_reduce with dist.ReduceOp.MAX. Every rank has to call it, the good ones too.",
        "Only then: if bad, return False; else parameters -= lr * (gradients / scale), in place, and return True.",
    )

    @staticmethod
    def check(run):
        spoils = [{}, {3: INF}, {1: INF}, {0: NAN, 1: NAN}, {1: -INF}, {0: INF, 1: INF, 3: NAN}, {0: -INF}, {3: NAN},
                  {}, {0: LARGEST, 1: LARGEST}]  # fmt: skip
        cases = [(2, 64.0, 1.0, F64, ()), (4, 1024.0, 0.5, F32, ()), (4, 8.0, 0.1, F64, PAIRS), (3, 16.0, 0.2, F32, ()),
                 (4, 32.0, 0.3, F64, ALONE)]  # fmt: skip
        for n, scale, lr, dtype, groups in cases:
            about = f"{_named(groups, n)}, scale {scale:g}"
            seen = run(_step_or_skip, spoils, scale, lr, dtype, groups, n=n, about=about, stuck=STUCK)
            for members in groups or [list(range(n))]:
                _judge_steps([seen[r] for r in members], members, spoils, scale, lr, dtype, about, range(n))


def _judge_steps(seen, members, spoils, scale, lr, dtype, about, everywhere):
    only_calls(seen, ("all_reduce",), {"": "it calls {op}: one all_reduce of a single number is all that is needed"})
    steps = range(len(spoils))
    bad = [{r: v for r, v in spoil.items() if r in everywhere and SIZES[r] and v != LARGEST} for spoil in spoils]
    near = [{r: v for r, v in one.items() if r in members} for one in bad]
    p = [[values((SIZES[r],), dtype, r, 50 + i) for r in members] for i in steps]
    g = [[_spoilt_gradient(r, dtype, i, spoils[i]) for r in members] for i in steps]
    after = [[one.kept[i][0] for one in seen] for i in steps]

    def if_skipped(skips):
        """What all parameters would be, where `skips(step, rank)` says who skips."""
        return [[a if skips(i, r) else a - lr * (b / scale) for r, a, b in zip(members, p[i], g[i], strict=True)]
                for i in steps]  # fmt: skip

    right = if_skipped(lambda i, r: bool(near[i]))
    verdicts = [
        ("the step is made in spite of an overflow: nothing is ever skipped", lambda i, r: False),
        ("the overflow is not agreed: ranks that did not see it stepped, those that did skipped, and from here on "
         "their parameters belong to different steps", lambda i, r: r in near[i]),
        ("all ranks have to overflow before one skips: the maximum over the ranks is asked for, not the minimum",
         lambda i, r: len(near[i]) == len(members)),
        ("NaN is not noticed: isfinite() looks for both, isinf() does not",
         lambda i, r: any(v == v for v in near[i].values())),
        ("an infinity is not noticed: isfinite() looks for both, isnan() does not",
         lambda i, r: any(v != v for v in near[i].values())),
        ("minus infinity is not noticed, nor NaN: isfinite() looks for all of them",
         lambda i, r: any(v == INF for v in near[i].values())),
        ("minus infinity is not noticed", lambda i, r: any(v == INF or v != v for v in near[i].values())),
        ("the group argument is ignored: a rank outside of this group overflowed", lambda i, r: bool(bad[i])),
        ("every step is skipped, also where all gradients are finite", lambda i, r: True),
        ("the wrong way round: it steps where there was an overflow, and skips where there was none",
         lambda i, r: not near[i]),
        ("only rank 0's verdict counts: any rank's has to", lambda i, r: members[0] in near[i]),
    ]  # fmt: skip
    if any(0 < len(one.calls) < len(spoils) for one in seen):
        raise Wrong(STUCK, about)
    idle = all(torch.equal(x, y) for xs, ys in zip(after, p, strict=True) for x, y in zip(xs, ys, strict=True))
    if idle and any(map(len, after[0])) and any(made is True for one in seen for made in one.result):
        raise Wrong("parameters is as it was before the call: write into it with -=", about)
    for why, skips in verdicts:
        would = if_skipped(skips)
        if _alike(after, would) and not _alike(would, right):
            raise Wrong(why, about)
    if _alike(after[:-1], right[:-1]) and _alike(after[-1:], p[-1:]) and not _alike(right[-1:], p[-1:]):
        why = "gradients that are large, but finite, are taken for an overflow: look at each number, not at their sum"
        raise Wrong(why, about)
    amiss = [i for i in steps if not _alike(after[i : i + 1], right[i : i + 1])]
    if amiss and all(any(v != v for v in near[i].values()) for i in amiss):
        why = "a NaN gets lost on the way: a maximum of numbers may drop it. Reduce the verdict, 1.0 or 0.0, instead"
        raise Wrong(why, about)
    for i in steps:
        said = " and ".join(f"rank {r} has {v}" for r, v in near[i].items()) or "all gradients finite"
        here = f"{about}, {said}"
        pairs = list(zip(p[i], g[i], strict=True))
        mistakes = [
            ("the gradients are not unscaled: divide them by the scale", [a - lr * b for a, b in pairs]),
            ("unscaled twice: the gradients are divided by the scale two times",
             [a - lr * (b / scale / scale) for a, b in pairs]),
            ("multiplied by the scale: divide", [a - lr * (b * scale) for a, b in pairs]),
            ("the step goes uphill: minus is asked for", [a + lr * (b / scale) for a, b in pairs]),
            ("lr is missing", [a - b / scale for a, b in pairs]),
            ("parameters is as it was: write into it with -=", p[i]),
        ]  # fmt: skip
        if near[i]:
            mistakes = [("the bad numbers are left out and the step is made with the others: skip it as a whole",
                         [a - lr * (b.nan_to_num(0, 0, 0) / scale) for a, b in pairs])]  # fmt: skip
        same(after[i], right[i], "parameters", here, mistakes, labels=members)
        for rank, one in zip(members, seen, strict=True):
            made = one.result[i]
            made = bool(made.item()) if isinstance(made, torch.Tensor) and made.numel() == 1 else made
            if not isinstance(made, bool):
                raise Wrong(f"it returns {type_of(made)}: True or False is asked for", f"rank {rank}, {here}")
            if made is bool(near[i]):
                why = "what it returns is the wrong way round, or this rank's own verdict: True where the step was made"
                raise Wrong(why, f"rank {rank}, {here}", str(not near[i]), str(made))
            if not one.kept[i][1]:
                why = "`gradients` has changed: g / scale makes a new tensor, g /= scale writes into it"
                raise Wrong(why, f"rank {rank}, {here}")
    for rank, one in zip(members, seen, strict=True):
        most = max((call.bytes for call in one.calls), default=0)
        if len(members) > 1 and (most > 8 or len(one.calls) > len(spoils)):
            why = f"{len(one.calls) / len(spoils):g} calls of {most} bytes a step: one all_reduce of a number will do"
            raise Wrong(why, f"rank {rank}, {about}")


def _alike(a, b):
    """Whether two lists of lists of tensors hold the same, NaN and infinities too."""
    return all(isinstance(x, torch.Tensor) and x.shape == y.shape and torch.allclose(x, y, 1e-6, 1e-7, equal_nan=True)
               for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True))  # fmt: skip


# ---- unscale_and_clip -----------------------------------------------------------------------------------------


def _clips(answer, inputs):
    def all_of_them():
        found = []
        for gradients, scale, most in inputs:
            own = [g.clone() for g in gradients]
            handed = list(own)
            returned = plain(answer(handed, scale, most))
            replaced.append(len(handed) == len(own) and any(a is not b for a, b in zip(handed, own, strict=True)))
            found.append([returned, *own])
        return found

    replaced = []
    seen = watched(all_of_them)
    seen.kept = not any(replaced)
    return seen


class unscale_and_clip:
    hints = (
        "max_norm is meant for the gradients of the loss, not of the loss times the scale: unscale first.",
        "norm = root of Σ (g / scale)² over all tensors together: add up squares, then one root.",
        "One factor for all: min(1, max_norm / norm) / scale; where the norm is 0 nothing is to be clipped. g *= "
        "factor or g.mul_(factor) writes into the tensor.",
    )

    @staticmethod
    def check(run):
        inputs = []
        for seed, (shapes, dtype, scale, times) in enumerate((
            ([(2, 2), (3,)], F64, 8.0, 3.0), ([(3, 4), (4,), ()], F64, 1024.0, 0.3), ([(5,)], F32, 65536.0, 0.01),
            ([(6,), (2, 3), (1,)], F32, 2.0, 0.9), ([(4,)], F64, 0.5, 0.25), ([(3,), (2,)], F64, 256.0, None),
        )):  # fmt: skip
            g = [values(shape, dtype, i, seed) * (1 + 2 * i) for i, shape in enumerate(shapes)]
            norm = math.sqrt(sum(t.double().square().sum().item() for t in g))
            if times is None:
                inputs.append(([t * 0 for t in g], scale, 1.0))  # nothing has a gradient
            else:
                inputs.append(([t * scale for t in g], scale, norm * times))
        labels = [f"shapes {[tuple(t.shape) for t in g]}, scale {s:g}, max_norm {m:.3g}" for g, s, m in inputs]
        [seen] = run(_clips, inputs, n=1)
        _unsent(seen)
        if not seen.kept:
            raise Wrong("other tensors were put into the list: write into those that are there, with mul_ or *=")
        wholly = [  # mistakes that explain the whole of it, in all cases
            why
            for i, (why, _) in enumerate(_clipped(*inputs[0]))
            if i and all(
                len(after) == len(given[0]) and all(map(equal, after, _clipped(*given)[i][1]))
                for given, (_, *after) in zip(inputs, seen.result, strict=True)
                if any(t.any() for t in given[0])
            )
        ]  # fmt: skip
        for (g, scale, most), label, (returned, *after) in zip(inputs, labels, seen.result, strict=True):
            norm = _length(g) / scale
            if any(not isinstance(t, torch.Tensor) or t.isnan().any() for t in after) and norm == 0:
                raise Wrong("gradients that are all zero become NaN: max_norm / 0 is infinite", label)
            (_, right), *mistakes = _clipped(g, scale, most)
            mistakes.sort(key=lambda pair: pair[0] not in wholly)
            same(after, right, "", mistakes=mistakes, labels=[f"gradient {i}, {label}" for i in range(len(g))])
            if isinstance(returned, torch.Tensor):
                raise Wrong("it returns a tensor: a Python number is asked for, norm.item()", label)
            got = torch.tensor(_number(returned, "what it returns", label), dtype=F64)
            wrong = [
                ("the norm of the scaled gradients", norm * scale), ("the norm after clipping", min(norm, most)),
                ("the factor", min(1.0, most / max(norm, TINY))), ("the squared norm", norm**2),
                ("the norm of the last gradient", _length(g[-1:]) / scale),
                ("the sum of the tensors' norms", sum(_length([t]) for t in g) / scale),
            ]  # fmt: skip
            why = "it returns {}: the norm of all unscaled gradients before clipping is asked for"
            wrong = [(why.format(what), [torch.tensor(x, dtype=F64)]) for what, x in wrong]
            expected = [torch.tensor(norm, dtype=F64)]
            same([got], expected, "", mistakes=wrong, labels=[f"the result, {label}"], tolerance=(1e-5, 1e-12))


TINY = 1e-30


def _length(gradients):
    return math.sqrt(sum(t.double().square().sum().item() for t in gradients))


def _clipped(g, scale, most):
    """(diagnosis, gradients): the right ones first, then what each mistake would give."""
    norm = _length(g) / scale
    factor = min(1.0, most / max(norm, TINY))

    def times(f):
        return [t * x for t, x in zip(g, f if isinstance(f, list) else [f] * len(g), strict=True)]

    def at_most(norm):
        return min(1.0, most / max(norm, TINY))

    return [
        ("", times(factor / scale)),
        ("clipped before unscaling: the norm of the scaled gradients is `scale` times too large, so nearly everything "
         "is clipped, and then divided once more", times(at_most(norm * scale) / scale)),
        ("unscaled twice: divided by the scale two times", times(factor / scale / scale)),
        ("unscaled twice, the norm being taken in between", times(at_most(norm / scale) / scale / scale)),
        ("gradients shorter than max_norm are made longer: the factor is at most 1",
         times(most / max(norm, TINY) / scale)),
        ("gradients shorter than max_norm are made longer: the factor is at most 1",
         times(most / (norm + 1e-6) / scale)),
        ("clipped, but not unscaled", times(factor)),
        ("nothing has changed: write into the tensors, with mul_ or *=", times(1.0)),
        ("clipped by the norm of the scaled gradients, and not unscaled", times(at_most(norm * scale))),
        ("unscaled, but not clipped", times(1 / scale)),
        ("each tensor is clipped by its own norm: one norm for all of them together",
         times([at_most(_length([t]) / scale) / scale for t in g])),
        ("multiplied by the scale: divide", times(factor * scale)),
        ("the norms of the tensors are added up: add up their squares, and take the root once",
         times(at_most(sum(_length([t]) for t in g) / scale) / scale)),
        ("divided by the squared norm: the root is missing", times(at_most(norm**2) / scale)),
        ("1e-6 was added to the norm, as torch's own clipping does: leave it out here",
         times(at_most(norm + 1e-6) / scale)),
        ("each number is cut off at ±max_norm: it is the norm that is bounded",
         [(t / scale).clamp(-most, most) for t in g]),
    ]  # fmt: skip


# ---- shares_by_speed ------------------------------------------------------------------------------------------


def _shares(answer, inputs):
    given = [(rows, list(speeds)) for rows, speeds in inputs]
    seen = watched(lambda: [plain(answer(*args)) for args in given])
    seen.kept = [tuple(map(_tupled, a)) == tuple(map(_tupled, b)) for a, b in zip(given, inputs, strict=True)]
    return seen


def _tupled(value):
    return tuple(value) if isinstance(value, list) else value


def _best(rows, speeds):
    shares = [0] * len(speeds)
    for _ in range(rows):
        r = min(range(len(speeds)), key=lambda r: (shares[r] + 1) / speeds[r])
        shares[r] += 1
    return shares


def _by_end(rows, speeds, shares):
    """Row by row to whoever is done first, as it is *before* the row."""
    shares = list(shares)
    while sum(shares) < rows:
        shares[min(range(len(speeds)), key=lambda r: shares[r] / speeds[r])] += 1
    return shares


class shares_by_speed:
    hints = (
        "rows * speed / sum(speeds) is right but for the rounding, and rounding is all the trouble: the whole numbers "
        "have to add up to rows.",
        "Begin with what is surely right, int(rows * v / sum(speeds)), rounded down. A few rows are left, fewer than "
        "there are ranks.",
        "Give those one by one to the rank that would be done first with one more: the smallest (share + 1) / speed. "
        "(Or give away all rows like that, from the start.)",
    )

    @staticmethod
    def check(run):
        inputs = [
            (100, [3.0, 3.0, 3.0, 1.0]), (37, [4.0, 11.0, 10.0, 1.5, 9.0]), (8, [1.0] * 4),
            (10, [1.0, 1.0, 1.0]), (64, [5.0, 2.0, 9.0, 1.0]),
            (7, [100.0, 1.0, 1.0]), (30, [0.5, 0.25, 0.75]), (1, [2.0, 3.0]), (0, [1.0, 2.0]), (12, [4.0]),
            (5, [3.0] * 7), (9, [2.4, 2.4, 1.2]), (23, [7.0, 1.0, 1.0, 1.0]),
        ]  # fmt: skip
        [seen] = run(_shares, inputs, n=1)
        _unsent(seen)
        for (rows, speeds), got, kept in zip(inputs, seen.result, seen.kept, strict=True):
            label = f"{rows} rows, speeds {speeds}"
            if not kept:
                raise Wrong("`speeds` has changed: work on a new list", label)
            if isinstance(got, torch.Tensor):
                got = got.tolist()
            if not isinstance(got, (list, tuple)):
                raise Wrong(f"it returns {type_of(got)}: a list with one number a rank is asked for", label)
            if len(got) != len(speeds):
                raise Wrong(f"{len(got)} shares for {len(speeds)} ranks", label)
            if any(isinstance(s, bool) or not isinstance(s, int) for s in got):
                raise Wrong("a share is not an int: half a row cannot be computed", label, got=str(list(got)))
            _judge_shares(rows, speeds, list(got), label)


def _judge_shares(rows, speeds, got, label):
    n, whole, best = len(speeds), sum(speeds), _best(rows, speeds)
    exact, slow = [rows * v / whole for v in speeds], [rows / v / sum(1 / u for u in speeds) for v in speeds]
    floors = [int(x) for x in exact]
    left = rows - sum(floors)
    shown = {"expected": f"{best} (or another that ends as early)", "got": str(got)}
    if min(got) < 0:
        raise Wrong("a share is negative", label, **shown)
    if sum(got) != rows:
        why = f"the shares add up to {sum(got)}, not to {rows}"
        if got == floors:
            why += ": each was rounded down, and what is left belongs to nobody"
        elif got == [round(x) for x in exact]:
            why += ": each was rounded by itself"
        elif got == [math.ceil(x) for x in exact]:
            why += ": each was rounded up"
        elif got == [max(1, round(x)) for x in exact] or got == [max(1, x) for x in floors]:
            why += ": with at least one row each, others have to give"
        elif got == [rows // n] * n:
            why += ": equal shares, rounded down"
        raise Wrong(why, label, **shown)
    last = max(s / v for s, v in zip(got, speeds, strict=True))
    if last <= max(s / v for s, v in zip(best, speeds, strict=True)) * (1 + 1e-9):
        return
    by_place = [floors[r] + (r < left) for r in range(n)]
    fractions = sorted(range(n), key=lambda r: -(exact[r] - floors[r]))
    by_fraction = [floors[r] + (r in fractions[:left]) for r in range(n)]
    equal = [rows // n + (r < rows % n) for r in range(n)]
    known = [
        ("equal shares: the speeds are ignored", equal),
        ("the shares follow the time for a row, not the speed: the slowest gets most", None),
        ("what was left over went to the last rank", [*floors[:-1], rows - sum(floors[:-1])]),
        ("what was left over went to the first rank", [rows - sum(floors[1:]), *floors[1:]]),
        ("what was left over went to the first ranks", by_place),
        ("what was left over went to the largest remainders, which is fair, but does not end soonest: look at "
         "(share + 1) / speed", by_fraction),
    ]  # fmt: skip
    fastest, slowest = speeds.index(max(speeds)), speeds.index(min(speeds))
    known += [
        ("what was left over went to the fastest rank", [f + left * (r == fastest) for r, f in enumerate(floors)]),
        ("what was left over went to the slowest rank", [f + left * (r == slowest) for r, f in enumerate(floors)]),
        ("all rows went to the fastest rank: the others help", [rows * (r == fastest) for r in range(n)]),
        ("rounded, and the last rank takes what is left",
         [*(round(x) for x in exact[:-1]), rows - sum(round(x) for x in exact[:-1])]),
    ]  # fmt: skip
    if min(got) > 0 and 0 in best:
        raise Wrong(
            "every rank gets a row at least, and the others wait for a slow one: it may get none", label, **shown
        )
    behind = "what was left over went to the rank that is done first without it: look at when it would be done with it"
    known = [(behind, _by_end(rows, speeds, [0] * n)), (behind, _by_end(rows, speeds, floors)), *known]
    for why, shares in known:
        if shares is None and max(abs(s - x) for s, x in zip(got, slow, strict=True)) <= n:
            if max(abs(s - x) for s, x in zip(got, exact, strict=True)) > n:
                raise Wrong(why, label, **shown)
        elif got == shares:
            raise Wrong(why, label, **shown)
    raise Wrong(f"another split ends sooner: this one takes {last:.4g} s", label, **shown)


# ---- mean_by_rows ---------------------------------------------------------------------------------------------

OTHER_CALLS = {
    "all_gather": "it calls all_gather, which brings everybody's numbers to everybody: sums are all that is needed",
    "": "it calls {op}: sums over the ranks are all that is needed, one all_reduce of the numbers and one of the rows",
}


def _mean_by_rows(answer, rows, d, dtype, seed, groups, spoilt):
    rank = dist.get_rank()
    mine = values((d,), dtype, rank, seed) if rows[rank] else torch.full((d,), NAN, dtype=dtype)
    if rank == spoilt:
        mine[1] = NAN
    given = mine.clone()
    seen = watched(answer, given, rows[rank], **_mine(groups))
    seen.kept = torch.allclose(mine, given, 0, 0, equal_nan=True)
    return seen


class mean_by_rows:
    hints = (
        "A mean over rows times the number of rows is a sum over rows; sums may be added up over the ranks.",
        "total = gradient * rows, all-reduced; the rows all-reduced too; divide at the end, once.",
        "A rank without rows: NaN * 0 is NaN, and it would be everybody's. It takes part with zeros: "
        "torch.zeros_like(gradient).",
    )

    @staticmethod
    def check(run):
        cases = [([10, 10, 10, 2], 6, F64, ()), ([8, 8, 8, 8], 5, F32, ()), ([30, 1, 7], 4, F64, ()),
                 ([3, 5], 7, F32, ()), ([4, 50, 9, 1], 3, F64, PAIRS), ([12, 0, 5, 3], 6, F64, ()),
                 ([2, 9, 4, 6], 4, F32, ALONE), ([0, 6, 1, 0], 5, F64, PAIRS), ([121, 100, 90], 3, F64, ()),
                 ([6, 3, 0, 5], 4, F64, (), 1)]  # fmt: skip
        for seed, (rows, d, dtype, groups, *spoilt) in enumerate(cases):
            n = len(rows)
            about = f"{rows} rows on {_named(groups, n)}"
            stuck = "the ranks do not make the same calls: a rank without rows takes part, with zeros"
            seen = run(_mean_by_rows, rows, d, dtype, seed, groups, *spoilt or [None], n=n, about=about, stuck=stuck)
            if spoilt:
                _judge_spoilt(seen, f"{about}, rank {spoilt[0]}'s gradient has a NaN")
                continue
            for members in groups or [list(range(n))]:
                _judge_means([seen[r] for r in members], members, rows, d, dtype, seed, about)


def _judge_spoilt(seen, about):
    for rank, one in enumerate(seen):
        if not isinstance(one.result, torch.Tensor) or not one.result.isnan()[1]:
            why = "a rank with rows has a NaN in its gradient, and the mean hides it: rows == 0 is what counts as zeros"
            raise Wrong(why, f"rank {rank}, {about}", "NaN as element 1", show(one.result, 1))


def _judge_means(seen, members, rows, d, dtype, seed, about):
    only_calls(seen, ("all_reduce",), OTHER_CALLS)
    for rank, one in zip(members, seen, strict=True):
        if not one.kept:
            raise Wrong("`gradient` has changed: work on a new tensor", f"rank {rank}, {about}")
    n, everyone = len(seen), range(len(rows))
    g = {r: values((d,), dtype, r, seed).double() if rows[r] else torch.zeros(d, dtype=F64) for r in everyone}
    some = [r for r in members if rows[r]]

    def total(of):
        return sum(rows[r] * g[r] for r in of)

    many, all_rows = sum(rows[r] for r in members), sum(rows)
    if any(isinstance(one.result, torch.Tensor) and one.result.isnan().any() for one in seen) and len(some) < n:
        raise Wrong("a rank without rows makes everybody's mean NaN: NaN · 0 is NaN, so it has to give zeros", about)
    outside = n < len(rows)
    uneven = len({rows[r] for r in members}) > 1
    means = sum(g[r] for r in members)
    mistakes = [
        ("a mean of means: every rank counts the same, whatever rows it has", means / n if uneven else None),
        ("a mean of the means of those ranks that have rows", means / len(some) if uneven else None),
        ("the sum of the ranks' means: nothing is divided", means),
        ("the sum of the ranks' means, divided by all rows: each has to be multiplied by its own rows first",
         means / many),
        ("multiplied by the rows and never divided", total(members)),
        (f"divided by the {n} ranks, not by all {many} rows", total(members) / n),
        (f"divided by the {n} ranks as well: the weights n_r / N add up to 1 already", total(members) / many / n),
        ("the weight is n · n_r / N, as for a mean over the ranks: this is `ranks` times too large",
         total(members) / many * n),
        ("divided by this rank's own rows: all rows are asked for",
         [total(members) / max(rows[r], 1) for r in members]),
        ("nothing was exchanged: this is the rank's own gradient", [g[r] for r in members]),
        ("the group argument is ignored: this is the mean over all ranks",
         total(everyone) / all_rows if outside else None),
        ("the group argument is ignored where the rows are added up", total(members) / all_rows if outside else None),
        ("the group argument is ignored where the gradients are added up", total(everyone) / many if outside else None),
        ("the weights are upside down: more rows have to count more",
         sum(g[r] / rows[r] for r in some) / sum(1 / rows[r] for r in some) if uneven and some else None),
        ("the rows are added up in a tensor of 8 bits, which ends at 255: an int64 or a float holds them",
         total(members) / (many % 256) if many > 255 else None),
        ("the weights are squared: multiplied by the rows twice", sum(rows[r] ** 2 * g[r] for r in members) / many),
    ]  # fmt: skip
    _compare([one.result for one in seen], total(members) / many, dtype, about, mistakes, members)
    _frugal(seen, members, d, dtype, about)


def _compare(got, mean, dtype, about, mistakes, members):
    n = len(got)
    known = [
        (why, [None if t is None else t.to(dtype) for t in (would if isinstance(would, list) else [would] * n)])
        for why, would in mistakes
    ]
    same(got, [mean.to(dtype)] * n, "the result", about, known, labels=members)


def _frugal(seen, members, d, dtype, about):
    most = d * torch.finfo(dtype).bits // 8 + 8
    for rank, one in zip(members, seen, strict=True):
        made = sum(call.bytes for call in one.calls)
        if len(members) > 1 and (made > most or len(one.calls) > 2):
            why = f"it is right, but {made} bytes in {len(one.calls)} calls are all-reduced: {d} numbers and 1 do"
            raise Wrong(why, f"rank {rank}, {about}", f"at most {most} bytes in 2 calls", f"{made} bytes")


# ---- mean_without_late ----------------------------------------------------------------------------------------


def _mean_without_late(answer, rows, late, d, dtype, seed, groups):
    rank = dist.get_rank()
    mine = values((d,), dtype, rank, seed) * rows[rank]
    given = mine.clone()
    seen = watched(answer, given, rows[rank], rank in late, **_mine(groups))
    seen.kept = torch.equal(mine, given)
    return seen


class mean_without_late:
    hints = (
        "A late rank takes part in every call, or the others wait for it after all. What does it add to a sum so that "
        "the sum does not change?",
        "Zeros for the gradient, and 0 for the rows: both. If its rows were counted, the mean would be over rows whose "
        "gradients are not in it.",
        "The gradients are of sums, so nothing is multiplied: Σ gradient / Σ rows, both over the ranks in time. "
        "int(many.item()) makes a tensor with one number an int.",
    )

    @staticmethod
    def check(run):
        cases = [([6, 4, 9, 2], [3], 5, F64, ()), ([6, 6, 6, 6], [], 4, F32, ()), ([8, 1, 12], [0, 1], 6, F64, ()),
                 ([9, 4], [1], 3, F32, ()), ([5, 3, 2, 8], [0, 3], 4, F64, PAIRS), ([7, 0, 3, 4], [2], 5, F64, ()),
                 ([2, 3, 4, 5], [], 3, F64, ALONE), ([121, 100, 90], [], 4, F64, ())]  # fmt: skip
        for seed, (rows, late, d, dtype, groups) in enumerate(cases):
            n = len(rows)
            who = f"late: {', '.join(map(str, late)) or 'nobody'}"
            about = f"{rows} rows on {_named(groups, n)}, {who}"
            stuck = "the ranks do not make the same calls: a late rank has to take part in the all_reduce, with zeros"
            seen = run(_mean_without_late, rows, late, d, dtype, seed, groups, n=n, about=about, stuck=stuck)
            for members in groups or [list(range(n))]:
                _judge_late([seen[r] for r in members], members, rows, late, d, dtype, seed, about)


def _judge_late(seen, members, rows, late, d, dtype, seed, about):
    only_calls(seen, ("all_reduce",), OTHER_CALLS)
    for rank, one in zip(members, seen, strict=True):
        if not one.kept:
            raise Wrong("`gradient` has changed: work on a new tensor", f"rank {rank}, {about}")
        _pair(one.result, "(mean, rows)", f"rank {rank}, {about}")
    g = {r: (values((d,), dtype, r, seed) * rows[r]).double() for r in range(len(rows))}
    kept = [r for r in members if r not in late]
    n, outside, everyone = len(members), len(members) < len(rows), [r for r in range(len(rows)) if r not in late]

    def total(of):
        return sum(g[r] for r in of)

    def many(of):
        return sum(rows[r] for r in of)

    some = bool(set(members) & set(late))
    mean, per_rank = total(kept) / many(kept), [g[r] / max(rows[r], 1) for r in kept]
    mistakes = [
        ("the dropped ranks' rows are still counted: the mean is over rows whose gradients are not in it, and the step "
         "is too short", total(kept) / many(members) if some else None),
        ("late ranks are not dropped: their gradients and rows are still in it",
         total(members) / many(members) if some else None),
        ("the late ranks' gradients are still in it, only their rows are not",
         total(members) / many(kept) if some else None),
        ("a mean of means: the ranks in time all count the same", sum(per_rank) / len(kept)),
        (f"divided by the {n} ranks: the rows in time are asked for", total(kept) / n),
        (f"divided by the {len(kept)} ranks that were in time: by their rows is asked for", total(kept) / len(kept)),
        ("nothing is divided: this is the sum", total(kept)),
        ("divided by the rows, and by the number of ranks again", mean / n),
        ("divided by the rows, and by the number of ranks in time again", mean / len(kept)),
        ("scaled up by ranks / ranks in time: the division by the rows does it already", mean * n / len(kept)),
        ("multiplied by the rows: the gradients are of sums already", sum(rows[r] * g[r] for r in kept) / many(kept)),
        ("divided by this rank's own rows", [total(kept) / max(rows[r], 1) for r in members]),
        ("the rows are added up in a tensor of 8 bits, which ends at 255: an int64 or a float holds them",
         total(kept) / (many(kept) % 256) if many(kept) > 255 else None),
        ("`late` is taken the wrong way round: the punctual were dropped",
         total([r for r in members if r in late]) / max(many([r for r in members if r in late]), 1) if some else None),
        ("a late rank keeps its own gradient: it needs the mean as the others do, to stay equal",
         [mean if r in kept else g[r] for r in members]),
        ("a late rank ends with zeros: it needs the mean as the others do, to stay equal",
         [mean if r in kept else g[r] * 0 for r in members]),
        ("nothing was exchanged: this is the rank's own mean", [g[r] / max(rows[r], 1) for r in members]),
        ("the group argument is ignored: this is the mean over all ranks",
         total(everyone) / many(everyone) if outside else None),
        ("the group argument is ignored where the rows are added up",
         total(kept) / many(everyone) if outside else None),
    ]  # fmt: skip
    _compare([one.result[0] for one in seen], mean, dtype, about, mistakes, members)
    for rank, one in zip(members, seen, strict=True):
        counted, label = one.result[1], f"rank {rank}, {about}"
        if isinstance(counted, bool) or not isinstance(counted, int):
            said = show(counted) if isinstance(counted, torch.Tensor) else f"{counted!r:.40}"
            raise Wrong("the number of rows is to be an int: int(many.item())", label, str(many(kept)), said)
        if counted != many(kept):
            known = {
                many(members): "all ranks' rows: the dropped ranks' are not to be counted",
                rows[rank]: "this rank's own rows",
                len(kept): "the number of ranks in time",
                n: "the number of ranks",
            }
            said = known.get(counted, "another number")
            raise Wrong(f"the number of rows is {said}", label, str(many(kept)), str(counted))
    _frugal(seen, members, d, dtype, about)
