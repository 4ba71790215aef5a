"""A small model with everything that makes trouble, and what several tests ask of it."""

import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import in_world

STEPS = 20
OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.05),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
}


class Net(nn.Module):
    """A weight that two layers share, a frozen layer, one that nobody uses, one that some ranks use, and a buffer."""

    def __init__(self, seed, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name in ("fc1", "fc2", "again", "frozen", "unused", "extra"):
            layer = nn.Linear(6, 6, dtype=dtype)
            for p in layer.parameters():
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) / 2
            self.add_module(name, layer)
        self.again.weight = self.fc2.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.randn((), generator=generator, dtype=torch.float64).to(dtype))

    def forward(self, x, with_extra=False):
        x = self.frozen(torch.tanh(self.again(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))))
        return self.scale * (self.extra(x) if with_extra else x)


def loss_of(net, x, with_extra=False):
    return net(x, with_extra).square().sum(1).mean()


def gradient_of(net, x, with_extra=False):
    net.zero_grad()
    if len(x):
        loss_of(net, x, with_extra).backward()


def state(net):
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def same(got, want, relative=1e-10, absolute=1e-10, what=""):
    assert got.keys() == want.keys()
    for name in want:
        close = torch.allclose(got[name], want[name], relative, absolute)
        assert close, f"{what} {name} is off by {(got[name] - want[name]).abs().max():.2g}"


def fails(ranks, why, make, n=4):
    def refused():
        try:
            make(dist.get_rank())
        except ValueError as error:
            return str(error)

    said = ranks.run(in_world, n, refused, quiet=True)[:n]
    assert all(text and why in text for text in said), said
