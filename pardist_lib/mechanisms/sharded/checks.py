"""What would train wrongly without a word, refused: models that cannot be sharded, and what was done to one since."""

import torch

from ..collectives.agreement import check_same_model


def check_parameters(parameters, names, group=None):
    """Raise ValueError where a parameter cannot be sharded, or none is to be trained; and on every rank, where not all
    ranks have the same parameters."""
    for p, name in zip(parameters, names, strict=True):
        if hasattr(p, "full_shape"):
            raise ValueError(f"{name} is a shard already: a model is wrapped once, before any part of it is wrapped")
        if isinstance(p, torch.nn.parameter.UninitializedTensorMixin):
            raise ValueError(f"{name} has no shape yet: run one batch through the lazy module before sharding it")
        if p.is_meta:
            raise ValueError(
                f"{name} is on the meta device: give it memory first, with to_empty and its initial values"
            )
    check_same_model([*zip(names, parameters, strict=True)], group)


def check_trainable(parameters):
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            "no parameter requires a gradient: there is nothing to train, and a frozen model needs no wrapper"
        )


# ---- ShardedDataParallel ------------------------------------------------------------------------------------------


def check_module(wrapper, module, stage, group=None):
    """Raise ValueError where `wrapper`, a class, cannot wrap this module."""
    if stage not in (2, 3):
        also = ": stage 1 is ShardedOptimizer, around the optimizer of a plain model" if stage == 1 else ""
        raise ValueError(f"stage is 2 or 3, not {stage!r}{also}")
    if any(isinstance(m, wrapper) for m in module.modules()):
        raise ValueError("this module is wrapped already: wrap a model once, as a whole")
    named = dict(module.named_parameters())
    check_parameters(named.values(), named, group)
    check_trainable(named.values())


def check_dtypes(**dtypes):
    """The same. Raise ValueError where one is neither None nor floating point."""
    for name, dtype in dtypes.items():
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{name} is floating point, torch.bfloat16 say, or None, not {dtype!r}")
    return dtypes


def check_local_shards(flat):
    """Raise where something was done to a local shard that would be lost without a word."""
    begin, size = flat.shard.data_ptr(), flat.shard.element_size()
    for name, local, span in zip(flat.names, flat.local_shards, flat.spans, strict=True):
        if local.requires_grad != flat.trainable:
            raise ValueError(f"{name} was frozen or unfrozen after wrapping: set requires_grad before")
        if local._backward_hooks:
            raise ValueError(
                f"{name} has a hook of register_hook, which a shard never calls: register it before wrapping (it "
                "sees this rank's own gradient then), or use register_post_accumulate_grad_hook"
            )
        if local.numel() and local.data_ptr() != begin + (span.start or 0) * size:
            raise RuntimeError(
                f"the memory of {name} was replaced after wrapping (by p.data = …, or module.to(…)): change it in "
                "place, with p.copy_(…), or change the model first and then wrap it"
            )


def check_no_second_backward():
    """Stage 3: raise RuntimeError in a backward that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "stage 3 cannot tell when a backward with create_graph needs the parameters once more: use stage 2, or "
            "a plain model with ShardedOptimizer"
        )


def check_kept(unit, name):
    """Raise RuntimeError where backward has used a parameter of a unit that is not gathered, nor kept since forward."""
    if not unit.kept:
        raise RuntimeError(
            f"backward used {name} before it was gathered: {type(unit.module).__name__} returned a tensor "
            "where none is looked for. Return tensors in tuples, lists, dicts, or attributes of an object"
        )


# ---- ShardedOptimizer ---------------------------------------------------------------------------------------------

# What these do to one element depends on others: on a line search, on rows and columns, on a matrix's singular
# vectors, on a layer's norm, on which rows a gradient has.
NOT_ELEMENTWISE = set("LBFGS Adafactor Muon SparseAdam LAMB Lamb LARS Lars Shampoo DistributedShampoo SOAP".split())


def check_elementwise(optimizer_class):
    if not isinstance(optimizer_class, type):
        raise ValueError("optimizer_class is a class, torch.optim.AdamW say: give its options by name after it")
    if bad := [c.__name__ for c in optimizer_class.__mro__ if c.__name__ in NOT_ELEMENTWISE]:
        raise ValueError(
            f"{bad[0]} is not elementwise: its step for one element depends on others, which another rank may "
            "hold. Use SGD, Adam, AdamW, RMSprop, Adagrad or another elementwise optimizer"
        )


def check_unmoved(flat):
    """Raise RuntimeError where a parameter has other memory than the flat one since the optimizer was made."""
    begin, size = flat.unsharded.data_ptr(), flat.unsharded.element_size()
    for p, start in zip(flat.parameters, flat.starts, strict=True):
        if p.data_ptr() != begin + start * size and p.numel():
            raise RuntimeError(
                "a parameter's memory has been replaced since ShardedOptimizer was made (by model.to(…), or "
                "p.data = …): move and change the model first, then make the optimizer"
            )


def check_frozen(parameters):
    if any(p.requires_grad for p in parameters):
        raise RuntimeError("a parameter was unfrozen after ShardedOptimizer was made: set requires_grad before")
