"""Exercises that change a model's gradients and nothing else: what an answer did to a model, and which are left."""

import torch

from pardist_lib.ranks.report import plural

from ..exercises.gradients import gradients
from ..exercises.judge import Wrong
from ..exercises.watch import watched


def watched_on(model, call):
    """On a rank: `call()`, watched. seen.kept is what happened to the model meanwhile: gradients "before" and "after",
    names of weights "touched" and of parameters whose requires_grad was "turned"; and {name: bytes} of "trainable"."""
    named, before = dict(model.named_parameters()), gradients(model)
    weights = {name: p.detach().clone() for name, p in named.items()}
    trainable = {name: p.numel() * p.element_size() for name, p in named.items() if p.requires_grad}
    seen = watched(call)
    touched = [name for name, p in named.items() if not torch.equal(p, weights[name])]
    turned = [name for name, p in named.items() if p.requires_grad != (name in trainable)]
    seen.kept = {"before": before, "after": gradients(model), "touched": touched, "turned": turned}
    seen.kept["trainable"] = trainable
    return seen


def each_gradient(members, mine, about):
    """Yield (name, each rank's gradient before, and after). Raises Wrong where something else was changed, where a
    gradient is gone, or where there is one of what has none. mine: the members' `Seen`, by `watched_on`."""
    for rank, one in zip(members, mine, strict=True):
        if one.kept["turned"]:
            why = f"it changed requires_grad ({one.kept['turned'][0]} is the first): only the gradients are to change"
            raise Wrong(why, f"rank {rank}, {about}")
        if one.kept["touched"]:
            why = f"the weights have changed ({one.kept['touched'][0]} is the first): only gradients are to change"
            raise Wrong(f"{why}, steps are the optimizer's", f"rank {rank}, {about}")
    for name in mine[0].kept["before"]:
        own, after = ([one.kept[when][name] for one in mine] for when in ("before", "after"))
        gone = [rank for rank, a in zip(members, after, strict=True) if a is None]
        if own[0] is None and len(gone) < len(mine):
            raise Wrong(f"{name} had no gradient on any rank and now has one", about)
        if own[0] is not None and gone:
            why = "was it cleared afterwards (zero_grad), or did no backward reach it?"
            raise Wrong(f"no gradient is left for {name}: {why}", f"{plural(gone)}, {about}")
        if own[0] is not None:
            yield name, own, after
