"""What the exercises about layers share: a linear layer, the way there and back, and how its gradients are judged."""

import warnings

import torch
from torch.nn import functional as F

from ..exercises.cases import call, values
from ..exercises.judge import Wrong, plural, same
from ..exercises.watch import Seen, watched


def layer(shape, wide, out, dtype, bias, seed):
    """{name: tensor} of x, weight and bias (None unless asked for), the same on every rank."""
    x, weight, b = (values(s, dtype, 50 + i, seed) for i, s in enumerate([(*shape, wide), (out, wide), (out,)]))
    return {"x": x, "weight": weight, "bias": b if bias else None}


def gradients(inputs, g, part=slice(None)):
    """{name: gradient} of a linear layer's inputs, when only a part of its output features comes back, with g."""
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items() if t is not None}
    F.linear(*leaves.values())[..., part].backward(g)
    return {name: leaf.grad for name, leaf in leaves.items()}


def there_and_back(answer, inputs, g, needs_grad=True, beside=False, **options):
    """On a rank: `call` the answer, and come back to its result with the gradient g.

    beside: x has a second use, beside the answer, to which the same gradient comes back.
    Besides what `call` keeps there is in seen.kept: g; whether it stayed `intact`; whether autograd `knows` the
    result; `back`, what was seen on the way back; `grads`, {name of an input: its gradient}.
    """
    leaves = {name: t if t is None else t.clone().requires_grad_(needs_grad) for name, t in inputs.items()}
    inputs = {name: t if t is None else t.clone() for name, t in leaves.items()}  # nobody may write into a leaf
    results = []

    def keeping(*given, **options):
        results.append(answer(*given, **options))
        return results[0]

    seen, [y] = call(keeping, inputs, **options), results
    if isinstance(y, torch.autograd.Function):
        name = type(y).__name__
        raise TypeError(f"{name}(x) only makes an object of the class; {name}.apply(x) calls it")
    knows, before, back = getattr(y, "requires_grad", False), g.clone(), Seen()
    if knows and y.shape == g.shape:
        end = torch.cat([y.flatten(), inputs["x"].flatten()]) if beside else y
        with warnings.catch_warnings():  # torch's, on a collective that autograd passes over: the gradients tell
            warnings.filterwarnings("ignore", "c10d::")
            back = watched(end.backward, torch.cat([g.flatten(), g.flatten()]) if beside else g)
    for name in ("reference", "torchs", "hidden"):
        setattr(seen, name, getattr(seen, name) or getattr(back, name))
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}
    seen.kept |= {"g": before, "intact": torch.equal(g, before), "knows": knows, "back": back, "grads": grads}
    seen.kept["leads to"] = [name for name, leaf in leaves.items() if knows and _leads_to(leaf, y)]
    return seen


def _leads_to(leaf, y):
    """Whether autograd's way back from y comes to this leaf."""
    nodes, known = [y.grad_fn], set()
    while nodes:
        if (node := nodes.pop()) is not None and node not in known:
            known.add(node)
            nodes += [before for before, _ in node.next_functions]
    return leaf is not None and any(getattr(node, "variable", None) is leaf for node in known)


CUT = "detach(), .data, a new Parameter or a copy that autograd knows nothing of cuts it off"
NOTHING = "does it end without a return, or return what dist.all_reduce returned, which is None?"


def judge_gradients(members, mine, expected, mistakes, about, lost=CUT, free=""):
    """Raise Wrong unless x, weight and bias have the expected gradients on each rank.

    expected: one dict for each of members. mistakes: {name: {diagnosis: as in `same`}}. lost: how a gradient gets lost.
    free: why nothing has to be sent for them; "" where something has to be.
    """
    places = [f"rank {rank}, {about}" for rank in members]
    for one, where in zip(mine, places, strict=True):
        if one.kept["back"].unwaited:
            why = "until wait() returns, the sum is not there"
            raise Wrong(f"backward's async_op=True was never waited for: {why}", where)
    for name in expected[0]:
        got, wanted = [one.kept["grads"][name] for one in mine], [e[name] for e in expected]
        if missing := [r for r, g, w in zip(members, got, wanted, strict=True) if g is None and w.any()]:
            why = f"`{name}` gets a gradient on some ranks only: after one step its copies differ; use it on all alike"
            if len(missing) == len(members):
                known = f"come back to {name}" if mine[0].kept["knows"] else "know where the result comes from"
                why = f"autograd does not {known}, and `{name}` gets no gradient: {lost}"
                if name in mine[0].kept["leads to"]:
                    why = f"backward gives None for `{name}`: {NOTHING}"
            raise Wrong(f"the result is right, but {why}", f"{plural(missing)}, {name}.grad, {about}")
        got = [w if g is None else g for g, w in zip(got, wanted, strict=True)]
        same(got, wanted, f"{name}.grad", about, mistakes.get(name, {}).items(), labels=members)
    for one, where in zip(mine, places, strict=True):
        if not one.kept["intact"]:
            why = "whoever else was handed it (the other branch of a residual connection, say) has the changed one now"
            raise Wrong(f"the gradient that came in was changed: {why}; work on a clone of it", where)
        if free and (sent := one.kept["back"].calls):
            raise Wrong(f"the gradients are right, but backward calls {sent[0].op}: {free}", where)
