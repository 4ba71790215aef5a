"""What tests of split layers share: numbers, and gradients beside one process."""

import torch
import torch.distributed as dist

from pardist_lib.mechanisms.tensor_parallel import (
    full_gradients,
)

CLOSE = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 1e-6)}


def seeded(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got, wanted, what):
    relative, absolute = CLOSE[wanted.dtype]
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    said = f"rank {dist.get_rank()}, {what}"
    torch.testing.assert_close(
        got, wanted, rtol=relative, atol=absolute * scale, msg=lambda text: f"{said}: {text}"
    )  # fmt: skip


def same_gradients(model, plain, what):
    """Every parameter's gradient of the split model, put together, beside the unsplit model's."""
    whole = full_gradients(model)
    named = dict(plain.named_parameters(remove_duplicate=False))
    assert list(whole) == list(named), what
    for name, p in named.items():
        close(whole[name], torch.zeros_like(p) if p.grad is None else p.grad, f"{what}: gradient of {name}")


def weights_like(y):
    """Something to multiply an output with, so that its gradient is not the same everywhere."""
    return torch.linspace(-0.2, 0.2, y.numel(), dtype=y.dtype).view_as(y)
