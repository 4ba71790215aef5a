"""Tensor parallelism: every rank has a part of each split layer, and all ranks work on the same batch.

`parallelize` splits a whole model by a plan, without a change to its code; `full_state_dict` puts the parts together
again. The split layers are in the other files of this folder.

Source: Shoeybi et al., "Megatron-LM" (2019); the plan is written as torch.distributed.tensor.parallel's is.
"""

from collections import defaultdict
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from .attention import ParallelAttention
from .checks import briefly, check_group
from .conv import ParallelConv2d
from .linear import ColumnParallelLinear, ParallelMLP, RowParallelLinear
from .on_part import OnPart
from .splitting import first_ranks_copy
from .transformer import ParallelTransformerBlock
from .vocabulary import VocabParallelEmbedding

STYLES = {  # name in a plan: (module, group) → split module
    "column": ColumnParallelLinear.from_module,
    "column, gathered": partial(ColumnParallelLinear.from_module, gather_output=True),
    "row": RowParallelLinear.from_module,
    "row, scattered": partial(RowParallelLinear.from_module, input_is_parallel=False),
    "mlp": ParallelMLP.from_module,
    "attention": ParallelAttention.from_module,
    "block": ParallelTransformerBlock.from_module,
    "vocabulary": VocabParallelEmbedding.from_module,
    "convolution, output channels": partial(ParallelConv2d.from_module, split="out"),
    "convolution, output channels, gathered": partial(ParallelConv2d.from_module, split="out", gather_output=True),
    "convolution, input channels": partial(ParallelConv2d.from_module, split="in"),
    "on a part": OnPart,
}


def parallelize(model, plan, group=None):
    """Split parts of `model` over the ranks of a group, in place; returns it.

    plan: {name of a module, or a pattern such as "layers.*.linear1": style}. A style is one of STYLES or anything
    that is called with (module, group) and returns what stands in its place. All values are those of the group's
    first rank: split ones are dealt out, what is not in the plan is broadcast. A parameter that two modules share
    stays shared. Sends at most the model's bytes from that rank, once.

    The model's own code runs unchanged, on fewer features between a "column" and a "row". So
    - a layer whose outputs are several things one after another, such as GPT-2's c_attn with q, k and v, would be cut
      across them: make it "column, gathered" and what comes after it "row, scattered"
    - heads should be counted by their width, x.view(b, s, -1, width_of_a_head): a rank has num_heads / n of them
    - what has parameters of its own, or drops, between the two, goes "on a part": each rank sees only a part there
    - dropout elsewhere draws from torch's global stream, which ranks must have seeded alike.

    Raises ValueError, before anything is changed, for a style or name that does not exist, for a module that two
    patterns give to different styles, that is inside another one of the plan, or that is split already, for one that
    its parent uses otherwise than by calling it, and for parameters shared between modules that are split differently.
    """
    check_group(group, "parallelize")
    chosen = _chosen(model, plan)
    shared = _shared_parameters(model)
    parts = {}
    for name, style in chosen.items():
        module = model.get_submodule(name)
        try:
            parts[name] = style(module, group)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
        if not isinstance(parts[name], nn.Module):
            raise ValueError(f"{name}: its style returned a {type(parts[name]).__name__}, a module is asked for")
    _keep_shared(model, shared, parts)
    for name, part in parts.items():
        model.set_submodule(name, part)
    for tensor in _not_split(model):
        tensor.data.copy_(first_ranks_copy(tensor, group))
    for module in model.modules():
        _close_short_cuts(module)
    return model


def full_state_dict(model):
    """The state dict of the unsplit model, on every rank: what its parts hold, put together. All ranks have to call
    it. A plain model loads it, and so does, by way of one, another number of ranks: load, then `parallelize`."""
    return {name: tensor.detach() for name, tensor in _whole(model)}


def full_gradients(model):
    """{name of a parameter of the unsplit model: its whole gradient}, zeros where there is none. All ranks call it."""
    saved = [(p, p.data) for p in model.parameters()]
    try:
        for p, data in saved:
            p.data = torch.zeros_like(data) if p.grad is None else p.grad.detach()
        return {name: t.detach().clone() for name, t in _whole(model) if isinstance(t, nn.Parameter)}
    finally:
        for p, data in saved:
            p.data = data


