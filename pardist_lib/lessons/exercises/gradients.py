"""What the exercises about averaged gradients share: a model with everything that a real one has, and how its
gradients are judged.
"""

import torch
import torch.distributed as dist

from pardist_lib.ranks.report import plural

from ..worlds import group_of
from .judge import Wrong, only_calls, same
from .watch import watched


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


def rows_of_rank(seed, rank, dtype):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(3, 6, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(model, rows, **how):
    return model(rows, **how).square().mean()


def average(answer, seed, dtype, same_weights=True, in_pairs=False, extra_on=range(4), zero_on=()):
    """On a rank: a model with this rank's gradients, averaged by the answer. extra_on: the ranks that use the layer
    `extra`. zero_on: the ranks whose gradients are all zero (and not None)."""
    rank = dist.get_rank()
    model = Sample(seed if same_weights else seed + rank, dtype)
    loss = loss_of(model, rows_of_rank(seed, rank, dtype), with_extra=rank in extra_on)
    (loss * (rank not in zero_on)).backward()
    before, weights = gradients(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name: p.numel() * p.element_size() for name, p in model.named_parameters() if p.requires_grad}
    groups = [group_of([0, 2]), group_of([1, 3])] if in_pairs else []
    try:
        seen = watched(answer, model, **({"group": groups[rank % 2]} if in_pairs else {}))
    except (TypeError, AttributeError) as error:
        if "NoneType" in str(error) and (empty := without_gradient(model, error.__traceback__)):
            error.args = (f"{error.args[0]} (the gradient of {empty} is None)",)
        raise
    touched = [name for name, p in model.named_parameters() if not torch.equal(p, weights[name])]
    turned = [name for name, p in model.named_parameters() if p.requires_grad != (name in trainable)]
    after = gradients(model)
    seen.kept = {"before": before, "after": after, "touched": touched, "trainable": trainable, "turned": turned}
    return seen


def without_gradient(model, traceback):
    """The name of the parameter that code which failed was looking at, where that one has no gradient; else ""."""
    names = {id(p): name for name, p in model.named_parameters() if p.grad is None}
    found = ""
    while traceback is not None:
        for value in traceback.tb_frame.f_locals.values():
            found = names.get(id(value), found)
        traceback = traceback.tb_next
    return found


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


OTHER_CALLS = {
    "broadcast": "it broadcasts one rank's gradients: the others' share is lost, an average needs all_reduce",
    "reduce": "it calls reduce, which brings the sum to one rank only: all_reduce brings it to all",
    "all_gather": "it calls all_gather, which brings every rank's whole gradient to every rank, n times as many bytes: "
    "all_reduce adds up on the way",
    "": "it calls {op}: one all_reduce of each gradient is all that is needed",
}


def judge_average(seen, groups, about, flags=False):
    """Raise Wrong unless each group's ranks have the mean of their gradients, with the traffic that it needs."""
    for members in groups:
        mine = [seen[r] for r in members]
        only_calls(mine, ("all_reduce",), OTHER_CALLS)
        for rank, one in zip(members, mine, strict=True):
            if one.kept["touched"]:
                before, after = one.kept["before"], one.kept["after"]
                idle = all(nearly_equal(before[name], after[name]) for name in before)
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
        judge_groups(members, mine, about, strict=False)
        judge_values(members, mine, means, everyone, about)
        judge_groups(members, mine, about, strict=True)
        judge_traffic(members, mine, means, about, flags)


def judge_groups(members, mine, about, strict):
    """Raise Wrong where an all_reduce goes over other ranks than those of the group. strict: also where all of them
    do; before the values were looked at, those tell it better."""
    for rank, one in zip(members, mine, strict=True):
        strange = [call for call in one.calls if call.group and set(call.group) != set(members)]
        if strange and (strict or len(strange) < len(one.calls)):
            flags = strange == one.calls[:1] and len(one.calls) > 1
            what = "the flags are summed over all ranks" if flags else "an all_reduce goes over all ranks"
            raise Wrong(f"{what}: `group` is missing from that all_reduce", f"rank {rank}, {about}")


def judge_values(members, mine, means, everyone, about):
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
        if all(nearly_equal(one.kept["after"][name], o) for one, o in zip(mine, own, strict=True))
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
        if (k := divisor(after, total)) not in (None, 1, n, n * n):
            mistakes.append((f"the sum was divided by {k}, not by the number of ranks, {n}", total / k))
        mistakes = [(why, would if isinstance(would, list) else [would] * n) for why, would in mistakes]
        same(after, [mean] * n, f"the gradient of {name}", about, mistakes, own, members)


def nearly_equal(a, b):
    return a is None and b is None or a is not None and b is not None and torch.equal(a, b)


def divisor(after, total):
    """k where what the ranks hold is their sum divided by a whole number k, else None."""
    wrong = next((g for g in after if g is not None and g.shape == total.shape and not torch.equal(g, total)), None)
    if wrong is None or not wrong.abs().sum():
        return None
    k = (total.abs().sum() / wrong.abs().sum()).item()
    return round(k) if abs(k - round(k)) < 1e-3 else None


def judge_traffic(members, mine, means, about, flags):
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
