"""What would let the ranks train different models, or a wrong one, without a word.

Each of these functions is named for what has to hold; `DataParallel` calls it in one line, and it raises where that
does not.
"""

import sys
import weakref
from functools import partial

import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from .batches import tensors_with_rows

# ---- when a module is wrapped ---------------------------------------------------------------------------------------


def buckets_have_a_size(**sizes):
    for name, mb in sizes.items():
        if not mb > 0:
            raise ValueError(f"{name} is a size above 0, not {mb}: 1e-6 puts every gradient in a bucket of its own")


def only_steps_change_weights(module):
    """An embedding with max_norm changes its weight in forward."""
    for name, m in module.named_modules():
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None:
            raise ValueError(
                f"{name or 'the module'} has max_norm={m.max_norm}: forward changes the weight, on each rank for its "
                "own rows, and the ranks would drift apart. Use max_norm=None"
            )


def averaged_once(module, *wrappers):
    """No part of the module is wrapped already, and no other wrapper that is alive averages its parameters."""
    for name, m in module.named_modules():
        if isinstance(m, wrappers):
            raise ValueError(f"{name or 'the module'} is a {type(m).__name__} already: its gradients are averaged once")
    for hooks in (p._post_accumulate_grad_hooks or {} for p in module.parameters()):
        for key, hook in list(hooks.items()):
            if getattr(hook, "func", None) is not _arrived:
                continue
            if hook.args[0]():
                raise ValueError("another DataParallel averages these parameters already: use it, or unwrap() it first")
            del hooks[key]  # one that is gone


def something_to_train(module):
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"{type(module).__name__} has no trainable parameters: there is no gradient to average")


# ---- forward --------------------------------------------------------------------------------------------------------


def every_rank_has_rows(batch, group):
    """Judged by the batch's first tensor. The mean over no rows is NaN, and would be in every rank's gradients."""
    if any(not len(t) for t in tensors_with_rows(batch)[:1]):
        raise ValueError(
            f"rank {dist.get_rank(group)} has no rows: this batch is smaller than the {dist.get_world_size(group)} "
            "ranks. `for batch, weight in model.join(batches)` gives a rank without rows the weight 0"
        )


def no_parameter_is_new(module, names):
    parameters = (p for m in module.modules() for p in m._parameters.values() if p is not None)
    if any(p not in names and p.requires_grad and p.is_leaf for p in parameters):
        late = [name for name, p in module.named_parameters() if p.requires_grad and p not in names]
        raise RuntimeError(
            f"{late[0]} is to be trained, but was not when the module was wrapped: each rank would train its own. "
            "Wrap after this change: DataParallel(model.unwrap())"
        )


# ---- backward -------------------------------------------------------------------------------------------------------


def hook_of(wrapper):
    """`wrapper._arrived` as a hook: without keeping the wrapper alive, as the parameters otherwise would."""
    return partial(_arrived, weakref.ref(wrapper))


def _arrived(wrapper, p):
    if not (alive := wrapper()):
        raise RuntimeError("the DataParallel that averages this gradient is gone: keep it, or unwrap() the module")
    alive._arrived(p)


def backward_is_whole():
    """A reentrant checkpoint runs a backward of its own for a part of the model."""
    frame = sys._getframe()
    while frame and frame.f_code is not CheckpointFunction.backward.__code__:
        frame = frame.f_back
    if frame:
        raise RuntimeError(
            "a checkpoint runs a backward within backward, and neither sees all gradients: use "
            "checkpoint(…, use_reentrant=False)"
        )


def fits_in_bucket(gradient, p, names):
    if gradient.is_sparse:
        raise RuntimeError(f"the gradient of {names[p]} is sparse, which does not fit in a bucket: use sparse=False")
    if gradient.requires_grad:
        raise RuntimeError(
            "backward(create_graph=True): the mean over ranks could not be differentiated. Take such gradients with "
            "torch.autograd.grad(…, create_graph=True)"
        )


def can_be_waited_for(end):
    if not callable(end):
        raise TypeError(
            f"comm_hook returned {end!r:.40}: a function that waits for the sum is asked for, or `lambda: None` where "
            "nothing is left to wait for"
        )


def all_reached(unused, names, group):
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        first = next(name for p, name in names.items() if p in unused)
        raise RuntimeError(
            f"{first}{more} got no gradient on rank {dist.get_rank(group)}: this backward does not reach every "
            "parameter. Freeze what is never used before wrapping, or pass find_unused_parameters=True"
        )


def nobody_took_gradients(place, unused, names):
    """place: {p: (bucket, view)}. Where p.grad is something else by now, the mean goes where nobody looks."""
    if lost := [p for p, (_, view) in place.items() if p.grad is not view and p not in unused]:
        raise RuntimeError(
            f"a hook has taken or replaced the gradient of {names[lost[0]]} before it was averaged. An optimizer that "
            "averages by itself can leave it: ShardedOptimizer(…, reduce_gradients=False)"
        )
