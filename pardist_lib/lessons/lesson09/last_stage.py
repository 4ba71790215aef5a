"""last_stage: loss and gradients scaled once over micro-batches. Typically wrong: not at all, by 1/m, or twice."""

import torch
import torch.nn.functional as F

from ..exercises.cases import F64, number, values, what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, same
from ..exercises.runs import pair, silent
from ..exercises.watch import plain, watched

hints = (
    "A mean over all rows is not the mean of the micro-batches' means, unless they are equally long. By how much does "
    "each mean count?",
    "loss_i * len(x_i) / rows, with rows the number in all micro-batches; then backward(). What goes back to the rank "
    "before is scaled by it, too: it is not scaled again.",
    "x_i.detach().requires_grad_() begins the graph of this rank; after backward x_i.grad is what goes back. "
    "loss.item() is a number without a graph.",
)
WIDTH, CLASSES = 6, 5
CASES = [  # rows of each micro-batch, whether the weights have a gradient already, what is new
    ([4, 4, 4], False, ""),
    ([4, 1, 2], False, "where the micro-batches have different lengths"),
    ([5], False, "with a single micro-batch"),
    ([2, 3], True, "where the weights have a gradient from before"),
]


def check(run):
    for seed, (rows, before, new) in enumerate(CASES):
        about = f"micro-batches of {rows} rows" + (", and gradients from a step before" if before else "")
        [seen] = run(_called, rows, before, seed, n=1, about=about)
        silent(seen)
        with what_is_new(new):
            _judge(seen, rows, before, seed, about)


class _Stage(torch.nn.Module):
    """Two layers; notes how many rows it is given, and whether a backward came before the next forward."""

    def __init__(self, seed):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(WIDTH, 8, dtype=F64), torch.nn.Linear(8, CLASSES, dtype=F64)
        for i, p in enumerate(self.parameters()):
            p.data = values(p.shape, F64, 70 + i, seed) / 3
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return self.fc2(torch.tanh(self.fc1(x)))