def _close_short_cuts(module):
    """In evaluation torch's transformer layers take the weights of their parts without calling them: not any more."""
    if any(hasattr(part, "to_module") for part in module.modules()):
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _not_split(module):
    """Every parameter and buffer outside the split modules; one that is shared comes as often as it is named."""
    if not hasattr(module, "to_module"):
        yield from [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for child in module.children():
            yield from _not_split(child)


def _whole(module, prefix=""):
    """(name, tensor) of everything in the state dict of the unsplit module."""
    if hasattr(module, "to_module"):
        yield from ((prefix + name, t) for name, t in module.to_module().state_dict(keep_vars=True).items())
        return
    own = {}
    module._save_to_state_dict(own, prefix, keep_vars=True)
    yield from own.items()
    for name, child in module.named_children():
        yield from _whole(child, f"{prefix}{name}.")


# ---- reading the plan -----------------------------------------------------------------------------------------


def _chosen(model, plan):
    """{module name: style as a function}, in the model's order."""
    _check_plan(plan)
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    chosen, by = {}, {}
    for pattern, style in plan.items():
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"no module is called {pattern!r}: the model has {', '.join(names[:20]) or 'none'}")
        for name in found:
            if name in chosen and plan[by[name]] != style:
                raise ValueError(f"{name}: {by[name]!r} says {plan[by[name]]!r}, but {pattern!r} says {style!r}")
            chosen[name], by[name] = style if callable(style) else STYLES[style], pattern
    for name in chosen:
        _check_parents(model, name, by)
    return {name: chosen[name] for name in names if name in chosen}


def _check_plan(plan):
    if not isinstance(plan, Mapping) or not all(isinstance(pattern, str) for pattern in plan):
        raise ValueError(f"a plan is a dict {{name of a module: style}}, not {plan!r}")
    for pattern, style in plan.items():
        if not callable(style) and style not in list(STYLES):
            raise ValueError(f"{pattern}: {style!r} is not one of the styles {', '.join(map(repr, STYLES))}")


def _check_parents(model, name, by):
    """by: {module name: the pattern of the plan that chose it}"""
    for i in range(1, name.count(".") + 1):
        parent = ".".join(name.split(".")[:i])
        module = model.get_submodule(parent)
        if parent in by:
            raise ValueError(f"{name} is inside {parent}, and the plan splits both ({by[name]!r}, {by[parent]!r})")
        if hasattr(module, "to_module"):
            raise ValueError(f"{name} is inside {parent}, which is split already: {briefly(module)}")
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        raise ValueError(
            f"{name}: nn.MultiheadAttention takes the weights of its parts without calling them: split the attention "
            "as a whole"
        )


# ---- parameters that modules share ----------------------------------------------------------------------------


def _shared_parameters(model):
    """[names of one parameter] for each parameter that has several."""
    names = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        names[p].append(name)
    return [several for several in names.values() if len(several) > 1]


def _keep_shared(model, shared, parts):
    """Let the split modules share what the unsplit ones shared."""

    def owner_of(name):
        owner = next((part for part in parts if name.startswith(f"{part}.")), None)
        return (model, name) if owner is None else (parts[owner], name.removeprefix(f"{owner}."))

    for names in shared:
        owners = [owner_of(name) for name in names]
        if all(owner is model for owner, _ in owners):
            continue
        ways = [(owner is model, getattr(owner, "split_dim", None)) for owner, _ in owners]
        found = [dict(owner.named_parameters(remove_duplicate=False)).get(name) for owner, name in owners]
        if len(set(ways)) > 1 or any(p is None or p.shape != found[0].shape for p in found):
            raise ValueError(f"{' and '.join(names)} are one parameter, and the plan does not split them the same way")
        for owner, name in owners:
            module, _, last = name.rpartition(".")
            setattr(owner.get_submodule(module), last, found[0])
