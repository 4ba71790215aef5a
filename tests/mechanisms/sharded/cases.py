"""What the tests of sharding train: a model with everything awkward, and its data."""

import torch
from torch import nn

BATCH = 24  # rows that 1, 2, 3 and 4 ranks share evenly

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
}


class Model(nn.Module):
    """Blocks, a tied weight, a frozen layer, a frozen bias in a trained layer, one that nobody uses, a single number,
    a buffer; the same values on every rank."""

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 8)) for _ in range(2))
        self.frozen = nn.Linear(8, 8)
        self.unused = nn.Linear(18, 1)
        self.again = nn.Linear(6, 8)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("shift", torch.zeros(8))
        self.to(dtype)
        for tensor in [*self.parameters(), self.shift]:
            tensor.data = (torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / 3).to(dtype)
        self.again.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.blocks[1][0].bias.requires_grad_(False)

    def forward(self, x):
        y = self.first(x)
        for block in self.blocks:
            y = y + block(y)
        return self.scale * torch.tanh(self.frozen(y)) + self.again(x) + self.shift

    def weights(self):
        return [p for p in self.parameters() if p.dim() > 1]

    def others(self):
        return [p for p in self.parameters() if p.dim() <= 1]


def rows_of(step, dtype):
    return torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def loss_of(model, step, dtype, n=None, uneven=False):
    """The loss of this rank's rows of the step's batch; of all rows, where n is None. Uneven: rank 0 has one row, and
    losses are weighted so that their mean over ranks is the mean over rows."""
    x = rows_of(step, dtype)
    if n is None:
        return model(x).square().mean()
    rank = torch.distributed.get_rank()
    if not uneven or n == 1:
        return model(x[rank::n]).square().mean()
    share = x[:1] if rank == 0 else x[rank :: n - 1] if rank < n - 1 else x[n - 1 :: n - 1]
    return model(share).square().mean() * (n * len(share) / BATCH)


def close(got, expected, about):
    for name, value in expected.items():
        relative, absolute = (1e-10, 1e-12) if value.dtype == torch.float64 else (1e-5, 1e-6)
        gap = (got[name] - value).abs().max().item()
        assert torch.allclose(got[name], value, relative, absolute), f"{about}: {name} is off by {gap}"


def storages(tensors):
    """Bytes of the memory behind some tensors, each block once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}.values()
    )


def flat_parameters(model):
    """All flat parameters of a ShardedDataParallel, frozen ones too."""
    return [flat for unit in model._units for flat in unit.flat_parameters]
