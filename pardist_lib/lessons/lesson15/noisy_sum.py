"""noisy_sum: a sum over the ranks, each adding its share of the noise before it sends; often √ranks too much."""

import math

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, PAIRS, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from ..exercises.runs import ALONE, in_groups, named, own_group
from ..exercises.watch import watched
from .shared import OTHER_CALLS

hints = (
    "Noise of several ranks adds up in squares: n shares of standard deviation s together have s · √n.",
    "So every rank's share is sigma · clip / √n. Add it first, then all_reduce: what leaves the rank has its noise "
    "on it, and all ranks end with the same sum.",
    "share = sigma * clip / dist.get_world_size(group) ** 0.5; result = total + share * "
    "torch.randn(total.shape, generator=generator, dtype=total.dtype); dist.all_reduce(result, group=group)",
)

D = 20_000  # numbers; the measured deviation of that many is right to 0.5 %


def check(run):
    cases = [(4, 0.3, 5.0, F64, ()), (2, 3.0, 1.25, F32, ()), (4, 4.0, 0.7, F64, ALONE), (4, 0.3, 2.0, F64, PAIRS),
             (3, 0.2, 6.0, F32, ()), (4, 0.5, 3.0, F64, ())]  # fmt: skip
    for seed, (n, clip, sigma, dtype, groups) in enumerate(cases):
        rows = seed < len(cases) - 1  # in the last one no row took part in this step
        about = f"{named(groups, n)}, clip {clip}, sigma {sigma}" + ("" if rows else ", all totals zero")
        totals = [values((D,), dtype, rank, seed) * rows for rank in range(n)]
        given = [(total, clip, sigma, 99_991 + 77 * seed + rank) for rank, total in enumerate(totals)]
        for members, seen in in_groups(run, given, groups, about, on_rank=_noisy):
            _judge(members, seen, totals, clip, sigma, about)


def _noisy(answer, given, groups):
    """On a rank: the answer, and what it did with the generator and with the message it sent."""
    total, clip, sigma, seed = given[dist.get_rank()]
    before, options = total.clone(), own_group(groups)
    generator, fresh = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    sent, plain_call, state = [], dist.all_reduce, torch.get_rng_state()

    def noticing(tensor, *args, **kwargs):
        sent.append(tensor.detach().clone())
        return plain_call(tensor, *args, **kwargs)

    dist.all_reduce = noticing
    try:
        seen = watched(answer, total, clip, sigma, generator, **options)
    finally:
        dist.all_reduce = plain_call
    seen.kept = {
        "sent": sent,
        "changed": not torch.equal(before, total),
        "unmoved": torch.equal(fresh.get_state(), generator.get_state()),
        "another": not torch.equal(state, torch.get_rng_state()),
    }
    torch.set_rng_state(state)
    return seen