def _batch(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    xs = [values((b, WIDTH), F64, 10 + i, seed) for i, b in enumerate(rows)]
    return xs, [torch.randint(CLASSES, (b,), generator=generator) for b in rows]


def _old(stage):
    return {name: torch.full_like(p, 0.25) for name, p in stage.named_parameters()}


def _called(answer, rows, before, seed):
    stage, (xs, targets) = _Stage(seed), _batch(rows, seed)
    weights = {name: p.detach().clone() for name, p in stage.named_parameters()}
    if before:
        for name, p in stage.named_parameters():
            p.grad = _old(stage)[name]
    seen = watched(answer, stage, xs, targets)
    seen.kept = {
        "grads": {name: plain(p.grad) for name, p in stage.named_parameters()},
        "moved": [name for name, p in stage.named_parameters() if not torch.equal(p, weights[name])],
        "rows": stage.seen,
        "changed": any(not torch.equal(a.detach(), b) for a, b in zip(xs, _batch(rows, seed)[0], strict=False)),
    }
    return seen


def _parts(rows, seed):
    """Of each micro-batch: (its mean loss, the gradient of that by x, {name: by a weight})."""
    found = []
    for x, target in zip(*_batch(rows, seed), strict=True):
        stage, x = _Stage(seed), x.requires_grad_()
        loss = F.cross_entropy(stage(x), target)
        loss.backward()
        found.append((loss.detach(), x.grad, {name: p.grad for name, p in stage.named_parameters()}))
    return found


def _judge(seen, rows, before, seed, about):
    loss, grads = pair(seen.result, "(loss, gradients of xs)", about)
    m, n, parts = len(rows), sum(rows), _parts(rows, seed)
    ways = {  # diagnosis: how much each micro-batch counts
        "": [b / n for b in rows],
        "every micro-batch counts whole, the result is a sum of means: scale by its share of the rows": [1.0] * m,
        "this is the mean of the micro-batches' means, in which the rows of a short one count more: scale by "
        "len(x) / rows": [1 / m] * m,
        "this is the sum over the rows: divide by the number of all rows": [float(b) for b in rows],
        "scaled twice, by the share of the rows and by it again": [(b / n) ** 2 for b in rows],
        "scaled twice, by the share of the rows and by the number of micro-batches": [b / n / m for b in rows],
        "each mean is divided by the number of all rows: cross_entropy has divided by a micro-batch's own": [1 / n] * m,
        "each mean is divided by its own number of rows once more": [1 / b for b in rows],
        "only the last micro-batch is in it": [0.0] * (m - 1) + [rows[-1] / n],
        "only the last micro-batch is in it, and that unscaled": [0.0] * (m - 1) + [1.0],
    }
    ways = {why: shares for why, shares in ways.items() if not why or shares != ways[""]}
    if seen.kept["moved"]:
        raise Wrong(f"the weights have changed ({seen.kept['moved'][0]}): steps are the optimizer's", about)

    def summed(shares, of):
        return sum(share * of(part) for share, part in zip(shares, parts, strict=True))

    def mistakes(of):
        return [(why, summed(shares, of)) for why, shares in ways.items() if why]

    told = number(loss)
    total = summed(ways[""], lambda part: part[0])
    grads_right = all(_near(seen.kept["grads"][k], g, before) for k, g in _weights(ways[""], parts).items())
    unscaled = "the gradients are right, and the loss that is returned is not scaled: "
    known = [(unscaled + why if grads_right else why, would) for why, would in mistakes(lambda part: part[0])]
    same([told], total, "the loss", about, known, labels=["the loss"])

    if not isinstance(grads, (list, tuple)) or len(grads) != m:
        many = f"{len(grads)} of them" if isinstance(grads, (list, tuple)) else "no list"
        raise Wrong(f"the loss is right, but for the gradients of xs, a list of {m}, there is {many}", about)
    half = "the loss is right, its gradient is not: "
    for i, (grad, (_, right, _)) in enumerate(zip(grads, parts, strict=True)):
        if grad is None:
            raise Wrong(
                f"the gradient of xs[{i}] is None: autograd keeps one for x.requires_grad_() and after backward(), "
                "and not for the result of an operation",
                about,
            )
        known = [(half + why, shares[i] * right) for why, shares in ways.items() if why and shares[i]]
        same([grad], ways[""][i] * right, "", about, known, labels=[f"the gradient of xs[{i}]"])
    _judge_weights(seen, parts, ways, before, about)
    if sorted(seen.kept["rows"]) != sorted(rows):
        why = "together they do not fit in memory" if len(seen.kept["rows"]) < m else "one forward of each is enough"
        raise Wrong(f"the result is right, but the stage has to see each micro-batch once: {why}", about, str(rows),
                    str(seen.kept["rows"]))  # fmt: skip
    if seen.kept["changed"]:
        raise Wrong("the result is right, but `xs` was written into", about)


def _weights(shares, parts):
    return {k: sum(s * part[2][k] for s, part in zip(shares, parts, strict=True)) for k in parts[0][2]}


def _near(got, want, before):
    return got is not None and torch.allclose(got, want + 0.25 * before)


def _judge_weights(seen, parts, ways, before, about):
    right = _weights(ways[""], parts)
    for name, want in right.items():
        got, old = seen.kept["grads"][name], 0.25 * before
        if got is None:
            raise Wrong(f"{name} has no gradient: backward() adds to .grad, torch.autograd.grad does not", about)
        known = [
            (
                "the loss and what goes back are right, the weights' gradients not: " + why,
                _weights(s, parts)[name] + old,
            )
            for why, s in ways.items()
            if why
        ]
        if before:
            known.append(("the gradient that was there is gone: add to it, zero_grad is the optimizer's loop's", want))
            known.append(("the gradient that was there counts twice", want + 2 * old))
        same([got], want + old, f"the gradient of {name}", about, known, labels=[f"the gradient of {name}"])


WHY = (
    "The last stage scales its loss once, and every gradient on every stage before inherits the factor. PyTorch's "
    "schedules divide all gradients by m afterwards instead (scale_grads), right for equal lengths only."
)
exercise = Exercise(hints, check, minutes=15, level="medium", why=WHY)
