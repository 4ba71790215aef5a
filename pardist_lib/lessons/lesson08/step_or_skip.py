"""step_or_skip: all ranks make a step or none; typically those that saw no overflow step, or a NaN is not noticed."""

import copy
import math

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, PAIRS, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same, type_of
from ..exercises.runs import ALONE, alike, in_groups, named, own_group
from ..exercises.watch import watched

hints = (
    "Two questions, one after the other: is anything wrong on *this* rank (gradients.isfinite().all()), and is "
    "anything wrong on *any* rank?",
    "The second needs the others: a tensor that is 1.0 where this rank's gradients are bad, else 0.0, and "
    "dist.all_reduce with dist.ReduceOp.MAX. Every rank has to call it, the good ones too.",
    "Only then: if bad, return False; else parameters -= lr * (gradients / scale), in place, and return True.",
)

SIZES = (5, 3, 0, 7)  # elements of each rank's shard
INF, NAN, LARGE = math.inf, math.nan, "finite, but the sum is not"
SPOILT = (  # step by step: what is among which ranks' gradients
    {}, {3: INF}, {1: INF}, {0: NAN, 1: NAN}, {1: -INF}, {0: INF, 1: INF, 3: NAN}, {0: -INF}, {3: NAN}, {},
    {0: LARGE, 1: LARGE},
)  # fmt: skip
STEPS = range(len(SPOILT))
STUCK = (
    "not every rank makes the same calls: each makes one all_reduce of a single number, whether it saw an overflow or "
    "not, and however many gradients it has"
)


def check(run):
    cases = [(2, 64.0, 1.0, F64, ()), (4, 1024.0, 0.5, F32, ()), (4, 8.0, 0.1, F64, PAIRS), (3, 16.0, 0.2, F32, ()),
             (4, 32.0, 0.3, F64, ALONE)]  # fmt: skip
    for n, scale, lr, dtype, groups in cases:
        about = f"{named(groups, n)}, scale {scale:g}"
        given = [([_shard(r, dtype, i) for i in STEPS], scale, lr) for r in range(n)]
        for members, seen in in_groups(run, given, groups, about, STUCK, _steps):
            _judge(members, seen, given, scale, lr, about)