def _judge(members, seen, everyones, clip, sigma, about):
    only_calls(seen, ("all_reduce",), OTHER_CALLS)
    totals, world = [everyones[r] for r in members], len(everyones)
    for rank, one, total in zip(members, seen, totals, strict=True):
        if one.kept["changed"]:
            raise Wrong("`total` has changed: work on a new tensor", f"rank {rank}, {about}")
        got = one.result
        if not isinstance(got, torch.Tensor) or got.shape != total.shape or got.dtype != total.dtype:
            same([got], total, "the result", about, labels=[rank])
        if not got.isfinite().all():
            raise Wrong("the result is not finite", f"rank {rank}, {about}")
    total, n, stated = sum(own.double() for own in totals), len(members), sigma * clip
    noise, elsewhere = seen[0].result.double() - total, sum(own.double() for own in everyones) - total
    if n < world and _part(noise, elsewhere) > 0.5:
        raise Wrong("the group argument is ignored: this is the sum over all ranks", about)
    if n > 1 and not seen[0].calls:
        raise Wrong("nothing is sent: the sum over the ranks is asked for", about)
    if any(not torch.equal(one.result, seen[0].result) for one in seen):
        why = "the ranks end with different sums: noise that is added after all_reduce is another one on every rank"
        raise Wrong(f"{why}, and the messages went out without any", about)
    if any(one.kept["another"] for one in seen):
        raise Wrong("noise is drawn without the generator that was given: torch.randn(…, generator=generator)", about)
    spread, added = noise.std().item(), {}  # what each rank added to its total before it sent that
    for rank, one, own in zip(members, seen, totals, strict=True):
        message = (one.kept["sent"] or [one.result])[0]
        if message.shape == own.shape:
            added[rank] = message.double() - own
            if own.dtype == F64:
                _judge_share(added[rank], f"rank {rank}, {about}")
    shown = f"noise of standard deviation {stated:.4g}", f"{spread:.4g}"
    if spread < 1e-3 * stated:
        hidden = "" if total.any() else " where the total is zero: that no row took part is a secret too"
        raise Wrong(f"there is no noise{hidden}", about, *shown)
    for rank, one in zip(members, seen, strict=True):
        if one.kept["unmoved"]:
            why = f"rank {rank} adds no noise: its message goes out as it is"
            if rank in added and added[rank].any():
                why = "the generator that was given has not moved on: the next call would add the same noise again, "
                why += "and the difference of two messages would have none"
            raise Wrong(why, f"rank {rank}, {about}")
    for rank, one, own in zip(members, seen, totals, strict=True):
        if n > 1 and rank in added and not added[rank].any():
            why = "the message goes out without noise: add this rank's share before all_reduce"
            raise Wrong(why, f"rank {rank}, {about}")
        made = sum(call.bytes for call in one.calls)
        if n > 1 and made != own.nbytes:
            raise Wrong(f"{made:,} bytes are all-reduced: once the {own.nbytes:,} bytes of the sum is enough", about)
    scale = _part(seen[0].result.double(), total) if total.any() else 1.0
    if abs(scale - 1) > 0.15:
        raise Wrong(f"the sum itself is {scale:.2g} times what it should be, noise apart", about)
    centre = noise.mean().item()
    if abs(centre) > 8 * max(spread, stated) / math.sqrt(D):
        raise Wrong(f"the noise is not centred: its mean is {centre:.3g}; or is the sum itself another one?", about)
    if abs(spread / stated - 1) > 0.04:
        factors = [
            ("the group argument is ignored in the share: this group has fewer ranks", math.sqrt(n / world)),
            ("the noise is added at full scale on every rank: together it is √ranks times too large", math.sqrt(n)),
            ("divided by the number of ranks, not by its root: together there is too little noise", 1 / math.sqrt(n)),
            ("clip is missing: sigma is in units of clip", 1 / clip),
            ("clip is missing, and every rank adds at full scale", math.sqrt(n) / clip),
            ("sigma is missing: the noise is sigma · clip", 1 / sigma),
            ("sigma · clip was taken for the variance: torch.randn is multiplied by the standard deviation",
             stated**-0.5),
            ("the noise was divided by the root of the ranks twice", 1 / n),
            ("the noise is multiplied by √ranks: it has to be divided by it", n),
            ("sigma is squared", sigma),
            ("clip is squared", clip),
        ]  # fmt: skip
        known = [why for why, factor in factors if abs(spread / stated / factor - 1) < 0.04]
        raise Wrong([*known, f"the noise is {spread / stated:.3g} times as large as it should be"][0], about, *shown)
    shape = (noise / spread).pow(4).mean().item()  # 3 for Gaussian noise, 1.8 for uniform
    if n == 1 and abs(shape - 3) > 0.3:
        raise Wrong("the noise is not Gaussian: draw it with torch.randn", about, "kurtosis 3", f"{shape:.2f}")
    shares = [share.std().item() for share in added.values()]
    if all(one.kept["sent"] for one in seen) and len(shares) == n > 1 and max(shares) > 1.1 * min(shares):
        sizes = ", ".join(f"{s:.3g}" for s in shares)
        raise Wrong("the ranks' shares of the noise are not equally large", about, "equal shares", sizes)


def _judge_share(own, where):
    """Raise Wrong where one rank's noise, float64, leaves some direction without any."""
    if not own.any():
        return
    if (own == 0).any():
        bare = (own == 0).nonzero().flatten()
        why = f"{len(bare):,} of the {D:,} numbers go out without noise, the first at place {bare[0].item()}"
        raise Wrong(f"{why}: every one needs its own", where)
    different = len((own.abs() / own.square().mean().sqrt() * 1e6).round().unique())
    if different < 0.9 * D:
        why = "the same noise is on several numbers: their difference has none. Every number needs its own"
        raise Wrong(why, where, f"{D:,} different ones", f"{different:,}")
    if abs(own.mean()) < 1e-9 * own.std():
        raise Wrong("the noise adds up to zero over the numbers: their sum goes out without any", where)


def _part(found, of):
    """How much of the tensor `of` is in `found`: 1 where it is all there."""
    return (found @ of / (of @ of)).item()


WHY = (
    "Variances add: n shares of (sigma · clip)² / n are what the accountant was told, and no message leaves "
    "without its share. Opacus's DistributedDPOptimizer adds all of the noise on rank 0: its sum is as private, "
    "but the other ranks' messages go out bare."
)
exercise = Exercise(hints, check, minutes=15, level="medium", why=WHY)
