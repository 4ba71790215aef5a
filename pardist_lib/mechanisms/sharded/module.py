"""ZeRO stages 2 and 3: gradients, and at stage 3 parameters too, live as shards; a layer is gathered when it is used.

What a rank holds all the time, Ψ parameters of 4 bytes, AdamW, n ranks (stage 1 is `ShardedOptimizer`):

                 parameters   gradients   optimizer state     sent in a step, S = 4Ψ bytes
    plain        4Ψ           4Ψ          8Ψ                  2·(n − 1)/n·S
    stage 1      4Ψ           4Ψ          8Ψ/n                2·(n − 1)/n·S
    stage 2      4Ψ           4Ψ/n        8Ψ/n                2·(n − 1)/n·S
    stage 3      4Ψ/n         4Ψ/n        8Ψ/n                3·(n − 1)/n·S

Besides, for a moment each: at stage 2 and 3 the gradient of a layer or two and room for as much from other ranks, at
stage 3 a layer or two themselves.
Sources: Rajbhandari et al., "ZeRO" (2020), sections 5 and 7; Zhao et al., "PyTorch FSDP" (2023).
"""

import torch
from torch import nn
from torch.autograd import Variable

from ..collectives.agreement import take_from_first
from ..group import rank_and_size
from .async_collectives import AsyncCollectives
from .flat_parameter import (
    UsedParameters,
    call_when_accumulated,
    check_parameters,
    check_trainable,
    clip_sharded_grad_norm_,
)
from .optimizer import ShardedOptimizer
from .state import check_origin, copied, cut_state, full_optimizer_state, load_full_optimizer_state
from .units import RESHARDED, SHARDED, UNSHARDED, in_backward, make_units, next_unit, returned_tensors

__all__ = ["ShardedDataParallel", "ShardedOptimizer"]


