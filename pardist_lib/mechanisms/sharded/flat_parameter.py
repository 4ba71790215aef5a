"""Parameters laid end to end on one flat that is cut in n: what ZeRO's stages share.

A rank's *shard* is its cut of the flat; n need not divide it, the first shards may have one element more. A *local_shard*
is the part of one parameter that lies in a shard: a flat Parameter, often empty, of which every rank has one for
each parameter. So an ordinary elementwise optimizer works on local_shards as it does on whole parameters, with the same
names, groups and state, and a parameter without a gradient is skipped on every rank alike.

    flat     w w w w w w w w b b b          rank 0 of 2: local_shards w[0:6], b[0:0]
    shards   ────────── │ ────────          rank 1 of 2: local_shards w[6:8], b[0:3]

S: bytes of the flat. Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models" (2020), section 5; flat parameters: Zhao et al., "PyTorch FSDP" (2023), section 3.2.
"""

import weakref

import torch
import torch.distributed as dist

from ..collectives.agreement import check_same_model, take_from_first
from ..group import rank_and_size, split_sizes


class FlatParameter:
    """Parameters of one dtype, device and requires_grad on a flat; they start as the group's first rank has them.

    The given Parameter objects stay what the module computes with: from now on they are views of `flat`. keep_whole:
    the shard is a view of the flat too; else it has its own memory, and `free` can give the flat's back.
    """

    def __init__(self, parameters, names, group=None, keep_whole=True):
        rank, n = rank_and_size(group)
        self.parameters, self.names = list(parameters), list(names)
        self.trainable = self.parameters[0].requires_grad
        self.unsharded = torch.cat([p.detach().flatten() for p in self.parameters])
        if n > 1:
            take_from_first([self.unsharded], group)
        self.lengths = [p.numel() for p in self.parameters]
        for p, part in zip(self.parameters, self.unsharded.split(self.lengths), strict=True):
            p.data = part.view(p.shape)
        self.nbytes, self.sizes = self.unsharded.nbytes, split_sizes(len(self.unsharded), n)
        first = [sum(self.sizes[:r]) for r in range(n + 1)]
        mine = self.unsharded[first[rank] : first[rank + 1]]
        self.shard, self.local_shards, self.spans = mine if keep_whole else mine.clone(), [], []
        self.starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        for p, start, length in zip(self.parameters, self.starts, self.lengths, strict=True):
            cuts = [min(max(f, start), start + length) for f in first]  # where shards begin and end within p
            begin, end = cuts[rank] - first[rank], cuts[rank + 1] - first[rank]
            span = slice(begin, end) if begin < end else slice(0)
            local_shard = torch.nn.Parameter(self.shard[span], requires_grad=self.trainable)
            local_shard.__dict__.update(p.__dict__)  # what the caller has noted on it
            local_shard.full_shape, local_shard.start = p.shape, cuts[rank] - start
            local_shard.sizes = [b - a for a, b in zip(cuts, cuts[1:], strict=False)]  # every rank's part of p
            self.spans.append(span)
            self.local_shards.append(local_shard)
        self.gradient, self.arrived = None, set()

    def check_local_shards(self):
        """Raise where something was done to a local_shard that would be lost without a word."""
        begin, size = self.shard.data_ptr(), self.shard.element_size()
        for name, local_shard, span in zip(self.names, self.local_shards, self.spans, strict=True):
            if local_shard.requires_grad != self.trainable:
                raise ValueError(f"{name} was frozen or unfrozen after wrapping: set requires_grad before")
            if local_shard._backward_hooks:
                raise ValueError(
                    f"{name} has a hook of register_hook, which a shard never calls: register it before wrapping (it "
                    "sees this rank's own gradient then), or use register_post_accumulate_grad_hook"
                )
            if local_shard.numel() and local_shard.data_ptr() != begin + (span.start or 0) * size:
                raise RuntimeError(
                    f"the memory of {name} was replaced after wrapping (by p.data = …, or module.to(…)): change it in "
                    "place, with p.copy_(…), or change the model first and then wrap it"
                )

    # ---- the flat's memory ------------------------------------------------------------------------------------

    def allocate(self):
        self.unsharded.untyped_storage().resize_(self.nbytes)

    def free(self):
        """Give the flat's memory back. The parameters, and what autograd has saved of them, stay views of it: they
        are whole again once it is gathered, and must not be read before."""
        self.unsharded.untyped_storage().resize_(0)

    # ---- gradients --------------------------------------------------------------------------------------------

    def take(self, i):
        """Copy the gradient of parameter i to its place on the gradient's flat; the parameter's own is let go. One
        that is the whole flat becomes the flat, uncopied."""
        gradient = self.parameters[i].grad
        if len(self.parameters) == 1 and self.gradient is None and gradient.layout == torch.strided:
            self.gradient = gradient.detach().flatten()
            self.arrived.add(i)
        else:
            self.put(i)
        self.parameters[i].grad = None

    def put(self, i):
        gradient = self.parameters[i].grad
        if gradient.layout != torch.strided:
            raise ValueError(f"the gradient of {self.names[i]} is sparse, and shards are dense: use sparse=False")
        if self.gradient is None:
            self.gradient = self.unsharded.new_empty(len(self.unsharded))
        place_of_it = self.gradient_of(i)
        place_of_it.add_(gradient) if i in self.arrived else place_of_it.copy_(gradient)
        self.arrived.add(i)

    def gradient_of(self, i):
        """The place of parameter i on the gradient's flat, in its shape."""
        return self.gradient[self.starts[i] : self.starts[i] + self.lengths[i]].view(self.parameters[i].shape)

    def take_gradient(self):
        """The gradient's flat, zero where no gradient was taken; the next backward pass begins another one."""
        flat = self.unsharded.new_zeros(len(self.unsharded)) if self.gradient is None else self.gradient
        for i, part in enumerate(flat.split(self.lengths)):
            if i not in self.arrived:
                part.zero_()
        self.gradient, self.arrived = None, set()
        return flat

    def add_gradient(self, shard, used):
        """Give the local_shards their gradients, those only whose parameter was used; added to what they have already. Then
        the hooks of `register_post_accumulate_grad_hook` are called, as autograd would."""
        for local_shard, span, anyone in zip(self.local_shards, self.spans, used, strict=True):
            if anyone and local_shard.grad is None:
                local_shard.grad = shard[span]
            elif anyone:
                local_shard.grad += shard[span]
            for hook in list((local_shard._post_accumulate_grad_hooks or {}).values()) if anyone else ():
                hook(local_shard)


