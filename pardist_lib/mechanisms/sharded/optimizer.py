"""ZeRO stage 1: every rank keeps all parameters, but the optimizer's state of its own shard only.

With S bytes of parameters and n ranks a step is a reduce-scatter of the gradients, the optimizer on one n-th of the
elements, and an all-gather of the parameters: 2·(n − 1)/n·S sent by each rank, as by one all-reduce of the gradients.
Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 5.1.
"""

import torch
from torch.optim import Optimizer

from ..collectives.agreement import take_from_first
from ..group import rank_and_size
from .async_collectives import AsyncCollectives, prepared_gather
from .flat_parameter import (
    FlatParameter,
    UsedParameters,
    call_when_accumulated,
    check_parameters,
    check_trainable,
    clip_sharded_grad_norm_,
)
from .state import check_origin, cut_local_shard, full_optimizer_state, load_full_optimizer_state

# What these do to one element depends on others: on a line search, on rows and columns, on a matrix's singular
# vectors, on a layer's norm, on which rows a gradient has.
NOT_ELEMENTWISE = {
    "LBFGS", "Adafactor", "Muon", "SparseAdam", "LAMB", "Lamb", "LARS", "Lars", "Shampoo", "DistributedShampoo", "SOAP",
}  # fmt: skip


class ShardedOptimizer(Optimizer):
    """`optimizer_class` with its state sharded over the ranks of `group` (ZeRO-1).

        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)

    params                  parameters or parameter groups, as any optimizer takes them; the group's first rank gives
                            its values to all. They become views of a few flat tensors: move the model before this.
    optimizer_class         any elementwise optimizer: SGD, Adam, AdamW, RMSprop, Adagrad, … ; defaults: its options
    reduce_gradients        True: `step` averages every rank's own gradients; False: they are averaged already, by
                            DataParallel or an all-reduce, and `step` only gathers: (n − 1)/n·S
    find_unused_parameters  True where ranks may have gradients for different parameters (see `UsedParameters`)
    overlap                 True: a bucket leaves as soon as backward has its last gradient. Changing a gradient
                            between backward and step, or another backward, makes it leave once more (a change
                            through `.grad.data` is not seen). Worth it where ranks have cores or links to spare:
                            measured with two and four ranks on two cores, it costs time.
    bucket_mb               length of the flats that are moved, in MB of 2^20 bytes

    Gradients in `.grad` stay each rank's own, as views of a few flat tensors, too. Besides, a rank keeps the memory of
    its shard of the mean, an n-th of them, and on gloo room for what arrives, as long as a flat (or two).

    Learning-rate schedulers take it as any optimizer; for float16 use mixed_precision.LossScaler, with torch's
    GradScaler one rank alone may skip a step. Raises ValueError for an optimizer that is not elementwise, for
    parameters that differ between ranks (other than in their values), that are shards already, or of which none is
    trainable; RuntimeError where the model was moved afterwards.
    """

    def __init__(self, params, optimizer_class, group=None, *, reduce_gradients=True, find_unused_parameters=False,
                 overlap=False, bucket_mb=25, **defaults):  # fmt: skip
        if not isinstance(optimizer_class, type):
            raise ValueError("optimizer_class is a class, torch.optim.AdamW say: give its options by name after it")
        if bad := [c.__name__ for c in optimizer_class.__mro__ if c.__name__ in NOT_ELEMENTWISE]:
            raise ValueError(
                f"{bad[0]} is not elementwise: its step for one element depends on others, which another rank may "
                "hold. Use SGD, Adam, AdamW, RMSprop, Adagrad or another elementwise optimizer"
            )
        if bucket_mb <= 0:
            raise ValueError(f"bucket_mb is a number of megabytes above 0, not {bucket_mb}")
        self.group, self.reduces, self.inner = group, reduce_gradients, None
        self.find_unused_parameters, self.bucket_bytes = find_unused_parameters, bucket_mb * 2**20
        self.early = overlap and reduce_gradients and not find_unused_parameters  # else all leave in `step`
        self.collectives = AsyncCollectives(group, apart=overlap)
        self.buckets, self.sharded, self.reduced = [], set(), False
        super().__init__(params, defaults)
        check_trainable([p for g in self.param_groups for p in g["params"]])
        shards = self._shard([p for g in self.param_groups for p in g["params"]])
        groups = [{**g, "params": [shards.get(p, p) for p in g["params"]]} for g in self.param_groups]
        self.inner = optimizer_class(groups, **defaults)
        self.defaults = self.inner.defaults
        self._take_settings()

    def _shard(self, parameters):
        """{parameter: its local_shard} of the trainable ones, laid on flats of at most a bucket."""
        names = [f"parameter {i}" for i in range(len(parameters))]
        if len(set(parameters)) < len(parameters):
            raise ValueError("a parameter is listed twice: give each one once, as model.parameters() does")
        check_parameters(parameters, names, self.group)
        buckets, kinds = [], {}
        for p, name in reversed(list(zip(parameters, names, strict=True))):  # about the order of backward
            if not p.requires_grad:
                take_from_first([p], self.group)
            else:
                kind = p.dtype, p.device
                bucket = kinds.get(kind)
                if bucket is None or sum(q.nbytes for q, _ in bucket) + p.nbytes > self.bucket_bytes:
                    buckets.append(bucket := [])
                    kinds[kind] = bucket
                bucket.append((p, name))
        flats = [FlatParameter(*zip(*bucket, strict=True), self.group) for bucket in buckets]
        self.buckets += flats
        for flat in flats:
            flat.sent, flat.version, flat.mean = None, None, None
            for i, p in enumerate(flat.parameters):
                call_when_accumulated(p, self._arrived, flat, i)
        self.used = UsedParameters(
            [name for flat in self.buckets for name in flat.names], self.find_unused_parameters, self.group
        )
        self.sharded |= {p for flat in flats for p in flat.parameters}
        return {
            p: local_shard for flat in flats for p, local_shard in zip(flat.parameters, flat.local_shards, strict=True)
        }

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

    def _take_settings(self):
        for ours, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            ours.update({k: v for k, v in inner.items() if k != "params"})

    # ---- a step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure=None):
        """Average the gradients, update this rank's shards, gather the parameters. closure: as torch's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.reduce()
        self._give_settings()  # what a scheduler has changed
        gather = prepared_gather([(flat.unsharded, flat.sizes) for flat in self.buckets], self.group)
        try:
            self.inner.step()
        except Exception:
            gather()  # what was asked for has to come, or it would take the next message for it
            raise
        self._forget()
        gather()
        return loss

    @torch.no_grad()
    def _arrived(self, flat, i):
        """Backward has a gradient: put it on its flat, of which `.grad` is a view from now on. A full flat leaves."""
        if self.reduced:  # for a step that was not taken: it was skipped after clip_grad_norm_, say
            self._forget()
        if self.reduces:
            self._place(flat, i)
            flat.arrived.add(i)
        if self.early and len(flat.arrived) == len(flat.parameters):
            self._start(flat)

    def _place(self, flat, i):
        p = flat.parameters[i]
        if not self._lies(flat, i):
            flat.arrived.discard(i)
            flat.put(i)
            p.grad = flat.gradient_of(i)

    def _lies(self, flat, i):
        gradient = flat.parameters[i].grad
        return flat.gradient is not None and gradient.data_ptr() == flat.gradient_of(i).data_ptr()

    def _is_on_its_way(self, flat):
        """Whether the flat has left, whole, and nothing on it has changed since."""
        if flat.sent is None or flat.version != flat.gradient._version:
            return False
        return all(p.grad is not None and self._lies(flat, i) for i, p in enumerate(flat.parameters))

    def _start(self, flat):
        if flat.sent is not None:
            flat.sent.result()  # it left before its gradients changed
        flat.version, flat.arrived = flat.gradient._version, set()
        if flat.mean is None:  # then it is kept: filling new memory takes the kernel longer than us
            flat.mean = flat.shard.new_empty(len(flat.shard))
        flat.sent = self.collectives.reduce_scatter(flat.gradient, flat.sizes, flat.mean)

    @torch.no_grad()
    def reduce(self):
        """The first part of `step` alone: this rank's shard of the mean gradient. `step` does not do it again, unless
        there was another backward; what `clip_grad_norm_` did is then forgotten.

        Sends (n − 1)/n·S where n divides S, what has not left in backward already; nothing with
        reduce_gradients=False.
        """
        if self.reduced:
            return
        self._check()
        used = [p.grad is not None for flat in self.buckets for p in flat.parameters]
        anyone = iter(self.used.agree(used, self.buckets[0].unsharded.device))
        anyone = {flat: [next(anyone) for _ in flat.parameters] for flat in self.buckets}
        if not self.reduces:
            for flat in self.buckets:
                for local_shard, p in zip(flat.local_shards, flat.parameters, strict=True):
                    local_shard.grad = None if p.grad is None else cut_local_shard(p.grad, local_shard)
        for flat in self.buckets if self.reduces else ():
            if any(anyone[flat]) and not self._is_on_its_way(flat):
                if flat.gradient is None:
                    flat.gradient = flat.unsharded.new_empty(len(flat.unsharded))
                for i, p in enumerate(flat.parameters):
                    if p.grad is not None:
                        self._place(flat, i)  # it may have been put there by hand
                for i, p in enumerate(flat.parameters):
                    if p.grad is None:
                        flat.gradient_of(i).zero_()
                self._start(flat)
        for flat in self.buckets if self.reduces else ():
            if any(anyone[flat]):
                flat.add_gradient(flat.sent.result(), anyone[flat])
        self.reduced = True

    def _check(self):
        for flat in self.buckets:
            for p, start in zip(flat.parameters, flat.starts, strict=True):
                if p.data_ptr() != flat.unsharded.data_ptr() + start * flat.unsharded.element_size() and p.numel():
                    raise RuntimeError(
                        "a parameter's memory has been replaced since ShardedOptimizer was made (by model.to(…), or "
                        "p.data = …): move and change the model first, then make the optimizer"
                    )
        if any(p.requires_grad for g in self.param_groups for p in g["params"] if p not in self.sharded):
            raise RuntimeError("a parameter was unfrozen after ShardedOptimizer was made: set requires_grad before")

    def clip_grad_norm_(self, max_norm, norm_type=2.0):
        """Clip the averaged gradient to a global norm before `step`; returns that norm, the same on every rank.

        torch.nn.utils.clip_grad_norm_ would see this rank's own gradients only.
        """
        self.reduce()
        local_shards = [local_shard for flat in self.buckets for local_shard in flat.local_shards]
        return clip_sharded_grad_norm_(local_shards, max_norm, self.group, norm_type)

    def _forget(self):
        self.reduced = False
        self.inner.zero_grad()
        for flat in self.buckets:
            if flat.sent is not None:
                flat.sent.result()  # nothing leaves from a flat that is being written to again
            flat.sent, flat.arrived = None, set()

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        self._forget()

    def __getstate__(self):
        raise TypeError("a ShardedOptimizer cannot be copied or pickled: save state_dict() or full_state_dict()")

    # ---- state dicts ------------------------------------------------------------------------------------------

    def state_dict(self):
        """This rank's shard of the state, with the rank and the world it belongs to. Sends nothing."""
        rank, n = rank_and_size(self.group)
        self._give_settings()
        return {"rank": rank, "world_size": n, **self.inner.state_dict()}

    def load_state_dict(self, state_dict):
        """What `state_dict` gave on this rank, in a world of this size; else ValueError."""
        check_origin(state_dict, self.group)
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k not in ("rank", "world_size")})
        self._take_settings()

    def full_state_dict(self):
        """The whole state on every rank, as a plain `optimizer_class` would save it. Every rank has to call it."""
        self._give_settings()
        return full_optimizer_state(self.inner, self.group)

    def load_full_state_dict(self, state_dict):
        """A plain optimizer's state dict, or `full_state_dict` of a world of any size. Sends nothing."""
        load_full_optimizer_state(self.inner, state_dict)
        self._take_settings()

    def _give_settings(self):
        for ours, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({k: v for k, v in ours.items() if k != "params"})
