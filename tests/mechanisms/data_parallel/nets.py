"""A network, its batches, and trainings with and without a wrapper, for the tests of data parallelism."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from pardist_lib.lessons.worlds import in_world

WORLDS = [1, 2, 3, 4]


TINY = 1e-4  # MB, about 100 bytes: many buckets


class Net(nn.Module):
    """A weight used twice, a frozen layer, BatchNorm where asked for, and layers that are used when told to."""

    def __init__(self, seed=0, dtype=torch.float64, norm=False):
        super().__init__()
        self.fc1, self.fc2, self.again = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.frozen, self.extra, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        numbers = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=numbers, dtype=torch.float64) / 2
        self.again.weight = self.fc2.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("shift", torch.full((8,), float(seed)))
        self.to(dtype)

    def forward(self, x, extra=True):
        x = self.norm(torch.tanh(self.fc1(x)))  # a bias before it would have no gradient
        x = self.frozen(torch.tanh(self.again(torch.tanh(self.fc2(x))))) + 0.01 * self.shift
        return self.out(self.extra(x) if extra else x)


def batch(step, rows=12, dtype=torch.float64):
    numbers = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(rows, 6, generator=numbers, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 5, (rows,), generator=numbers)


def optimizer_of(name, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(parameters, lr=0.01)


def state(model):
    return {name.removeprefix("module."): t.detach().clone() for name, t in model.state_dict().items()}


def gradients(model):
    return {name.removeprefix("module."): p.grad if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()}  # fmt: skip


def same(got, want, dtype=torch.float64, what=""):
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    assert got.keys() == want.keys()
    for name in want:
        if want[name] is None or got[name] is None:
            assert got[name] is None and want[name] is None, f"{what} {name}"
        else:
            torch.testing.assert_close(got[name], want[name], **tolerance, msg=lambda t, n=name: f"{what} {n}: {t}")


def within(n, fn, *args, **kwargs):
    return in_world(n, lambda: fn(*args, **kwargs))


def on_all(results, n):
    """The results of the n ranks of a smaller world, which all have to be equal."""
    for result in results[1:n]:
        same(result, results[0])
    return results[0]


def one_step(kind, dtype, **options):
    model = Net(seed=dist.get_rank(), dtype=dtype)  # the ranks begin differently
    model = kind(model, **options)
    x, y = batch(0, dtype=dtype)
    x, y = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in (x, y))
    x.requires_grad_()
    output = model(x)
    loss = cross_entropy(output, y)
    loss.backward()
    return output.detach(), loss.detach(), x.grad, gradients(model)


def train(kind, name, norm=False, rows=12, clip=None, steps=20, **options):
    model = kind(Net(seed=dist.get_rank(), norm=norm), **options)
    optimizer, (rank, n) = optimizer_of(name, model), (dist.get_rank(), dist.get_world_size())
    for step in range(steps):
        x, y = (t.tensor_split(n)[rank] for t in batch(step, rows))
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        if rows % n:
            loss = loss * model.weight(len(x))
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return state(model)


def train_alone(name, norm=False, rows=12, clip=None, steps=20):
    model = Net(norm=norm)
    optimizer = optimizer_of(name, model)
    for step in range(steps):
        x, y = batch(step, rows)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return state(model)


def trainable_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
