"""What mixed precision refuses."""

import math

import torch


def check_precision(dtype, device="cpu"):
    """Raise ValueError where `dtype` is neither float16 nor bfloat16, or where the device cannot train with it."""
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{dtype!r} is not a precision for this: torch.float16 or torch.bfloat16")
    if (device := torch.device(device)).type == "meta":
        return
    other = "bfloat16, which needs no loss scale" if dtype == torch.float16 else "float16 with a LossScaler"
    try:
        _try(dtype, device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0][:120]
        raise ValueError(f"{device} cannot compute in {dtype} ({why}): use {other}, or float32") from None


def _try(dtype, device):  # a layer, forward and backward
    with torch.inference_mode(False), torch.enable_grad():
        w = torch.ones(8, 8, dtype=dtype, device=device, requires_grad=True)
        (torch.ones(8, 8, dtype=dtype, device=device) @ w).sum().backward()


def check_scaler(init_scale, growth_factor, backoff_factor, growth_interval):
    if not (math.isfinite(init_scale) and 0 < float32(init_scale) < math.inf):
        raise ValueError(f"init_scale is what the loss is multiplied by, above 0 and finite, not {init_scale}")
    if not 1 < growth_factor < math.inf:
        raise ValueError(f"growth_factor is above 1, or the scale would not grow, not {growth_factor}")
    if not 0 < backoff_factor < 1:
        raise ValueError(f"backoff_factor is between 0 and 1, or the scale would not fall, not {backoff_factor}")
    if not isinstance(growth_interval, int) or growth_interval < 1:
        raise ValueError(f"growth_interval is a number of good steps, 1 or more, not {growth_interval!r}")


def check_unscaling(scale, gradients):
    if not scale:
        raise RuntimeError(
            "the scale has fallen to 0: the gradients were infinite or NaN at any scale, so it is not the precision"
        )
    if any(g.dtype == torch.float16 for g in gradients):
        raise ValueError(
            "these gradients are float16: unscaled there, the small ones would be lost after all. Keep float32 "
            "parameters under autocast, or wrap the model in MasterWeights and give the optimizer its parameters()"
        )


def float32(number):
    """The nearest float32, as a Python number: the scale is kept as torch keeps it."""
    return torch.tensor(float(number), dtype=torch.float64).float().item()
