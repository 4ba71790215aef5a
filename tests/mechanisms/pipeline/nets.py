"""What the tests of the pipeline train, and the oracle: the same layers in one process."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.pipeline import Pipeline
from pardist_lib.mechanisms.pipeline.stages import draws

WORDS, WIDTH = 11, 6


def seeded(layers, dtype=torch.float64):
    """The same values on every rank, whatever the modules drew when they were made."""
    generator = torch.Generator().manual_seed(0)
    for p in nn.Sequential(*layers).to(dtype).parameters():
        p.data = (torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2).to(dtype)
    return layers


def rows_of(rows, seed=0, dtype=torch.float64, width=WIDTH):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def words_of(rows, seed=0, length=5):
    return torch.randint(WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def mlp(layers, dtype=torch.float64):
    """Every third layer has no parameters."""
    return seeded([nn.Tanh() if i % 3 == 1 else nn.Linear(WIDTH, WIDTH) for i in range(layers)], dtype)


def linears(layers, width=WIDTH, dtype=torch.float64):
    return seeded([nn.Linear(width, width) for _ in range(layers)], dtype)


def language_model(layers, dtype=torch.float64, dropout=0.0):
    """An embedding, blocks, and a head with the embedding's weight; four layers at least."""
    layers = max(4, layers)
    blocks = [nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(dropout))]
    blocks += [nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout, batch_first=True) for _ in range(layers - 3)]
    made = [nn.Embedding(WORDS, WIDTH), *blocks, nn.Linear(WIDTH, WORDS, bias=False)]
    made[-1].weight = made[0].weight
    return seeded(made, dtype)


def word_loss(logits, words, reduction="mean"):
    return nn.functional.cross_entropy(logits.flatten(0, -2).double(), words.flatten(), reduction=reduction)


# ---- one process ----------------------------------------------------------------------------------------------


def called(layers, x, seed=None, i=0):
    for number, layer in enumerate(layers):
        if seed is None:
            x = layer(x)
        else:
            with draws(seed, number, i):
                x = layer(x)
    return x


def one_process(layers, x, target, loss, m=1, *, seed=None, scale=1.0, reduction="mean"):
    """A step of one process: the whole batch at once; micro-batch after micro-batch where x is a list of them, or where
    dropout is told which one it is in."""
    xs, targets = (v if isinstance(v, list) else [v] if seed is None else list(v.tensor_split(m)) for v in (x, target))
    rows = [len(x[0] if isinstance(x, tuple) else x) for x in xs]
    total = 0.0
    for i, (x, target) in enumerate(zip(xs, targets, strict=True)):
        weight = rows[i] / sum(rows) if reduction == "mean" else 1.0
        part = scale * weight * loss(called(layers, x, seed, i), target)
        if torch.is_grad_enabled():
            part.backward()
        total += part.detach()
    return total


# ---- ours beside it -------------------------------------------------------------------------------------------


def case(
    what, build, schedule, *batches, loss=nn.functional.mse_loss, options=None, between=None, context=None, **near
):
    """A training to compare. build: () → layers; batches: (x, target) or (x, target, step's options) of each step;
    options: Pipeline's; between(layers, step): changes the layers before a step; context: () → what a step runs in."""
    near = near or {"rtol": 1e-10, "atol": 1e-10}
    kept = what, build, schedule, batches, loss, options or {}, between, context, near
    return SimpleNamespace(**dict(zip(_FIELDS, kept, strict=True)))


_FIELDS = ("what", "build", "schedule", "batches", "loss", "options", "between", "context", "near")


def beside_one_process(cases):
    """On a rank: loss and gradients after every step of every case, without zero_grad in between."""
    for c in cases:
        plain, layers = c.build(), c.build()
        pipeline = Pipeline(layers, c.schedule, c.loss, **c.options)
        reduction = {"reduction": c.options.get("reduction", "mean")}
        for number, (x, target, *how) in enumerate(c.batches):
            how = how[0] if how else {}
            for net in (plain, layers):
                if c.between:
                    c.between(net, number)
            with c.context() if c.context else torch.enable_grad():
                wanted = one_process(plain, x, target, c.loss, c.schedule.micro_batches, **how, **reduction)
                got = stepped(pipeline, x, target, **how)
            where = f"{c.what}, step {number}, rank {dist.get_rank()} of {dist.get_world_size()}"
            close(got, wanted, f"{where}: loss", **c.near)
            same_gradients(pipeline, plain, where, **c.near)


def stepped(pipeline, x, target, **how):
    """A step that is given input and target where they are needed only."""
    home, rank = pipeline.schedule.rank_of, dist.get_rank(pipeline.group)
    return pipeline.step(x if home[0] == rank else None, target if home[-1] == rank else None, **how)


def same_gradients(pipeline, plain, where, **near):
    named = dict(nn.Sequential(*plain).named_parameters(remove_duplicate=False))
    for name, p in pipeline.named_parameters(remove_duplicate=False):
        right = named[name].grad
        assert (p.grad is None) == (right is None), f"{where}: {name} has {p.grad}, one process has {right}"
        if right is not None:
            close(p.grad, right, f"{where}: gradient of {name}", **near)


def close(got, wanted, what, **near):
    torch.testing.assert_close(got, wanted, **near, msg=lambda text: f"{what}: {text}")


def agree(ranks_of, p, cases, ranks=4):
    ranks_of(ranks).run(in_world, p, beside_one_process, cases, quiet=True)
