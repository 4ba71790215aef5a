"""The parts of a sharded module: what is gathered and freed as one, and who moves it.

Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023), section 3.
"""

from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import _world

from .flat_shards import FlatShards

CONTAINERS = nn.Sequential, nn.ModuleList, nn.ModuleDict


class Unit:
    """A module whose own parameters are gathered and freed as one: a line for each dtype, device, frozen or not."""

    def __init__(self, module, lines, places):
        self.module, self.lines, self.places = module, lines, places
        self.trains = any(line.trainable for line in lines)
        self.gathered, self.coming, self.awaited = True, [], False

    def show(self, whole):
        """Let the module's attributes be the whole parameters, or this rank's pieces."""
        for owner, name, parameter, piece in self.places:
            owner._parameters[name] = parameter if whole else piece

    def free(self):
        for coming in self.coming:
            coming.result()
        self.coming, self.gathered = [], False
        for line in self.lines:
            line.free()


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
        lines = [FlatShards(ps, [names[p] for p in ps], group, keep_whole) for ps in kinds.values()]
        for line in lines:
            for p, piece in zip(line.whole, line.pieces, strict=True):
                shown += [(m, name, p, piece) for m, name in places[p]]
        if part is module or lines:
            units.append(Unit(part, lines, shown))
    return units


def _chosen(module, units):
    if units is None:
        return [m for m in _children(module) if any(True for _ in m.parameters())]
    if isinstance(units, type) or isinstance(units, tuple) and all(isinstance(u, type) for u in units):
        return [m for m in module.modules() if isinstance(m, units) and m is not module]
    known, units = set(module.modules()), list(units)
    for m in units:
        if not isinstance(m, nn.Module) or m not in known:
            raise ValueError(f"units are submodules of the module, or their class; {type(m).__name__} is not in it")
    return [m for m in units if m is not module]


def _children(module):
    for child in module.children():
        if isinstance(child, CONTAINERS):
            yield from _children(child)
        else:
            yield child


# ---- moving lines beside the computation ----------------------------------------------------------------------


class Courier:
    """Moves lines one after another in a thread of its own, over a process group of its own, so that the main
    thread can compute meanwhile. `send(function, *args)` returns something whose `result()` waits for it.

    Every rank has to send the same things in the same order. overlap=False: in the main thread, at once.
    """

    def __init__(self, group=None, overlap=True):
        self.group, self.thread = group, None
        if overlap and dist.get_world_size(group) > 1 and dist.get_backend(group) != "nccl":
            self.group = _own_group(group)
            self.thread = ThreadPoolExecutor(1, "courier")

    def send(self, function, *args):
        if self.thread:
            return self.thread.submit(function, *args, self.group)
        return _Done(function(*args, self.group))


class _Done:
    def __init__(self, value):
        self.value = value

    def result(self):
        return self.value


def _own_group(group):
    """A second process group of the same ranks, made once: its threads and connections live as long as the process.

    dist.new_group would have to be called by ranks outside of the group too, or numbers its groups differently on
    ranks that have made different ones before; so this does what it does, under a name of the group's own.
    """
    group = group or dist.group.WORLD
    name = f"{group.group_name}.courier"
    if _own_groups.get(name) not in _world.pg_map:
        backend, store = _world.pg_map[group]
        members = dist.get_process_group_ranks(group)
        rank, backend = dist.get_rank(group), dist.Backend(backend)
        own, _ = distributed_c10d._new_process_group_helper(
            len(members), rank, members, backend, store, name, timeout=distributed_c10d._get_default_timeout(backend)
        )
        _world.pg_group_ranks[own] = {member: i for i, member in enumerate(members)}
        _own_groups[name] = own
    return _own_groups[name]


_own_groups = {}
