"""The experts, and tokens going through them."""

import torch
from torch import nn
from torch.nn import functional as F


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), the MLP of Mixtral and DeepSeek (SwiGLU; Shazeer, 2020). (…, hidden) → the same."""

    def __init__(self, hidden, ffn, bias=False, *, device=None, dtype=None):
        super().__init__()
        where = {"bias": bias, "device": device, "dtype": dtype}
        self.gate, self.up = nn.Linear(hidden, ffn, **where), nn.Linear(hidden, ffn, **where)
        self.down = nn.Linear(ffn, hidden, **where)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def mlp(hidden, ffn, gated=False, bias=True, device=None, dtype=None):
    """An expert: a `GatedMLP`, or two linear layers with a GELU between them."""
    if gated:
        return GatedMLP(hidden, ffn, bias, device=device, dtype=dtype)
    where = {"bias": bias, "device": device, "dtype": dtype}
    return nn.Sequential(nn.Linear(hidden, ffn, **where), nn.GELU(), nn.Linear(ffn, hidden, **where))


def through_experts(experts, rows, counts):
    """Each expert's share of `rows` through it. rows: (visits, hidden), expert after expert; counts: visits to each.

    One product after the other, in any dtype; torch.nn.functional.grouped_mm does them in one kernel. An expert without
    a visit is called, too, with no rows: its gradients are then zeros on every rank, as they are in one process.
    """
    return torch.cat([expert(part) for expert, part in zip(experts, rows.split(counts), strict=True)])