# ---- what all ranks must agree on -----------------------------------------------------------------------------


def check_parameters(parameters, names, group=None):
    """Raise ValueError, on every rank, unless all ranks have the same parameters; and where one cannot be sharded."""
    for p, name in zip(parameters, names, strict=True):
        if hasattr(p, "full_shape"):
            raise ValueError(f"{name} is a shard already: a model is wrapped once, before any part of it is wrapped")
        if isinstance(p, torch.nn.parameter.UninitializedTensorMixin):
            raise ValueError(f"{name} has no shape yet: run one batch through the lazy module before sharding it")
        if p.is_meta:
            raise ValueError(
                f"{name} is on the meta device: give it memory first, with to_empty and its initial values"
            )
    check_same_model([*zip(names, parameters, strict=True)], group)


def check_trainable(parameters):
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            "no parameter requires a gradient: there is nothing to train, and a frozen model needs no wrapper"
        )


class UsedParameters:
    """Which parameters any rank has a gradient for. One that nobody used is to be skipped, not to get zeros, or
    weight decay and momentum would move it.

    every_step: ranks may differ, and tell each other each time, 4 bytes a parameter in an all-reduce. Else they tell
    each other once, and ValueError is raised where they differ, or where a rank's own set changes later.
    """

    def __init__(self, names, every_step, group=None):
        self.names, self.every_step, self.group, self.known = names, every_step, group, None

    def agree(self, used, device):
        if self.known is None or self.every_step:
            counts = torch.tensor(used, dtype=torch.int32, device=device)
            dist.all_reduce(counts, group=self.group)
            counts, n = counts.tolist(), dist.get_world_size(self.group)
            self._refuse([0 < c < n for c in counts], "some ranks have a gradient for {}, others have none")
            self.known = [c > 0 for c in counts]
        elif used != self.known:
            differ = [a != b for a, b in zip(used, self.known, strict=True)]
            self._refuse(differ, "{} had a gradient in one step and none in another")
        return self.known

    def _refuse(self, differ, problem):
        if any(differ) and not self.every_step:
            name = self.names[differ.index(True)]
            raise ValueError(f"{problem.format(name)}: pass find_unused_parameters=True, so that ranks ask each other")


def call_when_accumulated(parameter, method, *args):
    """Call `method(*args)` in every backward, once the parameter's gradient is complete.

    Python's garbage collector does not see through these hooks: one that holds what holds the parameter would keep
    the whole model in memory for good. So it refers weakly to the method's object and to what can be referred to so.
    """
    method = weakref.WeakMethod(method)
    weak = [weakref.ref(a) if hasattr(a, "__weakref__") else lambda a=a: a for a in args]

    def hook(_):
        if (bound := method()) is not None:
            bound(*(a() for a in weak))

    parameter.register_post_accumulate_grad_hook(hook)


@torch.no_grad()
def clip_sharded_grad_norm_(local_shards, max_norm, group=None, norm_type=2.0):
    """As torch.nn.utils.clip_grad_norm_, where the gradients are spread over the ranks; returns the global norm.

    local_shards: this rank's parameters, whose gradients are cuts of the whole ones. Sends one number (an all-reduce).
    """
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"norm_type is a number above 0, or inf, not {norm_type}")
    gradients = [p.grad for p in local_shards if p.grad is not None]
    device = next(iter(local_shards)).device
    parts = [torch.linalg.vector_norm(g, norm_type).to(device) for g in gradients if g.numel()]
    norm = torch.linalg.vector_norm(torch.stack(parts), norm_type) if parts else torch.zeros((), device=device)
    total = norm.double() if norm_type == float("inf") else norm.double() ** norm_type
    dist.all_reduce(total, dist.ReduceOp.MAX if norm_type == float("inf") else dist.ReduceOp.SUM, group)
    total = total if norm_type == float("inf") else total ** (1 / norm_type)
    for g in gradients:
        g.mul_((max_norm / (total + 1e-6)).clamp(max=1.0).to(g.device, g.dtype))
    return total.to(gradients[0].abs().dtype) if gradients else total
