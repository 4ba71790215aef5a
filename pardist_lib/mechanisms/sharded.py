"""ZeRO stages 2 and 3: gradients, and at stage 3 parameters too, live as shards; a layer is gathered when it is used.

What a rank holds all the time, Ψ parameters of 4 bytes, AdamW, n ranks (stage 1 is `ShardedOptimizer`):

                 parameters   gradients   optimizer state     sent in a step, S = 4Ψ bytes
    plain        4Ψ           4Ψ          8Ψ                  2·(n − 1)/n·S
    stage 1      4Ψ           4Ψ          8Ψ/n                2·(n − 1)/n·S
    stage 2      4Ψ           4Ψ/n        8Ψ/n                2·(n − 1)/n·S
    stage 3      4Ψ/n         4Ψ/n        8Ψ/n                3·(n − 1)/n·S

Besides, for a moment each: at stage 2 and 3 the gradient of a layer or two, at stage 3 a layer or two themselves.
Sources: Rajbhandari et al., "ZeRO" (2020), sections 5 and 7; Zhao et al., "PyTorch FSDP" (2023).
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from .courier import Courier
from .flat_shards import (
    UsedParameters,
    call_when_accumulated,
    check_origin,
    check_parameters,
    clip_sharded_grad_norm_,
    cut_piece,
    full_optimizer_state,
    load_full_optimizer_state,
)
from .point_to_point import place
from .sharded_optimizer import ShardedOptimizer
from .sharded_units import in_backward, make_units, next_unit

__all__ = ["ShardedDataParallel", "ShardedOptimizer"]


class ShardedDataParallel(nn.Module):
    """`module` with its gradients (stage 2), or its gradients and parameters (stage 3), sharded over `group`.

        model = ShardedDataParallel(model, stage=3)
        optimizer = torch.optim.AdamW(model.parameters())    # after wrapping: it sees this rank's pieces only

    units                   what is gathered, and freed, as one: a list of submodules, or a class or tuple of classes;
                            by default each child with parameters, and each entry of Sequential, ModuleList and
                            ModuleDict. Parameters outside of units, or in two of them (tied), are a unit with the
                            whole module.
    reshard_after_forward   stage 3: free a unit after its forward and gather it again for its backward. False keeps
                            it until then: 2·(n − 1)/n·S a step, and the memory of all parameters. The whole
                            module's own unit is always kept.
    prefetch                stage 3: gather the next unit while this one computes
    overlap                 move lines beside the computation (see courier.py)
    find_unused_parameters  True where ranks may have gradients for different parameters (see `UsedParameters`); they
                            are then reduced at the end of backward. At stage 3 all ranks run the same units anyhow.

    Any elementwise optimizer works as on a plain model, parameter groups and schedulers too. All parameters and
    buffers start as the group's first rank has them. Gradients are means over the ranks, right where they have
    equally many samples (else weight each rank's loss by n·its samples / all samples); a backward adds to what is
    there, so gradients accumulate as ever. Outside of forward and backward the module's attributes are the pieces;
    code that uses a unit's parameters without calling the unit has to name a larger unit. Change pieces by hand at
    stage 2: call `refresh` afterwards.

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
        self.module, self.stage, self.group = module, stage, group
        self.reshard, self.prefetch = stage == 3 and reshard_after_forward, stage == 3 and prefetch
        self._units = make_units(module, units, group, keep_whole=stage == 2)
        first = dist.get_process_group_ranks(group or dist.group.WORLD)[0]
        for buffer in module.buffers():
            dist.broadcast(buffer, first, group)
        self._lines = [line for unit in self._units for line in unit.lines]
        self._trained = [line for line in self._lines if line.trainable]
        self._used = UsedParameters([n for line in self._trained for n in line.names], find_unused_parameters, group)
        self._courier = Courier(group, overlap)
        self._order, self._running, self._depth = list(self._units), [], 0
        self._stale, self._backward, self._sent = False, False, []
        self.register_load_state_dict_post_hook(lambda *_: self.refresh())
        for unit in self._units:
            unit.module.register_forward_pre_hook(lambda _, __, unit=unit: self._before_forward(unit), prepend=True)
            unit.module.register_forward_hook(lambda _, __, output, unit=unit: self._after_forward(unit, output))
            for line in unit.lines if unit.trains else ():
                for i, p in enumerate(line.whole if line.trainable else ()):
                    call_when_accumulated(p, self._has_gradient, unit, line, i)
            if stage == 3:
                unit.free()
            unit.show(whole=False)

    # ---- forward ----------------------------------------------------------------------------------------------

    def forward(self, *args, **kwargs):
        try:
            return self.module(*args, **kwargs)
        except BaseException:
            self._reset()
            raise

    def _before_forward(self, unit):
        if self._depth == 0 and not in_backward():
            self._begin()
        self._depth += 1
        self._ready(unit)
        unit.show(whole=True)
        if not in_backward():
            if self.prefetch and (after := next_unit(self._order, unit)):
                self._gather(after)
            self._running.append(unit)

    def _after_forward(self, unit, output):
        self._depth -= 1
        unit.show(whole=False)
        if in_backward():  # checkpointing runs it once more: its backward is still to come
            return
        outputs = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
        for t in outputs:
            t.register_hook(lambda _: self._before_backward(unit))
        unit.awaited = bool(outputs)
        hidden = torch.is_grad_enabled() and not outputs and unit.trains  # in an object that we cannot look into
        if self.stage == 3 and not hidden:
            if not torch.is_grad_enabled() or self.reshard and unit is not self._units[0]:
                unit.free()
        if self._depth == 0:
            self._order, self._running = self._running, []
            for other in self._units:
                other.wait()
                if self.stage == 3 and other not in self._order:
                    other.free()  # it was gathered in advance, and then not used

    def _begin(self):
        """At the beginning of the outermost forward."""
        self._reset()
        if any(p.requires_grad != line.trainable for line in self._lines for p in line.pieces):
            raise ValueError("a parameter was frozen or unfrozen after wrapping: set requires_grad before")
        if self._stale:
            for unit in self._units:
                self._gather(unit)
            # as long as pieces have gradients, an optimizer may change them
            self._stale = any(p.grad is not None for line in self._trained for p in line.pieces)

    def _reset(self):
        """Forget a forward or backward that was not finished, and what is left gathered from an earlier forward."""
        for unit in self._units:
            unit.wait()
            unit.show(whole=False)
            if self.stage == 3:
                unit.free()
        if self._backward:
            for line in self._trained:
                line.gradient, line.taken = None, set()
        self._depth, self._running, self._backward, self._sent = 0, [], False, []

    # ---- backward ---------------------------------------------------------------------------------------------

    def _before_backward(self, unit):
        self._at_the_end()
        unit.awaited = False
        self._ready(unit)
        if self.prefetch and (before := next_unit(self._order[::-1], unit)) and before.awaited:
            self._gather(before)

    def _at_the_end(self):
        if not self._backward:
            self._backward = True
            Variable._execution_engine.queue_callback(self._after_backward)

    def _has_gradient(self, unit, line, i):
        self._at_the_end()
        line.take(i)
        if not self._used.every_step and all(len(n.taken) == len(n.whole) for n in unit.lines if n.trainable):
            if self.stage == 3 and all(n.trainable for n in unit.lines):
                unit.free()
            for n in unit.lines:
                if n.trainable:
                    self._reduce(n)

    def _reduce(self, line):
        if len(self._sent) > 1:
            self._sent[-2][1].result()  # no more than two gradients of units wait to be sent
        self._sent.append((line, self._courier.reduce_scatter(line.gradient_line(), line.sizes)))

    def _after_backward(self):
        reduced = {line for line, _ in self._sent}
        used = [line in reduced or i in line.taken for line in self._trained for i in range(len(line.whole))]
        anyone = iter(self._used.agree(used, self._trained[0].line.device))
        anyone = {line: [next(anyone) for _ in line.whole] for line in self._trained}
        for line in self._trained:
            if any(anyone[line]) and (line not in reduced or line.taken):
                self._reduce(line)
        for line, sent in self._sent:
            line.add_gradient(sent.result(), anyone[line])
        self._sent, self._backward, self._stale = [], False, self.stage == 2
        for unit in self._units if self.stage == 3 else ():
            unit.wait()
            unit.free()

    # ---- gathering --------------------------------------------------------------------------------------------

    def _gather(self, unit):
        """Start to gather a unit, unless it is gathered (at stage 2: unless nothing has changed)."""
        if not unit.coming and (self._stale if self.stage == 2 else not unit.gathered):
            for line in unit.lines:
                if self.stage == 3:
                    line.allocate()
                unit.coming.append(self._courier.all_gather(line.line, line.shard, line.sizes))
            unit.gathered = True

    def _ready(self, unit):
        if self.stage == 3:
            self._gather(unit)
        unit.wait()

    def _apply(self, fn, recurse=True):
        raise RuntimeError("shards stay where they are: move or convert the model first, then wrap it")

    def refresh(self):
        """Stage 2: the next forward gathers the parameters, whose pieces were changed by hand. On every rank."""
        self._stale = self.stage == 2

    # ---- clipping, state dicts --------------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm, norm_type=2.0):
        """As torch.nn.utils.clip_grad_norm_ of the whole gradient; returns its norm, the same on every rank."""
        return clip_sharded_grad_norm_(list(self.parameters()), max_norm, self.group, norm_type)

    def sharded_state_dict(self):
        """This rank's pieces, and the buffers, by the module's own names. Sends nothing."""
        rank, n = place(self.group)
        return {"rank": rank, "world_size": n, "state": {k: v.clone() for k, v in self.module.state_dict().items()}}

    def load_sharded_state_dict(self, state_dict):
        """What `sharded_state_dict` gave on this rank, in a world of this size; else ValueError."""
        check_origin(state_dict, self.group)
        self.module.load_state_dict(state_dict["state"])
        self.refresh()

    @torch.no_grad()
    def full_state_dict(self):
        """The plain module's state dict, whole, on every rank, one unit after the other. Every rank has to call it."""
        self._reset()
        whole = {}
        for unit in self._units:
            self._gather(unit)
            unit.wait()
            for line in unit.lines:
                whole |= {id(piece): p.detach().clone() for piece, p in zip(line.pieces, line.whole, strict=True)}
            if self.stage == 3:
                unit.free()
        state = self.module.state_dict(keep_vars=True)
        return {k: whole[id(v)] if id(v) in whole else v.detach().clone() for k, v in state.items()}

    @torch.no_grad()
    def load_full_state_dict(self, state_dict):
        """A plain module's state dict, each rank taking its pieces. Sends nothing. ValueError where it does not fit."""
        ours = self.module.state_dict(keep_vars=True)
        if ours.keys() != state_dict.keys():
            raise ValueError(f"these names are in one state dict only: {sorted(ours.keys() ^ state_dict.keys())}")
        for name, value in ours.items():
            shape = getattr(value, "full_shape", value.shape)
            if state_dict[name].shape != shape:
                raise ValueError(f"{name} has shape {list(state_dict[name].shape)}, here it is {list(shape)}")
        for name, value in ours.items():
            whole = state_dict[name].to(value.device)
            value.copy_(cut_piece(whole, value) if hasattr(value, "full_shape") else whole)
        self.refresh()

    def full_optimizer_state_dict(self, optimizer):
        """The state of an optimizer of these pieces, whole, as one process would save it. On every rank."""
        return full_optimizer_state(optimizer, self.group)

    def load_full_optimizer_state_dict(self, optimizer, state_dict):
        """One process's optimizer state, or `full_optimizer_state_dict` of a world of any size. Sends nothing."""
        load_full_optimizer_state(optimizer, state_dict)
