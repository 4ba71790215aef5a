"""Modules that do something unusual with their parts, for the tests of sharding; and ways to train them.

Each way is called with a model and a batch, and returns a loss. All values are float64.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Between(nn.Module):
    """`part` between two linear layers."""

    def __init__(self, part):
        super().__init__()
        self.before, self.part, self.after = nn.Linear(6, 4), part, nn.Linear(4, 4)

    def forward(self, x):
        return self.after(torch.tanh(self.part(torch.tanh(self.before(x)))))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * self.scale


class Lender(nn.Module):
    """Returns its own parameter, or a view of it."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.ones(5, 4))

    def forward(self, rows):
        return self.values[:rows]


class Borrower(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.lender, self.after = nn.Linear(6, 4), Lender(), nn.Linear(4, 4)

    def forward(self, x):
        return self.after(torch.tanh(self.before(x)) * self.lender(1))


class Keeper(Scaled):
    """Returns nothing, and keeps its result."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def forward(self, x):
        self.kept.append(super().forward(x))


class AsksKeeper(Between):
    def __init__(self):
        super().__init__(Keeper())

    def forward(self, x):
        self.part(torch.tanh(self.before(x)))
        return self.after(torch.tanh(self.part.kept.pop()))


class Result:
    def __init__(self, value):
        self.value = value


class Returns(nn.Module):
    """Returns a tensor that nobody uses, and an object with the one that is used."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.kind = Scaled(), Scaled(), kind

    def forward(self, x):
        return self.a(x), self.kind(value=self.b(x))


class Named(dict):
    value = property(lambda self: self["value"])


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class TakesObject(Between):
    def __init__(self, kind):
        super().__init__(Returns(kind))

    def forward(self, x):
        return self.after(torch.tanh(self.part(torch.tanh(self.before(x)))[1].value))


class Recalled(nn.Module):
    """A part of it is checkpointed, and of the whole a function of a parameter of its own."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.parts = reentrant, nn.ModuleList(RecalledPart(reentrant) for _ in range(2))
        self.weight = nn.Parameter(torch.ones(4, 6))

    def forward(self, x):
        x = checkpoint(lambda x: F.linear(x, self.weight), x.clone().requires_grad_(), use_reentrant=self.reentrant)
        for part in self.parts:
            x = part(x)
        return x


class RecalledPart(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.plain, self.recalled = reentrant, Scaled(), Scaled()

    def forward(self, x):
        return self.plain(x) + torch.tanh(checkpoint(self.recalled, x, use_reentrant=self.reentrant))


class RecalledTwice(nn.Module):
    """Parts that share a weight, each of them checkpointed: its gradient comes in two parts."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.parts[2].weight = self.parts[0].weight

    def forward(self, x):
        x = x.clone().requires_grad_()
        for part in self.parts:
            x = torch.tanh(checkpoint(part, x, use_reentrant=True))
        return x


class Stops(nn.Module):
    """Needs its parameter in backward once more, after that has its gradient."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return torch.tanh(x * self.scale.detach()) * self.scale


class Lists(nn.Module):
    """Parameters in lists and dictionaries, which are modules that nobody calls; and asks what parameters are like."""

    def __init__(self):
        super().__init__()
        self.list = nn.ParameterList([torch.ones(6, 4), torch.ones(4)])
        self.dict = nn.ParameterDict({"bias": torch.ones(4)})
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        one = torch.ones(self.linear.weight.shape[0], dtype=next(self.parameters()).dtype, device=self.dict.bias.device)
        return self.linear(x @ self.list[0] * self.list[1]) + self.dict["bias"] + one


class CallsItself(Scaled):
    def forward(self, x, depth=3):
        return super().forward(torch.tanh(self(x, depth - 1)) if depth else x)


class GoesOn(Between):
    """One of its parts fails, and it goes on without."""

    def forward(self, x):
        try:
            self.part(x[:, :3])
        except RuntimeError:
            return super().forward(x)


def plainly(model, x):
    return model(x).square().mean()


def with_evaluations_between(model, x):
    first, second = model(x), model(2 * x)
    with torch.no_grad():
        model.eval()(x)
    with torch.inference_mode():
        model(x)
    model.train()
    return (first * second).mean()


def recalled(model, x):
    return checkpoint(model, x, use_reentrant=False).square().mean()


def after_a_gradient_for_the_input(model, x):
    x = x.clone().requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    return plainly(model, x)


def part_by_part(model, x):
    """Not the whole model is called; and a part fails before."""
    model = getattr(model, "module", model)
    hidden = torch.tanh(model.before(x))
    try:
        model.part(hidden[:, :3])
    except RuntimeError:
        return model.after(torch.tanh(model.part(hidden))).square().mean()


CASES = {
    "object": (lambda: TakesObject(Result), plainly),
    "a dict of its own": (lambda: TakesObject(Named), plainly),
    "lends": (Borrower, plainly),
    "lends, and evaluations": (Borrower, with_evaluations_between),
    "keeps": (AsksKeeper, plainly),
    "keeps, and evaluations": (AsksKeeper, with_evaluations_between),
    "checkpoints inside": (lambda: Recalled(False), plainly),
    "reentrant checkpoints inside": (lambda: Recalled(True), plainly),
    "reentrant checkpoints of what is tied": (RecalledTwice, plainly),
    "checkpoint around": (lambda: Between(Scaled()), recalled),
    "detached": (lambda: Between(Stops()), plainly),
    "lists": (Lists, plainly),
    "calls itself": (lambda: Between(CallsItself()), plainly),
    "goes on": (lambda: GoesOn(Scaled()), plainly),
    "gradient for the input": (lambda: Between(Scaled()), after_a_gradient_for_the_input),
    "part by part": (lambda: Between(Scaled()), part_by_part),
}


def filled(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    module.double()
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2
    return module
