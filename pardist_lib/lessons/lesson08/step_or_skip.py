"""The exercise step_or_skip."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same, type_of
from ..exercises.watch import plain, watched
from .shared import ALONE, INF, NAN, PAIRS, mine, named

hints = (
    "Two questions, one after the other: is anything wrong on *this* rank (gradients.isfinite().all()), and is "
    "anything wrong on *any* rank?",
    "The second needs the others: a tensor that is 1.0 where this rank's gradients are bad, else 0.0, and "
    "dist.all_reduce with dist.ReduceOp.MAX. Every rank has to call it, the good ones too.",
    "Only then: if bad, return False; else parameters -= lr * (gradients / scale), in place, and return True.",
)


def check(run):
    spoils = [{}, {3: INF}, {1: INF}, {0: NAN, 1: NAN}, {1: -INF}, {0: INF, 1: INF, 3: NAN}, {0: -INF}, {3: NAN},
              {}, {0: LARGEST, 1: LARGEST}]  # fmt: skip
    cases = [(2, 64.0, 1.0, F64, ()), (4, 1024.0, 0.5, F32, ()), (4, 8.0, 0.1, F64, PAIRS), (3, 16.0, 0.2, F32, ()),
             (4, 32.0, 0.3, F64, ALONE)]  # fmt: skip
    for n, scale, lr, dtype, groups in cases:
        about = f"{named(groups, n)}, scale {scale:g}"
        seen = run(_step_or_skip, spoils, scale, lr, dtype, groups, n=n, about=about, stuck=STUCK)
        for members in groups or [list(range(n))]:
            _judge_steps([seen[r] for r in members], members, spoils, scale, lr, dtype, about, range(n))


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
    rank, options = dist.get_rank(), mine(groups)
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


exercise = Exercise(hints, check)
