"""What data-parallel ranks do with gradients, where each has some of the experts and all have the rest.

Say that N ranks each take the mean loss of their own tokens, as data-parallel ranks do, and that all have as many: one
process's gradient is 1/N of the sum over ranks. After backward

    what every rank has    has the rank's own part in its gradient: added up over all N, divided by N
    an expert              has the parts of all n ranks of its expert group, whose tokens came to it: added up over
                           the N/n ranks that have the same expert, and divided by N as well, not by N/n

To average the experts' gradients over N/n ranks makes them n times too large; to do nothing where n = N, too. A
wrapper that averages a whole model over the N ranks, as DataParallel does, refuses it: their experts' names differ.
"""

import torch
import torch.distributed as dist

from ..collectives.agreement import sum_over_ranks
from .checks import check_clip, check_replicas
from .layer import ExpertParallel


@torch.no_grad()
def average_gradients(model, group=None, replicas=None):
    """Make the gradients of a model with `ExpertParallel` layers one process's: after backward, before the step.

    group: all N data-parallel ranks, None for all there are. replicas: the N/n of them that have the same experts as
    this rank; None where there are no others, because the experts' group is the whole one.
    A rank's loss is the mean over its own tokens. Where ranks have unequally many: N · its own sum / all tokens.
    Ranks whose losses are otherwise weighted do the same to experts and to the rest.

    All-reduces the bytes of all gradients outside the experts over `group`, and of this rank's experts over `replicas`.
    Every rank needs gradients for the same parameters. Raises ValueError where n · replicas are not N.
    """
    layers = [m for m in model.modules() if isinstance(m, ExpertParallel)]
    n = check_replicas(layers, group, replicas)
    experts = {p for layer in layers for p in layer.experts.parameters()}
    theirs = [p.grad for p in model.parameters() if p in experts and p.grad is not None]
    others = [p.grad for p in model.parameters() if p not in experts and p.grad is not None]
    sums = sum_over_ranks(others, group, scale=1 / n)
    sums += [g / n for g in theirs] if replicas is None else sum_over_ranks(theirs, replicas, scale=1 / n)
    for gradient, mean in zip(others + theirs, sums, strict=True):
        gradient.copy_(mean)


@torch.no_grad()
def clip_grad_norm_(model, max_norm, norm_type=2.0):
    """As torch.nn.utils.clip_grad_norm_ of the whole model, the same on every rank: after `average_gradients`. Returns
    the norm. Of experts all ranks' count, of what every rank has, its own.

    norm_type: a number above 0, or inf. All-reduces one number in each group of experts. Raises ValueError where tensor
    parallelism has split something as well: that norm needs another sum.
    """
    check_clip(model, norm_type)
    groups = {p: m.group for m in model.modules() if isinstance(m, ExpertParallel) for p in m.experts.parameters()}
    gradients = {p: p.grad for p in model.parameters() if p.grad is not None}
    device = next(model.parameters()).device
    highest = float(norm_type) == float("inf")

    def norm_of(tensors):
        each = [torch.linalg.vector_norm(t, norm_type).double().to(device) for t in tensors]
        return torch.linalg.vector_norm(torch.stack(each or [torch.zeros((), device=device).double()]), norm_type)

    norms = [norm_of([g for p, g in gradients.items() if p not in groups])]
    for group in dict.fromkeys(groups.values()):
        part = norm_of([g for p, g in gradients.items() if p in groups and groups[p] is group])
        power = part if highest else part**norm_type
        dist.all_reduce(power, dist.ReduceOp.MAX if highest else dist.ReduceOp.SUM, group)
        norms.append(power if highest else power ** (1 / norm_type))
    norm = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    for gradient in gradients.values():
        gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(gradient.dtype))
    return norm
