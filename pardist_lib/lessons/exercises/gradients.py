"""What the exercises about averaged gradients share: a model with all that a real one has, an answer's averaging of
its gradients, and how what came out is judged.
"""

import torch
import torch.distributed as dist

from pardist_lib.ranks.report import plural

from .cases import PAIRS as PAIRS
from .cases import own_group
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
            self.add_module(name, layer := torch.nn.Linear(a, b, dtype=dtype))
            for p in layer.parameters():
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) / a**0.5
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


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def average(answer, seed, dtype, same_weights=True, in_pairs=False, extra_on=range(4), zero_on=()):
    """On a rank: a model with this rank's gradients, averaged by the answer.

    extra_on: the ranks that use the layer `extra`. zero_on: those whose gradients are all zero (and not None).
    """
    rank = dist.get_rank()
    model = Sample(seed if same_weights else seed + rank, dtype)
    loss = loss_of(model, rows_of_rank(seed, rank, dtype), with_extra=rank in extra_on)
    (loss * (rank not in zero_on)).backward()
    named = dict(model.named_parameters())
    before, weights = gradients(model), {name: p.detach().clone() for name, p in named.items()}
    trainable = {name: p.numel() * p.element_size() for name, p in named.items() if p.requires_grad}
    try:
        seen = watched(answer, model, **own_group(in_pairs))
    except (TypeError, AttributeError) as error:
        if "NoneType" in str(error) and (empty := _without_gradient(named, error.__traceback__)):
            error.args = (f"{error.args[0]} (the gradient of {empty} is None)",)
        raise
    touched = [name for name, p in named.items() if not torch.equal(p, weights[name])]
    turned = [name for name, p in named.items() if p.requires_grad != (name in trainable)]
    after = gradients(model)
    seen.kept = {"before": before, "after": after, "touched": touched, "turned": turned, "trainable": trainable}
    return seen


def _without_gradient(named, traceback):
    """The name of the parameter that code which failed was looking at, where that one has no gradient; else ""."""
    names, found = {id(p): name for name, p in named.items() if p.grad is None}, ""
    while traceback is not None:
        for value in traceback.tb_frame.f_locals.values():
            found = names.get(id(value), found)
        traceback = traceback.tb_next
    return found


# ---- judging --------------------------------------------------------------------------------------------------

OTHER_CALLS = {
    "broadcast": "it broadcasts one rank's gradients: the others' share is lost, an average needs all_reduce",
    "reduce": "it calls reduce, which brings the sum to one rank only: all_reduce brings it to all",
    "all_gather": "it calls all_gather, which brings every rank's whole gradient to every rank, n times as many bytes: "
    "all_reduce adds up on the way",
    "": "it calls {op}: one all_reduce of each gradient is all that is needed",
}


def judge_average(seen, groups, about, flags=False):
    """Raise Wrong unless each group's ranks have the mean of their gradients, with the traffic that it needs.

    seen[r].kept: as `average` keeps it. flags: zeros for unused parameters and a number for each may travel, too.
    """
    for members in groups:
        mine, means = [seen[r] for r in members], {}
        only_calls(mine, ("all_reduce",), OTHER_CALLS)
        _only_gradients_changed(members, mine, about)
        for name in mine[0].kept["before"]:
            own, after = ([one.kept[when][name] for one in mine] for when in ("before", "after"))
            if (some := next((g for g in own if g is not None), None)) is not None:
                filled = [torch.zeros_like(some) if g is None else g for g in own]
                means[name] = torch.stack(filled).mean(0), own, filled, after
        _only_in_group(members, mine, about, strict=False)
        _nothing_left_out(members, mine, means, about)
        for name in means:
            _is_mean(name, means, members, seen, about)
        _only_in_group(members, mine, about, strict=True)
        judge_traffic(members, mine, means, about, flags)


def _only_gradients_changed(members, mine, about):
    for rank, kept in zip(members, (one.kept for one in mine), strict=True):
        if kept["touched"]:
            idle = all(map(_alike, kept["before"].values(), kept["after"].values()))
            why = "average p.grad, not p" if idle else "only the gradients are to change, steps are the optimizer's"
            raise Wrong(f"the weights have changed ({kept['touched'][0]} is the first): {why}", f"rank {rank}, {about}")
        if kept["turned"]:
            why = f"it changed requires_grad ({kept['turned'][0]} is the first): only the gradients are to change"
            raise Wrong(why, f"rank {rank}, {about}")


def _alike(a, b):
    return a is b or a is not None and b is not None and torch.equal(a, b)


def _only_in_group(members, mine, about, strict):
    """Raise Wrong where an all_reduce goes over other ranks than the group's. Not strict: where only some of them do;
    where all do, the values, which are looked at in between, say it better."""
    for rank, one in zip(members, mine, strict=True):
        strange = [call for call in one.calls if call.group and set(call.group) != set(members)]
        if strange and (strict or len(strange) < len(one.calls)):
            flags = strange == one.calls[:1] and len(one.calls) > 1
            what = "the flags are summed over all ranks" if flags else "an all_reduce goes over all ranks"
            raise Wrong(f"{what}: `group` is missing from that all_reduce", f"rank {rank}, {about}")


