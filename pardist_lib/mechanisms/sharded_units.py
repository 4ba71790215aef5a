"""The parts of a sharded module: what is gathered and freed as one.

Source: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023), section 3.
"""

import torch
from torch import nn

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

    def wait(self):
        for coming in self.coming:
            coming.result()
        self.coming = []

    def free(self):
        self.wait()
        self.gathered = False
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


def next_unit(order, unit):
    """The one that comes after `unit` in `order`, or None."""
    at = order.index(unit) + 1 if unit in order else len(order)
    return order[at] if at < len(order) else None


def in_backward():
    """Whether autograd is at work on this thread."""
    return torch._C._current_graph_task_id() != -1
