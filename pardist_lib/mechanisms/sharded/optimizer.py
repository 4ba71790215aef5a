"""ZeRO stage 1: every rank keeps all parameters, but the optimizer's state of its own shard only.

With S bytes of parameters and n ranks a step is a reduce-scatter of the gradients, the optimizer on one n-th of the
elements, and an all-gather of the parameters: 2·(n − 1)/n·S sent by each rank, as by one all-reduce of the gradients.
Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 5.1.
"""

import torch
from torch.optim import Optimizer

from ..collectives.agreement import take_from_first
from .async_collectives import AsyncCollectives, prepared_gather
from .buckets import in_buckets
from .checks import check_elementwise, check_frozen, check_parameters, check_trainable, check_unmoved
from .eager import eager
from .gradients import UsedParameters, call_when_accumulated, clip_sharded_grad_norm_
from .state import OptimizerStateDicts


class ShardedOptimizer(OptimizerStateDicts, Optimizer):
    """`optimizer_class` with its state sharded over the ranks of `group` (ZeRO-1).

        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)

    params                  parameters or parameter groups, as any optimizer takes them; the group's first rank gives
                            its values to all. They become views of a few flat tensors: move the model before this.
    optimizer_class         any elementwise optimizer: SGD, Adam, AdamW, RMSprop, Adagrad, … ; defaults: its options
    reduce_gradients        True: `step` averages every rank's own gradients; False: they are averaged already, by
                            DataParallel or an all-reduce, and `step` only gathers: (n − 1)/n·S
    find_unused_parameters  True where ranks may have gradients for different parameters (see `UsedParameters`)
    overlap                 True: a bucket is reduced as soon as backward has its last gradient; and once more, where a
                            gradient changes between backward and step, or by another backward (a change through
                            `.grad.data` is not seen). Worth it where ranks have cores or links to spare: measured
                            with two and four ranks on two cores, it costs time.
    bucket_mb               most that is reduced and gathered in one call, in MB of 2^20 bytes; a parameter is not cut

    Gradients in `.grad` stay each rank's own; they are views of a few flat tensors, too. Besides, a rank keeps the
    memory of its shard of the mean, an n-th of them, and on gloo, for what arrives, that of a bucket (or two).

    Learning-rate schedulers take it as any optimizer; for float16 use mixed_precision.LossScaler, with torch's
    GradScaler one rank alone may skip a step. Raises ValueError for an optimizer that is not elementwise, for
    parameters that differ between ranks (other than in their values), that are shards already, or of which none is
    trainable; RuntimeError where the model was moved afterwards.
    """

    def __init__(self, params, optimizer_class, group=None, *, reduce_gradients=True, find_unused_parameters=False,
                 overlap=False, bucket_mb=25, **defaults):  # fmt: skip
        check_elementwise(optimizer_class)
        if bucket_mb <= 0:
            raise ValueError(f"bucket_mb is a number of megabytes above 0, not {bucket_mb}")
        self.group, self.reduces, self.inner = group, reduce_gradients, None
        self.find_unused_parameters, self.bucket_bytes = find_unused_parameters, bucket_mb * 2**20
        self.early = overlap and reduce_gradients and not find_unused_parameters  # else all are reduced in `step`
        self.collectives = AsyncCollectives(group, apart=overlap)
        self.buckets, self.sharded, self.reduced = [], set(), False
        super().__init__(params, defaults)
        check_trainable([p for g in self.param_groups for p in g["params"]])
        shards = self._shard([p for g in self.param_groups for p in g["params"]])
        groups = [{**g, "params": [shards.get(p, p) for p in g["params"]]} for g in self.param_groups]
        self.inner = optimizer_class(groups, **defaults)
        self.defaults = self.inner.defaults
        self._take_settings()

    # ---- a step -----------------------------------------------------------------------------------------------

    @eager
    @torch.no_grad()
    def step(self, closure=None):
        """Average the gradients, update this rank's shards, gather the parameters. closure: as torch's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.reduce()
        self._give_settings()  # what a scheduler has changed
        gather = prepared_gather([(bucket.unsharded, bucket.sizes) for bucket in self.buckets], self.group)
        try:
            self.inner.step()
        except Exception:
            gather()  # its receives are posted, and would get the next message
            raise
        self._forget()
        gather()
        return loss

    @torch.no_grad()
    def reduce(self):
        """The first part of `step` alone: this rank's shard of the mean gradient. `step` does not do it again, unless
        there was another backward; what `clip_grad_norm_` did is then forgotten.

        Sends (n − 1)/n·S where n divides S, but for what was reduced in backward; nothing with reduce_gradients=False.
        """
        if self.reduced:
            return
        self._check()
        used = self.used.agree([p.grad is not None for bucket in self.buckets for p in bucket.parameters])
        for bucket in self.buckets if self.reduces else ():
            if any(used[bucket]) and not bucket.is_reduced():
                bucket.place_all()
                bucket.reduce_scatter(self.collectives)
        for bucket in self.buckets:
            if not self.reduces:
                bucket.cut_gradients()
            elif any(used[bucket]):
                bucket.give_gradients(bucket.sent, used[bucket])
        self.reduced = True

    @eager
    @torch.no_grad()
    def _has_gradient(self, bucket, i):
        """In backward, once a parameter's gradient is complete."""
        if self.reduced:  # for a step that was not taken: it was skipped after clip_grad_norm_, say
            self._forget()
        if self.reduces:
            bucket.place(i)
        if self.early and len(bucket.arrived) == len(bucket.parameters):
            bucket.reduce_scatter(self.collectives)

    def clip_grad_norm_(self, max_norm, norm_type=2.0):
        """Clip the averaged gradient to a global norm before `step`; returns that norm, the same on every rank.

        torch.nn.utils.clip_grad_norm_ would see this rank's own gradients only.
        """
        self.reduce()
        shards = [local for bucket in self.buckets for local in bucket.local_shards]
        return clip_sharded_grad_norm_(shards, max_norm, self.group, norm_type)

    @eager
    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        self._forget()

    def _forget(self):
        self.reduced = False
        self.inner.zero_grad()
        for bucket in self.buckets:
            bucket.forget()

    # ---- parameters and settings ------------------------------------------------------------------------------

    def _shard(self, parameters):
        """{parameter: its local shard} of the trainable ones, from now on in buckets."""
        names = [f"parameter {i}" for i in range(len(parameters))]
        if len(set(parameters)) < len(parameters):
            raise ValueError("a parameter is listed twice: give each one once, as model.parameters() does")
        check_parameters(parameters, names, self.group)
        take_from_first([p for p in parameters if not p.requires_grad], self.group)
        buckets = in_buckets([*zip(parameters, names, strict=True)], self.bucket_bytes, self.group)
        for bucket in buckets:
            for i, p in enumerate(bucket.parameters):
                call_when_accumulated(p, self._has_gradient, bucket, i)
            self._tell_parts(bucket)
        self.buckets += buckets
        self.used = UsedParameters(self.buckets, self.find_unused_parameters, self.group)
        shards = {p: local for b in buckets for p, local in zip(b.parameters, b.local_shards, strict=True)}
        self.sharded |= set(shards)
        return shards

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        if self.inner is not None:
            group = self.param_groups[-1]
            try:
                shards = self._shard(group["params"])
            except BaseException:
                self.param_groups.pop()
                raise
            self.inner.add_param_group({**group, "params": [shards.get(p, p) for p in group["params"]]})
            self._take_settings()

    def _check(self):
        for bucket in self.buckets:
            check_unmoved(bucket)
        check_frozen(p for g in self.param_groups for p in g["params"] if p not in self.sharded)

    def __getstate__(self):
        raise TypeError("a ShardedOptimizer cannot be copied or pickled: save state_dict() or full_state_dict()")
