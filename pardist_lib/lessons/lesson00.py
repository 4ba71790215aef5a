"""The exercises of lesson 00: hints, and how an answer is checked."""

import math
from collections import Counter

import torch
import torch.distributed as dist

from pardist_lib.ranks.report import plural

from .judge import Wrong, only_calls, same
from .watch import Other, group_of, watched


class shard_rows:
    hints = (
        "Start with a number of rows that the ranks share evenly: where does rank 1 begin if each one gets k rows?",
        "n // world_size rows each leave n % world_size rows over: the first ranks can take one more, and then every "
        "later rank begins that much further on.",
        "Without any case distinction: rank r begins at n * r // world_size, and ends where rank r + 1 begins.",
    )

    @staticmethod
    def check(run):
        cases = [(8, 4), (10, 4), (7, 3), (3, 4), (5, 1), (0, 2), (1797, 8), (61, 7), (15, 11), (122, 7)]
        [seen] = run(_all_shards, cases, n=1)
        for (n, world_size), shards in zip(cases, seen.result, strict=True):
            try:
                _judge_shards(n, world_size, shards)
            except Wrong as wrong:
                if (n, world_size) == (7, 3):  # the first without 4 ranks
                    wrong.diagnosis = (
                        f"it works with 4 ranks, but not with 3 (is a 4 written into it?): {wrong.diagnosis}"
                    )
                raise


def _all_shards(answer, cases):
    return watched(lambda: [[answer(n, rank, size) for rank in range(size)] for n, size in cases])


