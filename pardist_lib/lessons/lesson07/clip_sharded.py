"""Clip a sharded gradient to its global norm. Typical: norms added up, each rank scaled by its own norm."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, number, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, same
from ..exercises.watch import watched

hints = (
    "The norm is a square root of a sum of squares. Sums can be taken rank by rank and then over the ranks; square "
    "roots cannot.",
    "Add up the squares of this rank's elements in a tensor of one number, all_reduce that, then take the root. "
    "A rank without tensors takes part with 0.",
    "if norm > max_norm: for g in gradients: g *= max_norm / norm. Return norm.",
)


def check(run):
    # ranks, whether the last has gradients, too, their dtype and scale, max_norm
    cases = [(4, True, F64, 1.0, 0.5), (4, True, F64, 0.01, 0.5), (4, False, F64, 1.0, 0.5), (3, True, F32, 3.0, 0.5)]
    cases += [(2, False, F32, 2.0, 0.5), (4, True, F32, 0.0, 0.5), (4, True, F64, 1.0, 8.0)]
    for seed, (n, all_have, dtype, scale, most) in enumerate(cases):
        about, stuck = f"{n} ranks, {str(dtype)[6:]} gradients, max_norm {most}", ""
        if not all_have:
            about += f", rank {n - 1} has none"
            stuck = f"rank {n - 1} has no gradients here, and does not make the call that the others make"
        seen = run(_clipped, all_have, dtype, seed, scale, most, n=n, about=about, stuck=stuck)
        given = [_gradients(rank, n, all_have, dtype, seed, scale) for rank in range(n)]
        _judge_messages(seen, given, about)
        norm = _judge_norm(seen, given, dtype, most, about)
        _judge_scaling(seen, [_flat(tensors, dtype) for tensors in given], norm, most, about)
        for rank, one in enumerate(seen):
            reduced = [call.bytes for call in one.calls if call.op == "all_reduce"]
            if len(reduced) > 1 or len(one.calls) > 2 * n:
                why = f"the result is right, but it takes {len(one.calls)} calls: one is enough"
                raise Wrong(why, f"rank {rank}, {about}")
            if max(reduced, default=0) > 8:
                why = f"the result is right, but the all_reduce carries {reduced[0]} bytes: one number is enough"
                raise Wrong(why, f"rank {rank}, {about}", "8 bytes", f"{reduced[0]} bytes")


def _gradients(rank, n, all_have, dtype, seed, scale):
    shapes = [(3,), (0,), (2, 2)] if rank % 2 else [(5,), (1,)]
    shapes = shapes if all_have or rank < n - 1 else []
    return [values(shape, dtype, 10 * rank + i, seed) * scale for i, shape in enumerate(shapes)]


def _flat(tensors, dtype):
    return torch.cat([torch.empty(0, dtype=dtype), *(t.flatten() for t in tensors)])


def _clipped(answer, all_have, dtype, seed, scale, most):
    tensors = _gradients(dist.get_rank(), dist.get_world_size(), all_have, dtype, seed, scale)
    seen = watched(answer, list(tensors), most)
    seen.kept = _flat(tensors, dtype)
    return seen


def _judge_messages(seen, given, about):
    for rank, one in enumerate(seen):
        for call in one.calls:
            if call.op == "barrier":
                raise Wrong("it calls barrier: the all_reduce itself waits for everybody", f"rank {rank}, {about}")
            if call.bytes > 16 * max(len(seen), len(given[rank])) and call.op != "recv":
                why = f"its {call.op} moves {call.bytes} bytes, as if the gradients travelled: one number is enough"
                shown = "at most 8 bytes", f"{call.bytes} bytes"
                raise Wrong(f"{why}, the sum of squares", f"rank {rank}, {about}", *shown)


def _judge_norm(seen, given, dtype, most, about):
    n, everything = len(seen), torch.cat([_flat(tensors, dtype) for tensors in given]).double()
    of_tensors = [torch.stack([torch.zeros(()).double(), *(t.double().norm() for t in tensors)]) for tensors in given]
    own, norm = torch.stack([norms.norm() for norms in of_tensors]), everything.norm()
    summed = torch.stack([norms.sum() for norms in of_tensors])
    mistakes = [
        ("each rank returns the norm of its own gradients: the squares have to be added up over the ranks", list(own)),
        ("the ranks' norms were added: norms do not add up, their squares do", own.sum()),
        ("the square root is missing: this is the sum of squares", norm**2),
        ("the mean over the ranks was taken, where the sum is asked for", norm / n**0.5),
        ("the mean of the ranks' norms is not the norm of all", own.mean()),
        ("the largest of the ranks' norms is not the norm of all", own.max()),
        ("this is the norm after clipping: the one before is asked for", norm.clamp(max=most)),
        ("this is the factor, not the norm", most / norm),
        ("this is the largest element, not the root of the sum of squares", everything.abs().max()),
        ("this is the sum of absolute values, not the root of the sum of squares", everything.abs().sum()),
        ("the tensors' norms were added: norms do not add up, their squares do", summed.sum()),
        ("the tensors' norms were added: norms do not add up, their squares do", summed.norm()),
    ]
    got = [number(one.result) for one in seen]
    got = [value.double() if isinstance(value, torch.Tensor) else value for value in got]
    same(got, norm, "the norm", about, mistakes, tolerance=None if dtype == F64 else (1e-5, 1e-7))
    return norm


def _judge_scaling(seen, before, norm, most, about):
    n = len(seen)

    def times(*factors):  # one for each rank, or one for all
        return [b * float(f) for b, f in zip(before, factors * (n // len(factors)), strict=True)]

    factor = most / norm if norm else 1.0
    right = times(min(1.0, factor))
    mistakes = [(f"max_norm is not used: it is {most} here, and not {f}", times(f / norm)) for f in (0.5, 1.0)
                if f != most and norm > f]  # fmt: skip
    if norm < most < norm**2:
        why = "the norm is below max_norm, and yet the gradients are scaled up to it: what is compared with max_norm, "
        mistakes.append((f"{why}the sum of squares?", times(factor)))
    mistakes += [
        ("the gradients are as they were: scale them in place (g *= …)", before),
        (f"divided by {n}, besides: one factor for all, max_norm / norm", times(factor / n)),
        ("gradients below max_norm were scaled up to it: clip only where the norm is above", times(most / norm)),
        ("each rank scaled by its own norm: one factor for all, from the global norm",
         times(*(min(1.0, most / float(b.double().norm())) if b.any() else 1.0 for b in before))),
        ("scaled by max_norm / norm twice", times(min(1.0, factor**2))),
        ("divided by the norm, but not multiplied by max_norm", times(1 / norm if norm else 1.0)),
        ("every element was clamped to ±max_norm: that changes the gradient's direction",
         [b.clamp(-most, most) for b in before]),
    ]  # fmt: skip
    close = (1e-6, 1e-9) if before[0].dtype == F64 else (1e-4, 1e-7)  # many add 1e-6 to the norm
    same([one.kept for one in seen], right, "the gradient", about, mistakes, tolerance=close)


why = (
    "Squares of disjoint elements add up, so one all-reduced number gives every rank the same factor. FSDP1 has a "
    "method of its own for it, as here; FSDP2's gradients are DTensors, for which torch's own clip_grad_norm_ is "
    "right."
)
exercise = Exercise(hints, check, minutes=15, level="medium", why=why)
