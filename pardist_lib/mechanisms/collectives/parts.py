"""Parameters of which this rank has a part, and those whose place they took: what would go wrong without a word.

Two mistakes leave no trace in torch: an optimizer that was made before its model was split goes on to step parameters
that the model no longer uses, and torch's norm of gradients sees one rank's parts only. Both are looked for where they
are made, in an optimizer's step and in torch.nn.utils; a forward or backward pays nothing for it.
"""

import functools
import weakref

import torch
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["has_part", "replaced"]

_after = WeakTensorKeyDictionary()  # {parameter: [weak references to those that took its place]}
_before = WeakTensorKeyDictionary()  # the other way round
_parts = WeakTensorKeyDictionary()  # {parameter: (what clips its gradient, weak reference to what it is part of)}
_replacements = 0


def replaced(old, new):
    """A module computes with the parameter `new` from now on, in the place of `old`. Both stay valid: what is refused
    is to step `old` when it has no gradient, but `new` has one."""
    global _replacements
    _replacements += 1
    for p in [old, *_alive(_before, old)]:
        _after[p] = [weakref.ref(q) for q in [*_alive(_after, p), new]]
        _before[new] = [weakref.ref(q) for q in [*_alive(_before, new), p]]
    _watch()


def has_part(parameter, of, instead):
    """Of the gradient of `parameter` this rank has a part, as long as `of` lives, a module or optimizer: the norms of
    torch.nn.utils refuse it, and name `instead`."""
    _parts[parameter] = instead, weakref.ref(of)
    _watch()


def _alive(table, p):
    return [q for q in (ref() for ref in table.get(p, ())) if q is not None]


@functools.cache
def _watch():
    """Once, in a process that splits a model at all."""
    register_optimizer_step_pre_hook(_check_step)
    norm = torch.nn.utils.get_total_norm

    @functools.wraps(norm)
    def checked(tensors, *args, **kwargs):
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        _check_norm(tensors)
        return norm(tensors, *args, **kwargs)

    # torch has no hook here. By the first name clip_grad_norm_ calls it, wherever that was imported from
    clip_grad._get_total_norm = torch.nn.utils.get_total_norm = checked


# ---- an optimizer that was made too early -------------------------------------------------------------------------

_harmless = weakref.WeakKeyDictionary()  # {optimizer: (its groups, replacements) when it held nothing replaced}


def _check_step(optimizer, *_):
    """torch calls it before each step of any optimizer. Its parameters are looked through again only when it has more
    groups, or more has been replaced."""
    if torch.compiler.is_compiling():
        return
    now = len(optimizer.param_groups), _replacements
    if _harmless.get(optimizer) == now:
        return
    held = [p for group in optimizer.param_groups for p in group["params"]]
    after = [(p, q) for p in held for q in _alive(_after, p)]
    if not after:
        _harmless[optimizer] = now
    ours = {id(p) for p in held}
    lost = {id(p) for p, q in after if p.grad is None and q.grad is not None and id(q) not in ours}
    if lost:
        raise RuntimeError(
            f"{len(lost)} of this optimizer's {len(held)} parameters are no longer the model's: it was made before the "
            "model was split, and would change nothing. Make it afterwards, of the new model.parameters()"
        )


# ---- torch's norms ------------------------------------------------------------------------------------------------


def _check_norm(tensors):
    given = {id(t) for t in tensors}
    for p, (instead, of) in list(_parts.items()):
        if of() is not None and (id(p) in given or p.grad is not None and id(p.grad) in given):
            raise RuntimeError(
                "each rank has only a part of these, so torch's norm would be another one on each rank, and they would "
                f"clip differently: call {instead}"
            )