def _judge_shards(n, world_size, shards):
    about = f"{n} rows on {world_size} rank{'s' * (world_size > 1)}"
    for rank, rows in enumerate(shards):
        if not isinstance(rows, (range, slice)):
            kind = rows.type if isinstance(rows, Other) else type(rows).__name__
            what = "nothing, and" if rows is None else f"{rows!r:.60} ({kind}):"
            raise Wrong(f"it returns {what} a range is asked for", f"rank {rank}, {about}")
    shards = [range(*rows.indices(n)) if isinstance(rows, slice) else rows for rows in shards]
    sizes, owners = [len(rows) for rows in shards], Counter(row for rows in shards for row in rows)
    shown = {"expected": "each row once, sizes at most 1 apart", "got": ", ".join(map(_written, shards[:8]))}
    missing = sorted(set(range(n)) - set(owners))
    outside = sorted(set(owners) - set(range(n)))
    doubled = sorted(row for row, count in owners.items() if count > 1)
    if owners and world_size > 1 and len(set(map(tuple, shards))) == 1:
        raise Wrong("every rank gets the same rows: rank is not used", about, **shown)
    if (doubled or missing or outside) and shards in _by_floats(n, world_size):
        raise Wrong(
            "n / world_size is a float, and times the rank it rounds to a neighbouring row: use //", about, **shown
        )
    if doubled:
        who = plural([rank for rank, rows in enumerate(shards) if doubled[0] in rows])
        everywhere = all(len(set(a) & set(b)) == 1 for a, b in zip(shards, shards[1:], strict=False))
        why = "a range's stop is not part of it" if everywhere else "each rank begins where the one before it ends"
        raise Wrong(f"row {doubled[0]} belongs to {who}: {why}", about, **shown)
    if outside:
        raise Wrong(f"there is no row {outside[0]}: the last shard runs over the end of {n} rows", about, **shown)
    if missing:
        lost = f"row {missing[0]} belongs" if len(missing) == 1 else f"{_rows_in_words(missing)} belong"
        at_the_end = missing == list(range(n // world_size * world_size, n)) and set(sizes) == {n // world_size}
        ends = [rows.stop for rows in shards if rows.step == 1]
        why = ": n // world_size rows each leave the remainder out" if at_the_end else ""
        if missing == sorted(set(ends)) and ends[-1] == n - 1:
            why = ": each shard ends one early (a range already leaves out its end)"
        raise Wrong(f"{lost} to no rank{why}", about, **shown)
    if max(sizes) - min(sizes) > 1:
        why = f"sizes {', '.join(map(str, sizes))} are more than 1 apart"
        if sizes[-1] == max(sizes) and len(set(sizes[:-1])) == 1:
            why += ": the last rank takes all that is left over"
        elif sizes[0] == -(-n // world_size):
            why += ": every rank but the last rounds up, and the last ones get what remains"
        raise Wrong(why, about, **shown)


def _by_floats(n, world_size):
    """What people get who divide by / before they multiply."""
    share = n / world_size
    return [
        [range(whole(rank * share), whole((rank + 1) * share)) for rank in range(world_size)]
        for whole in (int, round, math.ceil)
    ]


def _rows_in_words(rows):
    if rows[-1] - rows[0] + 1 == len(rows):
        return f"rows {rows[0]} to {rows[-1]}"
    return "rows " + ", ".join(map(str, rows[:8])) + ", …" * (len(rows) > 8)


def _written(rows):
    return f"{rows.start}:{rows.stop}" + (f":{rows.step}" if rows.step != 1 else "") if len(rows) else "none"


# ---- gradients ------------------------------------------------------------------------------------------------


class Sample(torch.nn.Module):
    """Six layers with everything that a real model has: a weight used twice, a frozen one, one that nobody uses,
    and one that only some ranks use."""

    def __init__(self, seed, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = {"fc1": (6, 8), "fc2": (8, 8), "again": (8, 8), "frozen": (8, 8), "unused": (5, 3), "extra": (8, 8)}
        for name, (a, b) in sizes.items():
            layer = torch.nn.Linear(a, b, dtype=dtype)
            for p in layer.parameters():
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) / a**0.5
            self.add_module(name, layer)
        self.again.weight = self.fc2.weight
        self.frozen.requires_grad_(False)

    def forward(self, x, with_extra=True):
        x = self.again(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))
        x = torch.tanh(self.frozen(x))
        return self.extra(x) if with_extra else x


def _rows(seed, rank, dtype):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(3, 6, generator=generator, dtype=torch.float64).to(dtype)


def _loss(model, rows, **how):
    return model(rows, **how).square().mean()


def _average(answer, seed, dtype, same_weights=True, in_pairs=False, extra_on=range(4), zero_on=()):
    """On a rank: a model with this rank's gradients, averaged by the answer. extra_on: the ranks that use the layer
    `extra`. zero_on: the ranks whose gradients are all zero (and not None)."""
    rank = dist.get_rank()
    model = Sample(seed if same_weights else seed + rank, dtype)
    loss = _loss(model, _rows(seed, rank, dtype), with_extra=rank in extra_on)
    (loss * (rank not in zero_on)).backward()
    before, weights = _gradients(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name: p.numel() * p.element_size() for name, p in model.named_parameters() if p.requires_grad}
    groups = [group_of([0, 2]), group_of([1, 3])] if in_pairs else []
    try:
        seen = watched(answer, model, **({"group": groups[rank % 2]} if in_pairs else {}))
    except (TypeError, AttributeError) as error:
        if "NoneType" in str(error) and (empty := _without_gradient(model, error.__traceback__)):
            error.args = (f"{error.args[0]} (the gradient of {empty} is None)",)
        raise
    touched = [name for name, p in model.named_parameters() if not torch.equal(p, weights[name])]
    turned = [name for name, p in model.named_parameters() if p.requires_grad != (name in trainable)]
    after = _gradients(model)
    seen.kept = {"before": before, "after": after, "touched": touched, "trainable": trainable, "turned": turned}
    return seen


def _without_gradient(model, traceback):
    """The name of the parameter that code which failed was looking at, where that one has no gradient; else ""."""
    names = {id(p): name for name, p in model.named_parameters() if p.grad is None}
    found = ""
    while traceback is not None:
        for value in traceback.tb_frame.f_locals.values():
            found = names.get(id(value), found)
        traceback = traceback.tb_next
    return found


def _gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


OTHER_CALLS = {
    "broadcast": "it broadcasts one rank's gradients: the others' share is lost, an average needs all_reduce",
    "reduce": "it calls reduce, which brings the sum to one rank only: all_reduce brings it to all",
    "all_gather": "it calls all_gather, which brings every rank's whole gradient to every rank, n times as many bytes: "
    "all_reduce adds up on the way",
    "": "it calls {op}: one all_reduce of each gradient is all that is needed",
}


def _judge_average(seen, groups, about, flags=False):
    """Raise Wrong unless each group's ranks have the mean of their gradients, with the traffic that it needs."""
    for members in groups:
        mine = [seen[r] for r in members]
        only_calls(mine, ("all_reduce",), OTHER_CALLS)
        for rank, one in zip(members, mine, strict=True):
            if one.kept["touched"]:
                before, after = one.kept["before"], one.kept["after"]
                idle = all(_alike(before[name], after[name]) for name in before)
                why = "average p.grad, not p" if idle else "only the gradients are to change, steps are the optimizer's"
                name = one.kept["touched"][0]
                raise Wrong(f"the weights have changed ({name} is the first): {why}", f"rank {rank}, {about}")
            if one.kept["turned"]:
                name = one.kept["turned"][0]
                why = f"it changed requires_grad ({name} is the first): only the gradients are to change"
                raise Wrong(why, f"rank {rank}, {about}")
        means = {}
        for name in mine[0].kept["before"]:
            own = [one.kept["before"][name] for one in mine]
            if any(g is not None for g in own):
                filled = [torch.zeros_like(next(g for g in own if g is not None)) if g is None else g for g in own]
                means[name] = torch.stack(filled).mean(0), own, filled
        everyone = {name: [one.kept["before"][name] for one in seen] for name in means}
        _judge_groups(members, mine, about, strict=False)
        _judge_values(members, mine, means, everyone, about)
        _judge_groups(members, mine, about, strict=True)
        _judge_traffic(members, mine, means, about, flags)


def _judge_groups(members, mine, about, strict):
    """Raise Wrong where an all_reduce goes over other ranks than those of the group. strict: also where all of them
    do; before the values were looked at, those tell it better."""
    for rank, one in zip(members, mine, strict=True):
        strange = [call for call in one.calls if call.group and set(call.group) != set(members)]
        if strange and (strict or len(strange) < len(one.calls)):
            flags = strange == one.calls[:1] and len(one.calls) > 1
            what = "the flags are summed over all ranks" if flags else "an all_reduce goes over all ranks"
            raise Wrong(f"{what}: `group` is missing from that all_reduce", f"rank {rank}, {about}")


def _judge_values(members, mine, means, everyone, about):
    n = len(members)
    for name in mine[0].kept["before"]:
        made = [r for r, one in zip(members, mine, strict=True) if one.kept["after"][name] is not None]
        if name not in means and made:
            why = "it is frozen" if name.startswith("frozen") else "no rank used it"
            raise Wrong(
                f"{name} had no gradient on any rank ({why}) and now has one: "
                "weight decay and momentum would then change it",
                f"{plural(made)}, {about}",
            )
    stale = [
        name
        for name, (mean, own, _) in means.items()
        if all(_alike(one.kept["after"][name], o) for one, o in zip(mine, own, strict=True))
    ]
    talked = any(call.op == "all_reduce" for call in mine[0].calls)
    partly = [name for name, (_, own, _) in means.items() if any(g is None for g in own)]
    if stale and partly == stale and len(stale) < len(means):
        raise Wrong(
            f"averaged only where every rank used it: {stale[0]} was used on some, and that is enough (flags are "
            "added up, or their MAX taken, not their MIN)",
            f"{plural(members)}, {about}",
        )
    if stale and len(stale) < len(means):
        done = [name for name in means if name not in stale]
        raise Wrong(
            f"only {', '.join(done[:2])}{' …' * (len(done) > 2)} is averaged, {stale[0]} still holds each rank's own "
            "gradient: every parameter needs its call",
            f"{plural(members)}, {about}",
        )
    flat = torch.cat([mean.flatten() for mean, *_ in means.values()])
    divided = mine[0].ops & {"div", "mul", "true_divide"}  # not in place
    for name, (mean, own, filled) in means.items():
        total = mean * n
        after = [one.kept["after"][name] for one in mine]
        users = sum(g is not None for g in own)
        mistakes = [
            (f"the sum was divided by {n} into a new tensor that does not reach p.grad: divide in place, g /= n"
             if divided else
             f"the sum was not divided by {n}, the number of ranks: every element is {n} times too large", total),
            (
                "an average was made but never reached p.grad: it went into a copy"
                if talked
                else "nothing was exchanged: each rank still holds its own gradient",
                own,
            ),
            ("every rank holds rank 0's gradient: the others' share is lost", filled[0]),
            ("it takes the MAX over the ranks, not the mean", torch.stack(filled).amax(0)),
            ("it takes the MIN over the ranks, not the mean", torch.stack(filled).amin(0)),
            ("it takes the product over the ranks, not the mean", torch.stack(filled).prod(0)),
            (f"divided twice by {n}: before and after the sum?", mean / n),
            (f"{name} holds the beginning of the flat tensor: its own part lies further on",
             flat[: mean.numel()].view_as(mean)),
        ]  # fmt: skip
        if n < len(everyone[name]) and None not in everyone[name]:
            overall = torch.stack(everyone[name])
            mistakes[:0] = [
                ("the group argument is ignored: this is the mean over all ranks", overall.mean(0)),
                ("the group argument is ignored in all_reduce: this is the sum over all ranks", overall.sum(0) / n),
                (f"divided by the number of all ranks, {len(overall)}, where the group has {n}", total / len(overall)),
            ]
        if users < n:
            mistakes.append((
                f"divided by the number of ranks that used it, {users}, not by {n}: a rank without a gradient counts "
                "as zeros", total / users,
            ))  # fmt: skip
        for empty, why in (
            ([r for r, a, o in zip(members, after, own, strict=True) if a is None and o is not None and o.any()],
             f"p.grad of {name} is None afterwards: was it cleared (zero_grad)?"),
            ([r for r, a, o in zip(members, after, own, strict=True) if a is None and o is not None],
             f"no gradient is left for {name}: it was zero, which is not the same as None"),
            ([r for r, a in zip(members, after, strict=True) if a is None],
             f"no gradient for {name}, which another rank used: p.grad has to be set here too"),
        ):  # fmt: skip
            if empty:
                raise Wrong(why, f"{plural(empty)}, {about}")
        if (k := _divisor(after, total)) not in (None, 1, n, n * n):
            mistakes.append((f"the sum was divided by {k}, not by the number of ranks, {n}", total / k))
        mistakes = [(why, would if isinstance(would, list) else [would] * n) for why, would in mistakes]
        same(after, [mean] * n, f"the gradient of {name}", about, mistakes, own, members)


def _alike(a, b):
    return a is None and b is None or a is not None and b is not None and torch.equal(a, b)


def _divisor(after, total):
    """k where what the ranks hold is their sum divided by a whole number k, else None."""
    wrong = next((g for g in after if g is not None and g.shape == total.shape and not torch.equal(g, total)), None)
    if wrong is None or not wrong.abs().sum():
        return None
    k = (total.abs().sum() / wrong.abs().sum()).item()
    return round(k) if abs(k - round(k)) < 1e-3 else None


def _judge_traffic(members, mine, means, about, flags):
    size = sum(mean.numel() * mean.element_size() for mean, *_ in means.values())
    trainable = mine[0].kept["trainable"]
    # zeros may travel for what nobody used, and a flag for each parameter
    extra = sum(trainable.values()) - size + 8 * len(trainable) if flags else 0
    for rank, one in zip(members, mine, strict=True):
        made, where = sum(call.bytes for call in one.calls), f"rank {rank}, {about}"
        expected = f"{size:,} bytes" + (f" and up to {extra} more" if extra else "")
        if not size <= made <= size + extra:
            why = f"the result is right, but {made:,} bytes are all-reduced for {size:,} bytes of gradients"
            if made < size:
                why = f"the result is right, but only {made:,} of {size:,} bytes of gradients are all-reduced"
                raise Wrong(f"{why}: zero gradients were skipped, zero is not None", where, expected, f"{made:,} bytes")
            twice = made - size == trainable["fc2.weight"]
            more = "a weight that two layers share comes up twice in modules()" if twice else "each once is enough"
            raise Wrong(f"{why}: {more}", where, expected, f"{made:,} bytes")
        if len(one.calls) > len(trainable) + flags:
            why = f"the result is right, but it takes {len(one.calls)} calls for {len(means)} gradients"
            raise Wrong(f"{why}, and each call waits for every rank: one for each gradient is enough", where)


EVERYWHERE = range(4)
ALL, PAIRS = [[0, 1, 2, 3]], [[0, 2], [1, 3]]


class average_gradients:
    hints = (
        "After backward() each rank has its own gradients in p.grad, for each p of model.parameters(). "
        "dist.all_reduce(t, group=group) replaces t by the sum over the ranks, on every rank.",
        "A mean is a sum divided by how many there are: dist.get_world_size(group). Divide in place (/=), or the "
        "result does not reach p.grad.",
        "Loop over model.parameters(); where p.grad is not None, all-reduce p.grad, then divide it.",
    )

    @staticmethod
    def check(run):
        for dtype, same_weights in ((torch.float64, False), (torch.float32, True)):
            seen = run(_average, 1, dtype, same_weights)
            _judge_average(seen, ALL, "4 ranks")
        _judge_whole_batch(run)
        seen = run(_average, 3, torch.float64, True, True)
        _judge_average(seen, PAIRS, "two groups of 2 ranks")
        seen = run(_average, 4, torch.float64, n=3, about="3 ranks")
        _judge_average(seen, [[0, 1, 2]], "3 ranks")
        about = "4 ranks, all gradients of rank 1 zero"
        stuck = "rank 1 does not make the calls that the others make: its gradients are zero here, not None, and count"
        seen = run(_average, 7, torch.float64, True, False, EVERYWHERE, [1], about=about, stuck=stuck)
        _judge_average(seen, ALL, about)


def _judge_whole_batch(run):
    """Equal weights and shards of equal size: the mean is the gradient of all rows in one process."""
    seen = run(_average, 2, torch.float64)
    alone = Sample(2, torch.float64)
    _loss(alone, torch.cat([_rows(2, rank, torch.float64) for rank in range(4)])).backward()
    for name, expected in _gradients(alone).items():
        if expected is not None:
            same([one.kept["after"][name] for one in seen], [expected] * 4, f"the gradient of {name}", "4 ranks")


class average_used_gradients:
    hints = (
        "A rank that skips an all_reduce leaves the others waiting. So before the first one, all ranks have to know "
        "which parameters any of them used: that takes a message.",
        "Make a small tensor with one number for each parameter, 1 where p.grad is not None, and all-reduce it: where "
        "the sum is 0, no rank used the parameter, and all of them can skip it.",
        "Where the sum is above 0 and p.grad is None here, set p.grad = torch.zeros_like(p) first; then go on as in "
        "average_gradients. Leave out parameters whose requires_grad is False from the start.",
    )

    @staticmethod
    def check(run):
        stuck = (
            "the ranks do not make the same calls: where p.grad is None one of them skips the all_reduce that the "
            "others make; let them agree first on what was used"
        )
        for extra_on in ([1, 2], EVERYWHERE, [0], []):
            about = f"4 ranks, `extra` used on {plural(list(extra_on)) if extra_on else 'none'}"
            seen = run(_average, 5, torch.float64, True, False, extra_on, about=about, stuck=stuck)
            _judge_average(seen, ALL, about, flags=True)
        about = "two groups of 2 ranks, `extra` used on ranks 0, 1"
        seen = run(_average, 6, torch.float64, True, True, [0, 1], about=about, stuck=stuck)
        _judge_average(seen, PAIRS, about, flags=True)
        about = "two groups of 2 ranks, `extra` used in one of them: ranks 1, 3"
        seen = run(_average, 9, torch.float64, True, True, [1, 3], about=about, stuck=stuck)
        _judge_average(seen, PAIRS, about, flags=True)
        about = "4 ranks, all gradients zero (and not None)"
        seen = run(_average, 8, torch.float64, True, False, EVERYWHERE, EVERYWHERE, about=about, stuck=stuck)
        _judge_average(seen, ALL, about, flags=True)
