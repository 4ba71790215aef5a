"""Differentially private SGD: no single row can change what is learnt by much, and noise hides the little it can.

A step: every row takes part with probability `rate`, by its own throw of the dice (Poisson sampling). Each row's own
gradient is scaled down to a norm of at most `clip`. To their sum comes Gaussian noise of standard deviation
sigma · clip. What leaves the step is

    (Σ clipped gradients + noise) / (rate · rows)

divided by the *expected* number of rows that take part, since the true one depends on who took part. Removing one row
changes the sum by at most `clip`, whatever is in it; the noise is sigma times that. `epsilon` tells how much an
onlooker can learn of one row from all the steps, except with a probability of `delta`.

On ranks every rank holds its own rows and throws its own dice. Each adds noise of standard deviation
sigma · clip / √ranks: variances add up, so that the sum has the stated scale. The guarantee is about the *sum*: one
rank's own message has only its share of the noise. To hide that message too, sum with secure aggregation (and noise
made for whole numbers: Kairouz et al. 2021), and leave ranks that may collude out of the count in √ranks.

Sources: Abadi et al., "Deep Learning with Differential Privacy" (2016), algorithm 1; Mironov, "Rényi Differential
Privacy" (2017), Mironov et al., "Rényi Differential Privacy of the Sampled Gaussian Mechanism" (2019) for `epsilon`;
Goodfellow, "Efficient Per-Example Gradient Computations" (2015) for why per-row gradients need not cost b passes.
"""

import logging
import math
import secrets

import torch
import torch.distributed as dist
from torch.func import functional_call, grad, vmap

from ..group import rank_and_size
from .checks import check_rate, check_rows_apart, check_sigma


def private_gradient(model, loss, x, y, *, clip, sigma, expected, generator, group=None):
    """Put one step's gradient, with its noise, into every trainable parameter's `.grad`, the same on every rank.

    x, y       this rank's rows of this step (`poisson_rows` of its own), perhaps none
    clip       the largest norm of one row's gradient
    sigma      the noise on the *sum over all ranks* has the standard deviation sigma · clip, in each coordinate
    expected   rate · rows of all ranks: how many take part on average
    generator  this rank's own (`noise_generator`): the same on all ranks would make the noise √ranks times too large

    Returns this rank's norms before clipping, (b,): they are private too. All-reduces S bytes.
    Raises ValueError for sigma, clip or expected ≤ 0.
    """
    check_sigma(sigma)
    if not expected > 0:
        raise ValueError(f"expected is how many rows take part on average, above 0, not {expected}")
    _, n = rank_and_size(group)
    total, norms = clip_and_sum(per_sample_gradients(model, loss, x, y), clip)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scale = sigma * clip / math.sqrt(n)  # n ranks' noise adds up to sigma · clip
    flat = torch.cat([total[name].flatten() for name in trained])
    noise = torch.randn(flat.numel(), generator=generator, dtype=torch.float64)
    flat += (scale * noise).to(flat)
    dist.all_reduce(flat, group=group)
    flat /= expected
    for p, values in zip(trained.values(), flat.split([p.numel() for p in trained.values()]), strict=True):
        p.grad = values.view_as(p).clone()
    return norms


def per_sample_gradients(model, loss, x, y):
    """{name: (b, *shape)}: every row's own gradient of every trainable parameter. Sends nothing.

    model  without anything that mixes rows (BatchNorm), or there is no such thing as one row's gradient
    loss   loss(model(x), y) of a batch of one row; x, y: b rows, b may be 0

    Raises ValueError for a model that mixes rows by BatchNorm, or has nothing to train.
    """
    check_rows_apart(model)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    fixed |= dict(model.named_buffers())
    if not len(x):
        return {name: p.new_zeros(0, *p.shape) for name, p in trained.items()}

    def one_row(parameters, x, y):
        return loss(functional_call(model, parameters | fixed, (x.unsqueeze(0),)), y.unsqueeze(0))

    return vmap(grad(one_row), (None, 0, 0), randomness="different")(trained, x, y)


def clip_and_sum(gradients, clip):
    """({name: Σ over the rows of gradient · min(1, clip / norm)}, (b,) norms before). The norm is over all parameters.

    gradients: as from `per_sample_gradients`. Removing one row changes the sum by a norm of at most `clip`.
    """
    if not 0 < clip < math.inf:
        raise ValueError(f"clip is the largest norm that one row's gradient may have, above 0, not {clip}")
    rows = [g.flatten(1) if g.dim() > 1 else g[:, None] for g in gradients.values()]
    # in float64: in float32 the squares of a row of 1e-25 are 0, and it would not be clipped
    norms = torch.stack([torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for g in rows], 1).norm(dim=1)  # (b,)
    if not norms.isfinite().all():
        raise ValueError("a row's gradient is infinite or not a number: no clipping bounds that")
    scale = (clip / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1)
    clipped = {name: torch.einsum("b,b...->...", scale.to(g.dtype), g) for name, g in gradients.items()}
    return clipped, norms.to(rows[0].dtype)


def poisson_rows(rows, rate, generator=None):
    """The numbers of the rows that take part: each of them with probability `rate`, by itself. Often none."""
    check_rate(rate)
    return (torch.rand(rows, generator=generator, dtype=torch.float64) < rate).nonzero().flatten()


def noise_generator(seed=None, group=None):
    """A torch.Generator for noise and dice, another one on every rank. seed=None: from the operating system.

    A seed is for experiments only: who knows it can subtract the noise. (Even without one this is for learning: torch's
    generator is not made for secrecy, and the last bits of floating-point noise tell something, Mironov 2012.)
    """
    rank, n = rank_and_size(group)
    number = secrets.randbits(62) if seed is None else seed * n + rank
    return torch.Generator().manual_seed(number)


def epsilon(rate, sigma, steps, delta):
    """ε of (ε, δ)-differential privacy after so many steps, for one row added or removed; by dp-accounting.

    Rényi differential privacy of the Poisson-sampled Gaussian mechanism, converted as that library does today
    (Canonne, Kamath and Steinke 2020, proposition 12). Conversions differ: rate 150/60000, sigma 1.3, 6,000 steps, δ
    1e-5 give 0.7242 so, 0.9419 with Mironov's of 2017. It is an upper bound; other accountants find lower ones.

    Raises ValueError for rate, sigma, steps or delta that are out of range.
    """
    check_rate(rate)
    check_sigma(sigma)
    if not 0 < delta < 1:
        raise ValueError(f"delta is a probability between 0 and 1, and best far below 1 / rows, not {delta}")
    if not 0 <= steps < math.inf or steps != int(steps):
        raise ValueError(f"steps is a whole number, 0 or more, not {steps}")
    if not steps:
        return 0.0
    import dp_accounting  # takes a second

    accountant = dp_accounting.rdp.RdpAccountant()
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    log = logging.getLogger("absl")  # where the accountant reports every order that it leaves out
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        accountant.compose(step, int(steps))
        return float(accountant.get_epsilon(delta))
    finally:
        log.setLevel(level)