class ShardedDataParallel(nn.Module):
    """`module` with its gradients (stage 2), or its gradients and parameters (stage 3), sharded over `group`.

        model = ShardedDataParallel(model, stage=3)
        optimizer = torch.optim.AdamW(model.parameters())    # after wrapping: it sees this rank's local_shards only

    units                   what is gathered, and freed, as one: a list of submodules, or a class or tuple of classes;
                            by default each child that has parameters and a forward, and each entry of Sequential,
                            ModuleList and ModuleDict. Parameters outside of units, or in two of them (tied), are a
                            unit with the whole module.
    reshard_after_forward   stage 3: free a unit after its forward and gather it again for its backward. False keeps
                            it until then: 2·(n − 1)/n·S a step, and the memory of all parameters. The whole
                            module's own unit is always kept.
    prefetch                stage 3: gather the next unit while this one computes
    overlap                 True: compute on while a flat is on its way; False: wait for each
    find_unused_parameters  True where ranks may have gradients for different parameters (see `UsedParameters`); they
                            are then reduced at the end of backward. At stage 3 all ranks run the same units anyhow.

    Any elementwise optimizer works as on a plain model, parameter groups and schedulers too; one that is not (see
    NOT_ELEMENTWISE in optimizer.py) would compute something else. All parameters and buffers start as the
    group's first rank has them; afterwards each rank's buffers are its own. Gradients are means over the ranks, right
    where they have equally many samples (else weight each rank's loss by n·its samples / all samples); a backward adds
    to what is there, so gradients accumulate as ever.

    Outside of forward and backward the module's attributes are the local_shards, flat ones: sort them into groups by name or
    by len(p.full_shape), not by p.dim(). Clip gradients with `clip_grad_norm_` below and scale losses with
    mixed_precision.LossScaler: torch's own see this rank's local_shards only. Code that uses a unit's parameters without
    calling the unit has to name a larger unit. Change local_shards by hand at stage 2: call `refresh` afterwards. Stage 3 has
    no backward with create_graph.

    Sends in a step, where n divides: stage 2 (n − 1)/n·S in backward and as much at the beginning of the forward that
    follows; stage 3 (n − 1)/n·S in forward, twice that in backward. In the first step 4 bytes a parameter besides.

    Raises ValueError for another stage, for a module that is wrapped already or has nothing to train, for parameters
    that differ between ranks other than in their values, for units that are not parts of the module.
    """

    def __init__(self, module, stage=3, group=None, *, units=None, reshard_after_forward=True, prefetch=True,
                 overlap=True, find_unused_parameters=False):  # fmt: skip
        super().__init__()
        if stage not in (2, 3):
            also = ": stage 1 is ShardedOptimizer, around the optimizer of a plain model" if stage == 1 else ""
            raise ValueError(f"stage is 2 or 3, not {stage!r}{also}")
        if any(isinstance(m, ShardedDataParallel) for m in module.modules()):
            raise ValueError("this module is wrapped already: wrap a model once, as a whole")
        names, parameters = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())
        check_parameters(parameters, names, group)
        check_trainable(parameters)
        self.module, self.stage, self.group = module, stage, group
        self.reshard, self.prefetch = stage == 3 and reshard_after_forward, stage == 3 and prefetch
        self._units = make_units(module, units, group, keep_whole=stage == 2)
        take_from_first(list(module.buffers()), group)
        self._flat_parameters = [flat for unit in self._units for flat in unit.flat_parameters]
        self._trained = [flat for flat in self._flat_parameters if flat.trainable]
        self._used = UsedParameters([n for flat in self._trained for n in flat.names], find_unused_parameters, group)
        self._collectives, self._overlap = AsyncCollectives(group, apart=overlap), overlap
        self._order, self._running, self._inside = list(self._units), [], []
        self._stale, self._backward, self._sent, self._done = False, False, [], []
        module.register_load_state_dict_post_hook(lambda *_: self.refresh())
        for unit in self._units:
            unit.module.register_forward_pre_hook(lambda _, __, unit=unit: self._before_forward(unit), prepend=True)
            unit.module.register_forward_hook(
                lambda _, __, output, unit=unit: self._after_forward(unit, output), always_call=True
            )  # also where it fails, or where checkpointing stops it early
            for flat in unit.flat_parameters if unit.trains else ():
                for i, p in enumerate(flat.parameters if flat.trainable else ()):
                    call_when_accumulated(p, self._has_gradient, unit, flat, i)
            if stage == 3:
                unit.free()
            unit.show(SHARDED)

    # ---- forward ----------------------------------------------------------------------------------------------

    def forward(self, *args, **kwargs):
        try:
            return self.module(*args, **kwargs)
        except BaseException:
            if not in_backward():  # there it is how checkpointing ends, once it has what it needs
                self._reset()
            raise

    def _before_forward(self, unit):
        if not self._inside and not in_backward():
            self._begin()
        self._inside.append(unit)
        self._ready(unit)
        unit.show(UNSHARDED)
        if not in_backward():
            if self.prefetch and (after := next_unit(self._order, unit)):
                self._gather(after)
            self._running.append(unit)

    def _after_forward(self, unit, output):
        if self._inside[-1:] != [unit]:
            return  # it did not begin
        self._inside.pop()
        if in_backward():  # checkpointing runs it once more: its backward is still to come
            return
        found = list(returned_tensors(output))
        outputs = [t for t in found if t.grad_fn is not None]
        for t in outputs:
            t.register_hook(lambda _: self._before_backward(unit))
        unit.awaited = bool(outputs)
        if unit not in self._inside:
            unit.show(RESHARDED)
            if self.stage == 3:
                self._reshard(unit, found, outputs)
        if not self._inside:
            self._order, self._running = self._running, []
            for other in self._units:
                other.show(SHARDED)
                other.wait()
                if self.stage == 3 and other not in self._order:
                    other.free()  # it was gathered in advance, and then not used

    def _reshard(self, unit, found, outputs):
        """Free a unit after its forward, unless its memory is used on: by whom it lent a parameter, by what it computed
        and keeps for itself, where no hook tells when it is needed again."""
        training = torch.is_grad_enabled()
        hides = training and not outputs and (unit.trains or not found)
        if hides or unit.lends(found):
            unit.kept = unit.kept or training
        elif not training or self.reshard and unit is not self._units[0]:
            unit.free()

    def _begin(self):
        """At the beginning of the outermost forward."""
        self._reset()
        for flat in self._flat_parameters:
            flat.check_local_shards()
        for unit in self._units:
            unit.show(RESHARDED)
        if self._stale:
            for unit in self._units:
                self._gather(unit)
            # as long as local_shards have gradients, an optimizer may change them
            self._stale = any(p.grad is not None for flat in self._trained for p in flat.local_shards)

    def _reset(self):
        """Forget a forward or backward that was not finished, and what is left gathered from an earlier forward."""
        for unit in self._units:
            unit.wait()
            unit.show(SHARDED)
            if self.stage == 3:
                unit.free()
        if self._backward:
            for flat in self._trained:
                flat.gradient, flat.arrived = None, set()
        self._inside, self._running, self._backward, self._sent, self._done = [], [], False, [], []

    # ---- backward ---------------------------------------------------------------------------------------------

    def _before_backward(self, unit):
        if self.stage == 3 and torch.is_grad_enabled():
            raise RuntimeError(
                "stage 3 cannot tell when a backward with create_graph needs the parameters once more: use stage 2, or "
                "a plain model with ShardedOptimizer"
            )
        self._at_the_end()
        unit.awaited = False
        for done in self._done:  # what ran after this unit in forward, and not around it, has nothing left to compute
            if unit.module not in done.parts:
                done.free()
        self._done = [done for done in self._done if unit.module in done.parts]
        self._ready(unit)
        unit.show(UNSHARDED)  # a part of it may be checkpointed, and run once more
        if self.prefetch and (before := next_unit(self._order[::-1], unit)) and before.awaited:
            self._gather(before)

    def _at_the_end(self):
        if not self._backward:
            self._backward = True
            Variable._execution_engine.queue_callback(self._after_backward)

    @torch.no_grad()
    def _has_gradient(self, unit, flat, i):
        if self.stage == 3 and not unit.kept and (unit.coming or not unit.gathered):
            raise RuntimeError(
                f"backward used {flat.names[i]} before it was gathered: {type(unit.module).__name__} returned a tensor "
                "where none is looked for. Return tensors in tuples, lists, dicts, or attributes of an object"
            )
        self._at_the_end()
        flat.take(i)
        if not self._used.every_step and all(
            len(n.arrived) == len(n.parameters) for n in unit.flat_parameters if n.trainable
        ):
            if self.stage == 3:
                self._done.append(unit)
            for n in unit.flat_parameters:
                if n.trainable:
                    self._reduce(n)

    def _reduce(self, flat):
        self._sent.append((flat, self._collectives.reduce_scatter(flat.take_gradient(), flat.sizes)))
        if not self._overlap:
            self._sent[-1][1].result()

    @torch.no_grad()
    def _after_backward(self):
        reduced = {flat for flat, _ in self._sent}
        used = [flat in reduced or i in flat.arrived for flat in self._trained for i in range(len(flat.parameters))]
        if any(used) or self._used.every_step:  # else it was torch.autograd.grad, for inputs
            anyone = iter(self._used.agree(used, self._trained[0].unsharded.device))
            anyone = {flat: [next(anyone) for _ in flat.parameters] for flat in self._trained}
            for flat in self._trained:
                if any(anyone[flat]) and (flat not in reduced or flat.arrived):
                    self._reduce(flat)
            for flat, sent in self._sent:
                flat.add_gradient(sent.result(), anyone[flat])
            self._stale = self.stage == 2
        self._sent, self._done, self._backward = [], [], False
        self._collectives.let_go()  # what it holds would be as much as two layers, all the time
        for unit in self._units:
            unit.wait()
            unit.show(SHARDED)
            unit.kept = False
            if self.stage == 3:
                unit.free()

    # ---- gathering --------------------------------------------------------------------------------------------

    def _gather(self, unit):
        """Start to gather a unit, unless it is gathered (at stage 2: unless nothing has changed)."""
        if not unit.coming and (self._stale if self.stage == 2 else not unit.gathered):
            for flat in unit.flat_parameters:
                if self.stage == 3:
                    flat.allocate()
                unit.coming.append(self._collectives.all_gather(flat.unsharded, flat.shard, flat.sizes))
            unit.gathered = True
            if not self._overlap:
                unit.wait()

    def _ready(self, unit):
        if self.stage == 3:
            self._gather(unit)
        unit.wait()

    def _apply(self, fn, recurse=True):
        raise RuntimeError("shards stay where they are: move or convert the model first, then wrap it")

    def __getstate__(self):
        raise TypeError("a wrapped model cannot be copied or pickled: copy the model before, or save full_state_dict()")

    def refresh(self):
        """Stage 2: the next forward gathers the parameters, whose local_shards were changed by hand. On every rank."""
        self._stale = self.stage == 2

    # ---- clipping, state dicts --------------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm, norm_type=2.0):
        """As torch.nn.utils.clip_grad_norm_ of the whole gradient; returns its norm, the same on every rank."""
        return clip_sharded_grad_norm_(list(self.parameters()), max_norm, self.group, norm_type)

    def sharded_state_dict(self):
        """This rank's local_shards, and the buffers, by the module's own names. Sends nothing."""
        rank, n = rank_and_size(self.group)
        return {"rank": rank, "world_size": n, "state": {k: copied(v) for k, v in self.module.state_dict().items()}}

    def load_sharded_state_dict(self, state_dict):
        """What `sharded_state_dict` gave on this rank, in a world of this size; else ValueError."""
        check_origin(state_dict, self.group)
        self.module.load_state_dict(state_dict["state"])

    @torch.no_grad()
    def full_state_dict(self):
        """The plain module's state dict, whole, on every rank, one unit after the other; buffers are this rank's. Every
        rank has to call it."""
        self._reset()
        whole = {}
        for unit in self._units:
            self._gather(unit)
            unit.wait()
            for flat in unit.flat_parameters:
                whole |= {
                    id(local_shard): p.detach().clone()
                    for local_shard, p in zip(flat.local_shards, flat.parameters, strict=True)
                }
            if self.stage == 3:
                unit.free()
        state = self.module.state_dict(keep_vars=True)
        return {k: whole[id(v)] if id(v) in whole else copied(v) for k, v in state.items()}

    @torch.no_grad()
    def load_full_state_dict(self, state_dict):
        """A plain module's state dict, each rank taking its local_shards. Sends nothing. ValueError where it does not fit."""
        self.module.load_state_dict(cut_state(state_dict, self.module.state_dict(keep_vars=True)))

    def full_optimizer_state_dict(self, optimizer):
        """The state of an optimizer of these local_shards, whole, as one process would save it. On every rank.
        `optimizer.state_dict` is this rank's only, and fits no other rank."""
        return full_optimizer_state(optimizer, self.group)

    def load_full_optimizer_state_dict(self, optimizer, state_dict):
        """One process's optimizer state, or `full_optimizer_state_dict` of a world of any size. Sends nothing."""
        load_full_optimizer_state(optimizer, state_dict)
