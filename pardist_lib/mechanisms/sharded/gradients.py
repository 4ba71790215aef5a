"""When gradients are there, who has them, and how long they are: what ZeRO's stages ask of them."""

import weakref

import torch
import torch.distributed as dist


def call_when_accumulated(parameter, method, *args):
    """Call `method(*args)` in every backward, once the parameter's gradient is complete.

    Python's garbage collector does not see through these hooks. One that refers to the model would keep it in memory
    for good; so this one refers weakly to the method's object, and to those of `args` that allow it.
    """
    method = weakref.WeakMethod(method)
    weak = [weakref.ref(a) if hasattr(a, "__weakref__") else lambda a=a: a for a in args]

    def hook(_):
        if (bound := method()) is not None:
            bound(*(a() for a in weak))

    parameter.register_post_accumulate_grad_hook(hook)


class UsedParameters:
    """Which parameters any rank has a gradient for. One that nobody used has to be skipped: with zeros for a gradient,
    weight decay and momentum would move it.

    flat_parameters: trainable ones. every_step: ranks may differ, and tell each other each time: an all-reduce of 4
    bytes a parameter. Else they tell each other once, and ValueError is raised where they differ, or where a rank's
    own set changes later.
    """

    def __init__(self, flat_parameters, every_step, group=None):
        self.flat_parameters, self.every_step, self.group, self.known = flat_parameters, every_step, group, None

    def agree(self, used):
        """used: whether this rank has a gradient, for each parameter of each flat one in turn. Returns {flat parameter:
        [whether any rank has one, for each of its parameters]}."""
        if self.known is None or self.every_step:
            device = self.flat_parameters[0].unsharded.device
            counts = torch.tensor(used, dtype=torch.int32, device=device)
            dist.all_reduce(counts, group=self.group)
            counts, n = counts.tolist(), dist.get_world_size(self.group)
            self._refuse([0 < c < n for c in counts], "some ranks have a gradient for {}, others have none")
            self.known = [c > 0 for c in counts]
        elif used != self.known:
            differ = [a != b for a, b in zip(used, self.known, strict=True)]
            self._refuse(differ, "{} had a gradient in one step and none in another")
        known = iter(self.known)
        return {flat: [next(known) for _ in flat.parameters] for flat in self.flat_parameters}

    def _refuse(self, differ, problem):
        if any(differ) and not self.every_step:
            name = [name for flat in self.flat_parameters for name in flat.names][differ.index(True)]
            raise ValueError(f"{problem.format(name)}: pass find_unused_parameters=True, so that ranks ask each other")


@torch.no_grad()
def clip_sharded_grad_norm_(local_shards, max_norm, group=None, norm_type=2.0):
    """As torch.nn.utils.clip_grad_norm_, where the gradients are spread over the ranks; returns the global norm.

    local_shards: this rank's parameters, whose gradients are cuts of the whole ones. All-reduces one number.
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
