"""Parameters laid end to end in one flat tensor that is cut in n shards: what ZeRO's stages share.

A rank's *shard* is its cut of the flat parameter; n need not divide it, the first shards may have one element more.
A *local shard* is the part of one parameter that lies in this rank's shard: a flat Parameter, often empty, of which
every rank has one for each parameter. So an ordinary elementwise optimizer works on local shards as it does on whole
parameters, with the same names, groups and state, and a parameter without a gradient is skipped on every rank alike.

    flat     w w w w w w w w b b b          rank 0 of 2: local shards w[0:6], b[0:0]
    shards   ────────── │ ────────          rank 1 of 2: local shards w[6:8], b[0:3]

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 5;
flat parameters: Zhao et al., "PyTorch FSDP" (2023), section 3.2.
"""

import torch

from ..collectives.agreement import take_from_first
from ..group import rank_and_size, split_sizes


class FlatParameter:
    """Parameters of one dtype, device and requires_grad in one flat tensor, with the group's first rank's values.

    parameters     the given Parameter objects: the module computes with them still; they are views of `unsharded`
    unsharded      the flat tensor, in `compute_dtype` if given (of floating-point parameters)
    shard          this rank's cut of it, in the parameters' own dtype: a view where `keep_unsharded`, else a copy, so
                   that `free` can give the memory of `unsharded` back; a copy also where the dtypes differ
    local_shards   this rank's part of each parameter, views of `shard`: what an optimizer is given
    sizes          every rank's elements
    gradient       the flat gradient that a backward fills, None before; arrived: the parameters that it has filled;
                   accumulated: those that earlier backwards have filled, of which nothing has been reduced yet.
                   It is reduced in `reduce_dtype` if given, else as it is
    """

    def __init__(self, parameters, names, group=None, keep_unsharded=True, compute_dtype=None, reduce_dtype=None):
        rank, n = rank_and_size(group)
        self.parameters, self.names = list(parameters), list(names)
        self.trainable = self.parameters[0].requires_grad
        exact = torch.cat([p.detach().flatten() for p in self.parameters])
        if n > 1:
            take_from_first([exact], group)
        self.unsharded = exact.to(compute_dtype if exact.is_floating_point() else None)
        self.is_cast = self.unsharded.dtype != exact.dtype
        self.reduce_dtype = reduce_dtype if exact.is_floating_point() else None
        self.lengths = [p.numel() for p in self.parameters]
        for p, part in zip(self.parameters, self.unsharded.split(self.lengths), strict=True):
            p.data = part.view(p.shape)
        self.nbytes, self.sizes = self.unsharded.nbytes, split_sizes(len(self.unsharded), n)
        first = [sum(self.sizes[:r]) for r in range(n + 1)]
        mine = exact[first[rank] : first[rank + 1]]
        self.shard = mine if keep_unsharded and not self.is_cast else mine.clone()
        self.local_shards, self.spans = [], []
        self.starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        for p, start, length in zip(self.parameters, self.starts, self.lengths, strict=True):
            cuts = [min(max(f, start), start + length) for f in first]  # where shards begin and end within p
            begin, end = cuts[rank] - first[rank], cuts[rank + 1] - first[rank]
            span = slice(begin, end) if begin < end else slice(0)
            local = torch.nn.Parameter(self.shard[span], requires_grad=self.trainable)
            local.__dict__.update(p.__dict__)  # what the caller has noted on it
            local.full_shape, local.start = p.shape, cuts[rank] - start
            local.sizes = [b - a for a, b in zip(cuts, cuts[1:], strict=False)]  # every rank's part of p
            self.spans.append(span)
            self.local_shards.append(local)
        self.forget_gradient()

    # ---- memory of the flat parameter -------------------------------------------------------------------------

    def allocate(self):
        self.unsharded.untyped_storage().resize_(self.nbytes)

    def free(self):
        """Give the memory of `unsharded` back. The parameters, and what autograd has saved of them, stay views of it:
        they have their values again once it is gathered, and must not be read before."""
        self.unsharded.untyped_storage().resize_(0)

    # ---- gradients --------------------------------------------------------------------------------------------

    def take(self, i):
        """Move the gradient of parameter i to its place in the flat gradient. One that fills all of it becomes the flat
        gradient, uncopied."""
        gradient = self.parameters[i].grad
        if len(self.parameters) == 1 and self.gradient is None and gradient.layout == torch.strided:
            self.gradient = gradient.detach().flatten()
            self.arrived.add(i)
        else:
            self.put(i)
        self.parameters[i].grad = None

    def put(self, i):
        """Copy the gradient of parameter i to its place, or add it to what has arrived there already."""
        gradient = self.parameters[i].grad
        if gradient.layout != torch.strided:
            raise ValueError(f"the gradient of {self.names[i]} is sparse, and shards are dense: use sparse=False")
        if self.gradient is None:
            self.gradient = self.unsharded.new_empty(len(self.unsharded))
        place = self.gradient_of(i)
        place.add_(gradient) if self.has_gradient(i) else place.copy_(gradient)
        self.arrived.add(i)

    def has_gradient(self, i):
        return i in self.arrived or i in self.accumulated

    def accumulate(self):
        """A backward is over, and nothing is reduced: the next one adds to the flat gradient, in `reduce_dtype`."""
        if self.gradient is not None:
            self.gradient = self.gradient.to(self.reduce_dtype)
        self.accumulated, self.arrived = self.accumulated | self.arrived, set()

    def gradient_of(self, i):
        """The place of parameter i in the flat gradient, in its shape."""
        return self.gradient[self.starts[i] : self.starts[i] + self.lengths[i]].view(self.parameters[i].shape)

    def reduce_scatter(self, collectives):
        """Start to reduce the flat gradient, zero where none has arrived; the next gradients begin another one."""
        flat = self.unsharded.new_zeros(len(self.unsharded)) if self.gradient is None else self.gradient
        for i, part in enumerate(flat.split(self.lengths)):
            if not self.has_gradient(i):
                part.zero_()
        self.forget_gradient()
        return collectives.reduce_scatter(flat.to(self.reduce_dtype), self.sizes)

    def forget_gradient(self):
        self.gradient, self.arrived, self.accumulated = None, set(), set()

    def give_gradients(self, reduced, used):
        """Wait for the reduce-scatter `reduced`, and add to each local shard's gradient its part of the mean, but only
        where `used`. Then call the hooks of `register_post_accumulate_grad_hook`, as autograd would."""
        shard = reduced.result().to(self.shard.dtype)
        for local, span, any_rank in zip(self.local_shards, self.spans, used, strict=True):
            if any_rank and local.grad is None:
                local.grad = shard[span]
            elif any_rank:
                local.grad += shard[span]
            for hook in list((local._post_accumulate_grad_hooks or {}).values()) if any_rank else ():
                hook(local)
