"""The parts of a sharded module that are gathered and freed as one.

Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023), section 3.
"""

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..collectives.parts import replaced
from .flat_parameter import FlatParameter

# What a module's attribute is instead of a parameter that was sharded. UNSHARDED: the parameter, whole, while its unit
# computes. SHARDED: this rank's part, outside of forward and backward. RESHARDED: neither, in the rest of a forward.
UNSHARDED, SHARDED, RESHARDED = range(3)


class Unit:
    """A module whose own parameters are gathered and freed as one, in a flat parameter for each dtype and device, and
    for frozen ones.

    places: [(module, attribute, (parameter, local shard, what stands for it when resharded))]; collectives: its
    AsyncCollectives; frees: stage 3, its memory is given back when it is resharded; reshards: after every forward, not
    only after those without gradients.
    """

    def __init__(self, module, flat_parameters, places, collectives, frees, reshards):
        self.module, self.parts, self.places = module, set(module.modules()), places
        self.flat_parameters, self.collectives, self.frees = flat_parameters, collectives, frees
        self.trained = [flat for flat in flat_parameters if flat.trainable]
        self.gathered, self.coming = True, []  # coming: the all-gathers under way
        self.reshards = reshards
        self.awaited = False  # its backward is still to come
        self.held = False  # as long as no_reshard says: neither freed nor gathered again
        self.kept = False  # memory that something unknown uses: not freed until backward is over

    def gather(self):
        """Start to all-gather the parameters, unless that is under way or, at stage 3, they are there."""
        if self.coming or self.frees and self.gathered:
            return
        for flat in self.flat_parameters:
            if self.frees:
                flat.allocate()
            self.coming.append(self.collectives.all_gather(flat.unsharded, flat.shard, flat.sizes))
        self.gathered = True

    def wait(self):
        if self.coming:
            for coming in self.coming:
                coming.result()
            self.coming = []

    def unshard(self):
        """Before it computes, forward and backward: all parameters, whole."""
        if self.frees:
            self.gather()
        self.wait()
        self.show(UNSHARDED)

    def reshard(self):
        """After it has computed: give the memory of the whole parameters back (stage 3)."""
        if self.frees and not self.held:
            self.wait()
            self.gathered = False
            for flat in self.flat_parameters if not self.kept else ():
                flat.free()

    def reshard_after_forward(self, returned, differentiable):
        """Reshard it until its backward, or until its next forward, unless its memory is used on.
        returned: the tensors that the forward has returned; differentiable: those with a backward to come."""
        self.awaited = bool(differentiable)
        self.show(RESHARDED)
        if self.frees and not self._is_used_on(returned, differentiable):
            if self.reshards or not torch.is_grad_enabled():
                self.reshard()

    def rest(self, reshard=True):
        """Outside of forward and backward: this rank's shards."""
        self.wait()
        self.show(SHARDED)
        if reshard:
            self.reshard()

    def show(self, face):
        """Let the module's attributes be one of UNSHARDED, SHARDED, RESHARDED."""
        for owner, name, faces in self.places:
            if all(owner._parameters.get(name) is not known for known in faces):
                raise RuntimeError(
                    f"{name} of {type(owner).__name__} was replaced after wrapping (by assign=True, or an assignment): "
                    "change the module first, then wrap it; load values with load_full_state_dict"
                )
            owner._parameters[name] = faces[face]

    def _is_used_on(self, returned, differentiable):
        """Whether its memory is needed after this forward, and no hook will tell when: as it has returned a parameter,
        or a view of one, or kept what has a backward for itself. Then it is not freed before the end of backward."""
        training = torch.is_grad_enabled()
        hides = training and not differentiable and (self.trained or not returned)
        used = bool(hides or self._lends(returned))
        self.kept = self.kept or used and training
        return used

    def _lends(self, tensors):
        """Whether one of these tensors is a parameter of the unit, or a view of one."""
        memory = {
            flat.unsharded.untyped_storage()._cdata for flat in self.flat_parameters
        }  # fake tensors have no data_ptr
        return any(t.layout == torch.strided and t.untyped_storage()._cdata in memory for t in tensors)


class Resharded(nn.Parameter):
    """Stands for a parameter in a forward while its unit is not called: a local shard in its place might fit by
    accident. It tells what the parameter is like, and refuses to be computed with."""

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


def cast_tensors(inputs, dtype):
    """A module's inputs with those that are floating point in `dtype`."""
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def returned_tensors(output):
    """[the tensors that a module has returned]: in containers, and in the attributes of what else it returns."""
    return list(_tensors(output, set()))


def _tensors(output, seen):
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, (dict, list, tuple, set, frozenset)):  # a subclass, or one that pytrees do not know
            yield from _tensors(list(leaf.values() if isinstance(leaf, dict) else leaf), seen)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield from _tensors(dict(vars(leaf)), seen)


# ---- which parts are units ----------------------------------------------------------------------------------------


def make_units(module, chosen, group, collectives, frees, reshards, **dtypes):
    """The units, the whole module's own one first, which is kept from forward to backward. chosen: as `units` of
    ShardedDataParallel; dtypes: as of FlatParameter; the others: as of Unit."""
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
        flat_parameters = [
            FlatParameter(ps, [names[p] for p in ps], group, not frees, **dtypes) for ps in kinds.values()
        ]
        for flat in flat_parameters:
            for p, local in zip(flat.parameters, flat.local_shards, strict=True):
                replaced(p, local)
                resharded = Resharded(p.detach(), requires_grad=p.requires_grad)
                shown += [(m, name, (p, local, resharded)) for m, name in places[p]]
        if part is module or flat_parameters:
            units.append(Unit(part, flat_parameters, shown, collectives, frees, reshards and part is not module))
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
