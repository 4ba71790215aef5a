"""Parameters of which this rank has a part, and those whose place they took: what would go wrong without a word.

Three mistakes leave no trace in torch: an optimizer that was made before its model was split goes on to step parameters
that the model no longer uses; torch's norm of gradients sees one rank's parts only; torch.distributed.checkpoint, and
one file for all ranks, keep one rank's parts. They are looked for where they are made, in an optimizer's step, in
torch.nn.utils and in state dicts; a forward or backward pays nothing for it.
"""

import functools
import weakref
from typing import NamedTuple

import torch
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["SavedPart", "has_part", "load_parts", "replaced", "save_parts"]

_after = WeakTensorKeyDictionary()  # {parameter: [weak references to those that took its place]}
_before = WeakTensorKeyDictionary()  # the other way round
_parts = WeakTensorKeyDictionary()  # {parameter: _Part}
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


class _Part(NamedTuple):
    of: weakref.ref
    clip: str
    place: tuple | None
    save: str


def has_part(parameter, of, clip, place=None, save=""):
    """Of the gradient of `parameter` this rank has a part, as long as `of` lives, a module or optimizer: the norms of
    torch.nn.utils refuse it, and name `clip`.

    place: which part of the parameter itself this rank has, None where it has all of it; save: what saves all parts.
    """
    _parts[parameter] = _Part(weakref.ref(of), clip, place, save)
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
        _watch_state(optimizer, held)
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
    for p, part in list(_parts.items()):
        if part.of() is not None and (id(p) in given or p.grad is not None and id(p.grad) in given):
            raise RuntimeError(
                "each rank has only a part of these, so torch's norm would be another one on each rank, and they would "
                f"clip differently: call {part.clip}"
            )


# ---- state dicts --------------------------------------------------------------------------------------------------


class SavedPart(torch.Tensor):
    """What a state dict has of a parameter, or of a momentum of it: a tensor as any other, that knows whose part it is.

    `load_state_dict` takes it where the same part belongs; torch.distributed.checkpoint refuses it.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return _like(result, args[0]) if func in _COPIES and isinstance(args[0], cls) else result

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), self.clone())

    def __create_write_items__(self, name, _):
        raise RuntimeError(
            f"{name} is this rank's part only, and torch.distributed.checkpoint would keep one rank's for the whole: "
            f"save {self.save}"
        )

    def __create_chunk_list__(self):
        raise RuntimeError(f"torch.distributed.checkpoint does not know the parts of this one: load {self.save}")


_COPIES = {getattr(torch.Tensor, name) for name in ("clone", "contiguous", "cpu", "cuda", "detach", "to")}
torch.serialization.add_safe_globals([SavedPart])  # torch.load takes it with weights_only=True


def _like(tensor, part):
    tensor = tensor.as_subclass(SavedPart)
    tensor.place, tensor.save = part.place, part.save
    return tensor


def save_parts(module, state, prefix=""):
    """Let a module's state dict tell which of its own entries are parts."""
    for key, p in _own_entries(module, state, prefix):
        if not isinstance(state[key], torch.nn.Parameter):  # keep_vars
            state[key] = _like(state[key], _parts[p])


def load_parts(module, state, prefix=""):
    """The way back: plain tensors. Raises ValueError where another rank's part would be loaded."""
    for key, p in _own_entries(module, state, prefix):
        state[key] = _plain(state[key], p, key)


def _own_entries(module, state, prefix):
    own = ((prefix + name, p) for name, p in module._parameters.items())
    return [(key, p) for key, p in own if key in state and p in _parts and _parts[p].place is not None]


def _plain(value, p, name):
    if not isinstance(value, SavedPart):
        return value
    if value.place != _parts[p].place:
        raise ValueError(
            f"{name} in this state dict is another rank's part, or of another number of ranks: each rank loads what it "
            f"has saved, in a file of its own, or all of them {value.save}"
        )
    return value.as_subclass(torch.Tensor)


def _watch_state(optimizer, held):
    """As save_parts and load_parts, for the state of an optimizer: it has one for each element of a parameter."""
    if not any(_parts[p].place is not None for p in held if p in _parts):
        return

    def save(_, state):
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            if i in state["state"] and p in _parts:
                own = state["state"][i].items()
                state["state"][i] = {k: _like(v, _parts[p]) if _is_each(k, v, p) else v for k, v in own}

    def load(_=None):
        for p, values in optimizer.state.items():
            values.update({k: _plain(v, p, k) for k, v in values.items() if p in _parts})

    load()  # what was loaded before the first step
    if not getattr(optimizer, "_tells_parts", False):
        optimizer._tells_parts = True
        optimizer.register_state_dict_post_hook(save)
        optimizer.register_load_state_dict_post_hook(load)


def _is_each(name, value, p):
    return name != "step" and isinstance(value, torch.Tensor) and value.shape == p.shape
