"""Vectors of clients, and their sum as secure aggregation rounds it."""

import torch

N, D = 8, 33  # clients; numbers in a vector


def vector(client, size=D, scale=1.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(client), dtype=torch.float64) * scale


def rounded_sum(clients, size=D, bits=16):
    return sum((vector(c, size) * 2**bits).round() for c in clients) / 2**bits
