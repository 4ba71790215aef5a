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
import torch.distributed as dist

from ..collectives.agreement import take_from_first
from .async_collectives import AsyncCollectives
from .checks import check_dtypes, check_kept, check_module
from .eager import eager
from .gradients import UsedParameters, call_when_accumulated, clip_sharded_grad_norm_
from .optimizer import ShardedOptimizer
from .passes import Passes
from .state import StateDicts
from .units import cast_tensors, make_units, returned_tensors

__all__ = ["ShardedDataParallel", "ShardedOptimizer"]


class ShardedDataParallel(Passes, StateDicts):
    """`module` with its gradients (stage 2), or its gradients and parameters (stage 3), sharded over `group`.

        model = ShardedDataParallel(model, stage=3)
        optimizer = torch.optim.AdamW(model.parameters())    # after wrapping: it sees this rank's shards only

    units                   what is gathered, and freed, as one: a list of submodules, or a class or tuple of classes;
                            by default each child that has parameters and a forward, and each entry of Sequential,
                            ModuleList and ModuleDict. Parameters outside of units, or in two of them (tied), are a
                            unit with the whole module.
    reshard_after_forward   stage 3: free a unit after its forward and gather it again for its backward. False keeps
                            it until then: 2·(n − 1)/n·S a step, and the memory of all parameters. The whole
                            module's own unit is always kept.
    prefetch                stage 3: gather the next unit while this one computes
    overlap                 True: compute on while messages are under way; False: wait for each
    find_unused_parameters  True where ranks may have gradients for different parameters (see `UsedParameters`); they
                            are then reduced at the end of backward. At stage 3 all ranks run the same units anyhow.
    compute_dtype           torch.bfloat16, say: what units compute with, and are gathered in, half of float32's bytes.
                            Shards, their gradients and so the optimizer stay as the parameters are. Floating-point
                            inputs of each unit are cast to it; buffers are not, nor what the model returns.
    reduce_dtype            what gradients travel and are added up in: by default what they are computed in

    Any elementwise optimizer works as on a plain model, parameter groups and schedulers too; one that is not (see
    NOT_ELEMENTWISE in checks.py) would compute something else. All parameters and buffers start as the group's
    first rank has them; afterwards each rank's buffers are its own. Gradients are means over the ranks, right where
    they have equally many samples (else weight each rank's loss by n·its samples / all samples); a backward adds to
    what is there, so gradients accumulate as ever; each one sends as a whole step does, unless it is in `no_sync` or
    `no_reshard`, which trade memory for that (FSDP2's set_requires_gradient_sync and set_reshard_after_backward).

    Outside of forward and backward the module's attributes are local shards, flat ones: sort them into groups by name
    or by len(p.full_shape), not by p.dim(). Clip gradients with `clip_grad_norm_` below and scale losses with
    mixed_precision.LossScaler: torch's own see this rank's shards only. Code that uses a unit's parameters without
    calling the unit has to name a larger unit. After changing shards by hand at stage 2, or between micro-batches of
    `no_reshard`, call `refresh`. Stage 3 has no backward with create_graph.

    Sends in a step, where n divides: stage 2 (n − 1)/n·S in backward and as much at the beginning of the forward that
    follows; stage 3 (n − 1)/n·S in forward, twice that in backward; S in the dtype that travels; m times that with m
    micro-batches. With all but the last in no_sync one reduction, (n − 1)/n·S, and at stage 2 one gather, at stage 3
    2m; also in no_reshard: one gather. In the first step 4 bytes a parameter besides.

    Raises ValueError for another stage, for a module that is wrapped already or has nothing to train, for parameters
    that differ between ranks other than in their values, for units that are not parts of the module.
    """

    def __init__(self, module, stage=3, group=None, *, units=None, reshard_after_forward=True, prefetch=True,
                 overlap=True, find_unused_parameters=False, compute_dtype=None, reduce_dtype=None):  # fmt: skip
        super().__init__()
        check_module(ShardedDataParallel, module, stage, group)
        dtypes = check_dtypes(compute_dtype=compute_dtype, reduce_dtype=reduce_dtype)
        self.module, self.stage, self.group = module, stage, group
        self._collectives = AsyncCollectives(group, apart=overlap, at_once=not overlap)
        self._units = make_units(module, units, group, self._collectives, stage == 3, reshard_after_forward, **dtypes)
        self.compute_dtype = compute_dtype
        self._prefetches, self._order = stage == 3 and prefetch, list(self._units)
        self._trained = [flat for unit in self._units for flat in unit.trained]
        self._used = UsedParameters(self._trained, find_unused_parameters, group)
        take_from_first(list(module.buffers()), group)
        self._stale = False  # stage 2: the shards may have changed since they were gathered
        for unit in self._units:
            self._hook(unit)
            unit.rest()
        if dist.get_world_size(group) > 1:
            self._tell_parts()
        module.register_load_state_dict_post_hook(lambda *_: self.refresh())

    def _hook(self, unit):
        if self.compute_dtype is not None:
            cast = lambda _, args, kwargs: cast_tensors((args, kwargs), self.compute_dtype)  # noqa: E731
            unit.module.register_forward_pre_hook(cast, prepend=True, with_kwargs=True)
        unit.module.register_forward_pre_hook(lambda *_: self._before_forward(unit), prepend=True)
        after = lambda _, __, output: self._after_forward(unit, output)  # noqa: E731
        unit.module.register_forward_hook(after, always_call=True)  # also where it fails
        for flat in unit.trained:
            for i, p in enumerate(flat.parameters):
                call_when_accumulated(p, self._has_gradient, unit, flat, i)

    # ---- how it works: called by hooks ------------------------------------------------------------------------

    @eager
    def _before_forward(self, unit):
        """Gather it, and start to gather the one that comes next."""
        first_time = self._enter(unit)
        unit.unshard()
        if first_time and self._prefetches and (after := _next(unit, self._order)):
            after.gather()

    @eager
    def _after_forward(self, unit, output):
        """Reshard it. Hooks on what it has returned tell when its backward begins."""
        if self._leave(unit):
            returned = returned_tensors(output)
            differentiable = [t for t in returned if t.grad_fn is not None]
            for t in differentiable:
                t.register_hook(lambda _: self._before_backward(unit))
            unit.reshard_after_forward(returned, differentiable)
            if not self._calling:
                self._end_forward()

    @eager
    def _before_backward(self, unit):
        """Gather it again, and start to gather the one whose backward comes next."""
        self._begin_backward()
        self._reshard_done(unit)
        unit.unshard()
        unit.awaited = False
        if self._prefetches and (before := _next(unit, self._order[::-1])) and before.awaited:
            before.gather()

    def _reshard_done(self, unit):
        """Free the units whose backward is over, as that of `unit` begins. Those that it is a part of have more to do,
        also where they have all their gradients."""
        for done in [done for done in self._done if unit.module not in done.parts]:
            done.reshard()
            self._done.remove(done)

    @eager
    @torch.no_grad()
    def _has_gradient(self, unit, flat, i):
        """A parameter's gradient is complete. When all of its unit's are, reduce-scatter them."""
        if unit.coming or not unit.gathered:
            check_kept(unit, flat.names[i])
        if not self._in_backward:
            self._begin_backward()
        flat.take(i)
        complete = all(len(f.arrived) == len(f.parameters) for f in unit.trained)
        if self._syncs and not self._used.every_step and complete:
            self._done.append(unit)
            self._sent.extend((f, f.reduce_scatter(self._collectives)) for f in unit.trained)

    @eager
    @torch.no_grad()
    def _after_backward(self):
        """Give the shards their gradients, all ranks to the same parameters; nothing else is left."""
        left = {flat for flat, _ in self._sent}
        if not self._syncs:
            for flat in self._trained:
                flat.accumulate()
        elif left or any(flat.arrived for flat in self._trained) or self._used.every_step:
            self._reduce_rest(left)
        self._end_backward()  # also of torch.autograd.grad, for inputs

    def _reduce_rest(self, left):
        """What has not left yet; then wait for all."""
        used = [flat in left or flat.has_gradient(i) for flat in self._trained for i in range(len(flat.parameters))]
        used = self._used.agree(used)
        for flat in self._trained:
            if any(used[flat]) and (flat not in left or flat.arrived):
                self._sent.append((flat, flat.reduce_scatter(self._collectives)))
        for flat, sent in self._sent:
            flat.give_gradients(sent, used[flat])
        self._stale = self.stage == 2

    # ---- what a training loop calls ---------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm, norm_type=2.0):
        """As torch.nn.utils.clip_grad_norm_ of the whole gradient; returns its norm, the same on every rank."""
        return clip_sharded_grad_norm_(list(self.parameters()), max_norm, self.group, norm_type)


def _next(unit, order):
    """The one after `unit` in `order`, or None."""
    at = order.index(unit) + 1 if unit in order else len(order)
    return order[at] if at < len(order) else None
