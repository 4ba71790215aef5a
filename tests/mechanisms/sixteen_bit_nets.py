"""A model for 16 bits: what shares a weight, is frozen or unused; a convolution, a norm and a softmax; its batches."""

import torch
from torch import nn
from torch.nn import functional as F

BF16, F16 = torch.bfloat16, torch.float16


class Net(nn.Module):
    """A weight used twice, a frozen layer, one that nobody uses; linear layers, a convolution, norm and softmax."""

    def __init__(self, seed=0):
        super().__init__()
        self.fc1, self.fc2, self.again = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.conv, self.frozen, self.unused = nn.Conv1d(1, 2, 3), nn.Linear(16, 16), nn.Linear(3, 3)
        self.out = nn.Linear(28, 5)
        numbers = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=numbers) / 3
        self.again.weight = self.fc2.weight
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.fc1(x))
        x = self.frozen(F.relu(self.again(torch.tanh(self.fc2(x)))))
        return self.out(self.conv(x[:, None]).flatten(1))


def batch(step, rows=24):
    numbers = torch.Generator().manual_seed(100 + step)
    return torch.randn(rows, 12, generator=numbers), torch.randint(0, 5, (rows,), generator=numbers)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
