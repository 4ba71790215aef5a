"""The parts of a sharded module: what is gathered and freed as one.

Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023), section 3.
"""

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .flat_parameter import FlatParameter

UNSHARDED, SHARDED, RESHARDED = range(3)  # what a module's attribute shows of a parameter


class Resharded(nn.Parameter):
    """Stands for a parameter during a forward, while its unit is not being called: a local_shard in its place might fit by
    accident. It tells what it is, and refuses to be computed with."""

    ABOUT = {getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "is_complex")} | {
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_leaf", "is_cuda", "is_sparse")
    }

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in cls.ABOUT:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise RuntimeError(
            "a parameter is used in a forward without calling the unit it belongs to, so it is not gathered: name a "
            "larger unit that has both, ShardedDataParallel(…, units=[…]); units=[] makes the whole model one"
        )


class Unit:
    """A module whose own parameters are gathered and freed as one: a flat for each dtype, device, frozen or not."""

    def __init__(self, module, flats, places):
        self.module, self.flat_parameters, self.places, self.parts = module, flats, places, set(module.modules())
        self.trains = any(flat.trainable for flat in flats)
        self.gathered, self.coming, self.awaited = True, [], False
        self.kept = False  # its memory is used until the end of backward, by whom is not known

    def show(self, face):
        """Let the module's attributes be the whole parameters, this rank's local_shards, or what stands for them."""
        for owner, name, faces in self.places:
            if all(owner._parameters.get(name) is not known for known in faces):
                raise RuntimeError(
                    f"{name} of {type(owner).__name__} was replaced after wrapping (by assign=True, or an assignment): "
                    "change the module first, then wrap it; load values with load_full_state_dict"
                )
            owner._parameters[name] = faces[face]

    def wait(self):
        for coming in self.coming:
            coming.result()
        self.coming = []

    def free(self):
        self.wait()
        self.gathered = False
        for flat in self.flat_parameters if not self.kept else ():
            flat.free()

    def lends(self, tensors):
        """Whether one of these is a parameter of the unit, or a view of one."""
        flats = {
            flat.unsharded.untyped_storage()._cdata for flat in self.flat_parameters
        }  # not data_ptr: fake tensors have none
        return any(t.layout == torch.strided and t.untyped_storage()._cdata in flats for t in tensors)


def make_units(module, chosen, group, keep_whole):
    """The units, the whole module's own one first."""
    parts = list(dict.fromkeys([module, *_chosen(module, chosen)]))
    inside = {}  # module: the innermost unit that it is in
    for part in sorted(parts, key=lambda m: -sum(1 for _ in m.modules())):
        inside |= dict.fromkeys(part.modules(), part)
    places, names = {}, {p: name for name, p in module.named_parameters()}
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                places.setdefault(p, []).append((m, name))
    homes = {p: {inside[m] for m, _ in where} for p, where in places.items()}
    units = []
    for part in parts:
        kinds, shown = {}, []
        for p in names:
            if homes[p] == {part} or part is module and len(homes[p]) > 1:
                kinds.setdefault((p.dtype, p.device, p.requires_grad), []).append(p)
        flats = [FlatParameter(ps, [names[p] for p in ps], group, keep_whole) for ps in kinds.values()]
        for flat in flats:
            for p, local_shard in zip(flat.parameters, flat.local_shards, strict=True):
                away = Resharded(p.detach(), requires_grad=p.requires_grad)
                shown += [(m, name, (p, local_shard, away)) for m, name in places[p]]
        if part is module or flats:
            units.append(Unit(part, flats, shown))
    return units


def _chosen(module, units):
    if units is None:
        return [m for m in _children(module) if any(True for _ in m.parameters())]
    if isinstance(units, type) or isinstance(units, tuple) and all(isinstance(u, type) for u in units):
        return [m for m in module.modules() if isinstance(m, units) and m is not module and _is_called(m)]
    known, units = set(module.modules()), list(units)
    for m in units:
        if not isinstance(m, nn.Module) or m not in known:
            raise ValueError(f"units are submodules of the module, or their class; {type(m).__name__} is not in it")
        if not _is_called(m):
            raise ValueError(f"a unit is gathered when it is called, and {type(m).__name__} never is: name its parts")
    return [m for m in units if m is not module]


def _children(module):
    for child in module.children():
        if isinstance(child, nn.Sequential) or not _is_called(child):
            yield from _children(child)
        else:
            yield child


def _is_called(module):
    """Whether it has a forward; ModuleList, ModuleDict, ParameterList and ParameterDict have none."""
    return type(module).forward is not nn.Module.forward


def returned_tensors(output, seen=None):
    """The tensors that a module has returned: in containers, and in the attributes of what else it returns."""
    seen = set() if seen is None else seen
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, (dict, list, tuple, set, frozenset)):  # a subclass, or one that pytrees do not know
            yield from returned_tensors(list(leaf.values() if isinstance(leaf, dict) else leaf), seen)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield from returned_tensors(dict(vars(leaf)), seen)


def next_unit(order, unit):
    """The one that comes after `unit` in `order`, or None."""
    at = order.index(unit) + 1 if unit in order else len(order)
    return order[at] if at < len(order) else None


def in_backward():
    """Whether autograd is at work on this thread."""
    return torch._C._current_graph_task_id() != -1
