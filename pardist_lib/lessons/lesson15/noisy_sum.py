"""The exercise noisy_sum."""

import math

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same, type_of
from ..exercises.watch import watched
from .shared import ALONE, OTHER_CALLS, PAIRS, mine, named

hints = (
    "Noise of several ranks adds up in squares: n shares of standard deviation s together have s · √n.",
    "So every rank's share is sigma · clip / √n. Add it first, then all_reduce: what leaves the rank has its noise "
    "on it, and all ranks end with the same sum.",
    "share = sigma * clip / dist.get_world_size(group) ** 0.5; result = total + share * "
    "torch.randn(total.shape, generator=generator, dtype=total.dtype); dist.all_reduce(result, group=group)",
)


def check(run):
    cases = [(4, 0.3, 5.0, F64, ()), (2, 3.0, 1.25, F32, ()), (4, 4.0, 0.7, F64, ALONE),
             (4, 0.3, 2.0, F64, PAIRS), (3, 0.2, 6.0, F32, ())]  # fmt: skip
    cases += [(4, 0.5, 3.0, F64, ())]  # the last: no row took part in this step
    for seed, (n, clip, sigma, dtype, groups) in enumerate(cases):
        rows = seed < len(cases) - 1
        about = f"{named(groups, n)}, clip {clip}, sigma {sigma}" + ("" if rows else ", all totals zero")
        seen = run(_noisy, clip, sigma, dtype, seed, groups, D, rows, n=n, about=about)
        for members in groups or [list(range(n))]:
            _judge_noise([seen[r] for r in members], seen, members, clip, sigma, about, rows)


D = 20_000  # numbers; the measured deviation of that many is right to 0.5 %


def _noisy(answer, clip, sigma, dtype, seed, groups, d, rows):
    """On a rank: the answer, and what it did with the generator and with the message it sent."""
    rank = dist.get_rank()
    total = values((d,), dtype, rank, seed) * rows
    kept, generator = total.clone(), torch.Generator().manual_seed(99_991 + 77 * seed + rank)
    state = torch.get_rng_state()
    options = mine(groups)
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


exercise = Exercise(hints, check)