def _shard(rank, dtype, step):
    """A rank's parameters and gradients before a step."""
    parameters, gradients = (values((SIZES[rank],), dtype, rank, seed) for seed in (50 + step, step))
    gradients *= 1000
    bad = SPOILT[step].get(rank)
    if bad == LARGE:
        gradients[:] = 0.9 * torch.finfo(dtype).max
    elif bad is not None and len(gradients):
        gradients[len(gradients) // 2] = bad
    return parameters, gradients


def _steps(answer, given, groups):
    """On a rank: one step after the other, on fresh shards. kept: (parameters, whether gradients are as they were)."""
    (shards, scale, lr), options = given[dist.get_rank()], own_group(groups)
    own = copy.deepcopy(shards)
    seen = watched(lambda: [answer(p, g, scale, lr, **options) for p, g in own])
    seen.kept = [(p, alike(g, before)) for (p, g), (_, before) in zip(own, shards, strict=True)]
    return seen


def _judge(members, seen, given, scale, lr, about):
    only_calls(seen, ("all_reduce",), {"": "it calls {op}: one all_reduce of a single number is all that is needed"})
    near, anywhere = _bad(members), _bad(range(len(given)))
    p, g = ([[given[r][0][i][k] for r in members] for i in STEPS] for k in (0, 1))
    after = [[one.kept[i][0] for one in seen] for i in STEPS]

    def if_skipped(skips):
        """What all parameters would be, where `skips(step, rank)` says who skips."""
        return [[a if skips(i, r) else a - lr * (b / scale) for r, a, b in zip(members, p[i], g[i], strict=True)]
                for i in STEPS]  # fmt: skip

    right = if_skipped(lambda i, r: near[i])
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
         lambda i, r: INF in near[i].values()),
        ("minus infinity is not noticed", lambda i, r: any(v == INF or v != v for v in near[i].values())),
        ("the group argument is ignored: a rank outside of this group overflowed", lambda i, r: anywhere[i]),
        ("every step is skipped, also where all gradients are finite", lambda i, r: True),
        ("the wrong way round: it steps where there was an overflow, and skips where there was none",
         lambda i, r: not near[i]),
        ("only rank 0's verdict counts: any rank's has to", lambda i, r: members[0] in near[i]),
    ]  # fmt: skip
    if any(0 < len(one.calls) < len(SPOILT) for one in seen):
        raise Wrong(STUCK, about)
    if alike(after, p) and any(map(len, after[0])) and any(made is True for one in seen for made in one.result):
        raise Wrong("parameters is as it was before the call: write into it with -=", about)
    for why, skips in verdicts:
        would = if_skipped(skips)
        if _near(after, would) and not _near(would, right):
            raise Wrong(why, about)
    if _near(after[:-1], right[:-1]) and _near(after[-1:], p[-1:]) and not _near(right[-1:], p[-1:]):
        why = "gradients that are large, but finite, are taken for an overflow: look at each number, not at their sum"
        raise Wrong(why, about)
    amiss = [i for i in STEPS if not _near(after[i : i + 1], right[i : i + 1])]
    if amiss and all(any(v != v for v in near[i].values()) for i in amiss):
        why = "a NaN gets lost on the way: a maximum of numbers may drop it. Reduce the verdict, 1.0 or 0.0, instead"
        raise Wrong(why, about)
    for i in STEPS:
        said = " and ".join(f"rank {r} has {v}" for r, v in near[i].items()) or "all gradients finite"
        here = f"{about}, {said}"

        def moved(by, i=i):
            return [a - lr * by(b) for a, b in zip(p[i], g[i], strict=True)]

        mistakes = [
            ("the gradients are not unscaled: divide them by the scale", moved(lambda b: b)),
            ("unscaled twice: the gradients are divided by the scale two times", moved(lambda b: b / scale / scale)),
            ("multiplied by the scale: divide", moved(lambda b: b * scale)),
            ("the step goes uphill: minus is asked for", moved(lambda b: -b / scale)),
            ("lr is missing", moved(lambda b: b / scale / lr)),
            ("parameters is as it was: write into it with -=", p[i]),
        ]
        if near[i]:
            why = "the bad numbers are left out and the step is made with the others: skip it as a whole"
            mistakes = [(why, moved(lambda b: b.nan_to_num(0, 0, 0) / scale))]
        same(after[i], right[i], "parameters", here, mistakes, labels=members)
        for rank, one in zip(members, seen, strict=True):
            where, made = f"rank {rank}, {here}", one.result[i]
            made = bool(made.item()) if isinstance(made, torch.Tensor) and made.numel() == 1 else made
            if not isinstance(made, bool):
                raise Wrong(f"it returns {type_of(made)}: True or False is asked for", where)
            if made is bool(near[i]):
                why = "what it returns is the wrong way round, or this rank's own verdict: True where the step was made"
                raise Wrong(why, where, str(not near[i]), str(made))
            if not one.kept[i][1]:
                raise Wrong("`gradients` has changed: g / scale makes a new tensor, g /= scale writes into it", where)
    for rank, one in zip(members, seen, strict=True):
        most = max((call.bytes for call in one.calls), default=0)
        if len(members) > 1 and (most > 8 or len(one.calls) > len(SPOILT)):
            why = f"{len(one.calls) / len(SPOILT):g} calls of {most} bytes a step: one all_reduce of a number will do"
            raise Wrong(why, f"rank {rank}, {about}")


def _bad(ranks):
    """Of each step, what is not finite on which of these ranks."""
    return [{r: v for r, v in spoilt.items() if r in ranks and SIZES[r] and v != LARGE} for spoilt in SPOILT]


def _near(a, b):
    """Whether two lists of lists of tensors hold the same, NaN and infinities too."""
    return all(isinstance(x, torch.Tensor) and x.shape == y.shape and torch.allclose(x, y, 1e-6, 1e-7, equal_nan=True)
               for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True))  # fmt: skip


WHY = (
    "The maximum over the ranks is 1 where anybody's gradient is bad, so all skip or none. FSDP's "
    "ShardedGradScaler and Megatron's optimizer all-reduce such a flag in the same way."
)

exercise = Exercise(hints, check, minutes=15, level="medium", why=WHY)