def _nothing_left_out(members, mine, means, about):
    """Raise Wrong where a parameter that nobody used has a gradient, or where only some of the others are averaged."""
    for name in [name for name in mine[0].kept["after"] if name not in means]:
        if made := [rank for rank, one in zip(members, mine, strict=True) if one.kept["after"][name] is not None]:
            why = (
                f"{name} had no gradient on any rank ({'it is frozen' if 'frozen' in name else 'no rank used it'}) and "
            )
            raise Wrong(f"{why}now has one: weight decay and momentum would then change it", f"{plural(made)}, {about}")
    stale = [name for name, (_, own, _, after) in means.items() if all(map(_alike, after, own))]
    if stale and len(stale) < len(means):
        done = [name for name in means if name not in stale]
        why = f"only {', '.join(done[:2])}{' …' * (len(done) > 2)} is averaged, {stale[0]} still holds each rank's own "
        why += "gradient: every parameter needs its call"
        if stale == [name for name, (_, own, *_) in means.items() if any(g is None for g in own)]:
            why = f"averaged only where every rank used it: {stale[0]} was used on some, and that is enough (flags are "
            why += "added up, or their MAX taken, not their MIN)"
        raise Wrong(why, f"{plural(members)}, {about}")


def _is_mean(name, means, members, seen, about):
    n, (mean, own, filled, after) = len(members), means[name]
    total, stacked, ops = mean * n, torch.stack(filled), seen[members[0]].ops
    lost = [i for i in range(n) if after[i] is None]
    cleared = [i for i in lost if own[i] is not None]
    for empty, why in (
        ([i for i in cleared if own[i].any()], f"p.grad of {name} is None afterwards: was it cleared (zero_grad)?"),
        (cleared, f"no gradient is left for {name}: it was zero, which is not the same as None"),
        (lost, f"no gradient for {name}, which another rank used: p.grad has to be set here too"),
    ):
        if empty:
            raise Wrong(why, f"{plural([members[i] for i in empty])}, {about}")
    mistakes, everyone = [], [one.kept["before"][name] for one in seen]
    if n < len(seen) and all(g is not None for g in everyone):
        whole = torch.stack(everyone)
        mistakes = [
            ("the group argument is ignored: this is the mean over all ranks", whole.mean(0)),
            ("the group argument is ignored in all_reduce: this is the sum over all ranks", whole.sum(0) / n),
            (f"divided by the number of all ranks, {len(seen)}, where the group has {n}", total / len(seen)),
        ]
    undivided = f"was not divided by {n}, the number of ranks: every element is {n} times too large"
    if ops & {"div", "mul", "true_divide"}:  # not in place
        undivided = f"was divided by {n} into a new tensor that does not reach p.grad: divide in place, g /= n"
    idle = "nothing was exchanged: each rank still holds its own gradient"
    if any(call.op == "all_reduce" for call in seen[members[0]].calls):
        idle = "an average was made but never reached p.grad: it went into a copy"
    flat = torch.cat([mean.flatten() for mean, *_ in means.values()])
    flat = flat[: mean.numel()].view_as(mean)
    mistakes += [
        (f"the sum {undivided}", total),
        (idle, own),
        ("every rank holds rank 0's gradient: the others' share is lost", filled[0]),
        ("it takes the MAX over the ranks, not the mean", stacked.amax(0)),
        ("it takes the MIN over the ranks, not the mean", stacked.amin(0)),
        ("it takes the product over the ranks, not the mean", stacked.prod(0)),
        (f"divided twice by {n}: before and after the sum?", mean / n),
        (f"{name} holds the beginning of the flat tensor: its own part lies further on", flat),
    ]
    if (users := sum(g is not None for g in own)) < n:
        why = f"divided by the number of ranks that used it, {users}, not by {n}: a rank without a gradient counts as "
        mistakes.append((f"{why}zeros", total / users))
    mistakes += [(f"the sum was divided by {k}, not by the number of ranks, {n}", total / k) for k in range(2, 100)]
    same(after, mean, f"the gradient of {name}", about, mistakes, own, members)


def judge_traffic(members, mine, means, about, flags):
    """Raise Wrong unless each rank's all_reduces carry the bytes of all gradients once. means: {name: (mean, …)}."""
    size = sum(mean.numel() * mean.element_size() for mean, *_ in means.values())
    trainable = mine[0].kept["trainable"]
    extra = sum(trainable.values()) - size + 8 * len(trainable) if flags else 0
    for rank, one in zip(members, mine, strict=True):
        made = sum(call.bytes for call in one.calls)
        shown = f"{size:,} bytes" + (f" and up to {extra} more" if extra else ""), f"{made:,} bytes"
        why = f"the result is right, but {made:,} bytes are all-reduced for {size:,} bytes of gradients"
        if made < size:
            why = f"the result is right, but only {made:,} of {size:,} bytes of gradients are all-reduced"
            why += ": zero gradients were skipped, zero is not None"
        elif made > size + extra:
            twice = made - size == trainable["fc2.weight"]
            why += ": a weight that two layers share comes up twice in modules()" if twice else ": each once is enough"
        elif len(one.calls) > len(trainable) + flags:
            why = f"the result is right, but it takes {len(one.calls)} calls for {len(means)} gradients"
            why, shown = f"{why}, and each call waits for every rank: one for each gradient is enough", ()
        else:
            continue
        raise Wrong(why, f"rank {rank}, {about}", *shown)
