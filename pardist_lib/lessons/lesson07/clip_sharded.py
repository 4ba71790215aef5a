"""The exercise clip_sharded."""

import torch
import torch.distributed as dist

from ..exercises.cases import number, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, same
from ..exercises.watch import watched
from .shared import F32, F64

hints = (
    "The norm is a square root of a sum of squares. Sums can be taken rank by rank and then over the ranks; square "
    "roots cannot.",
    "Add up the squares of this rank's elements in a tensor of one number, all_reduce that, then take the root. "
    "A rank without tensors takes part with 0.",
    "if norm > max_norm: for g in gradients: g *= max_norm / norm. Return norm.",
)


def check(run):
    cases = [(4, "", F64, 1.0, 0.5), (4, "", F64, 0.01, 0.5), (4, "last has none", F64, 1.0, 0.5),
             (3, "", F32, 3.0, 0.5), (2, "last has none", F32, 2.0, 0.5), (4, "", F32, 0.0, 0.5),
             (4, "", F64, 1.0, 8.0)]  # fmt: skip
    for seed, (n, shapes, dtype, scale, most) in enumerate(cases):
        about = f"{n} ranks, {str(dtype)[6:]} gradients, max_norm {most}"
        about += f", rank {n - 1} has none" if shapes else ""
        stuck = f"rank {n - 1} has no gradients here, and does not make the call that the others make" if shapes else ""
        seen = run(_clip, shapes, dtype, seed, scale, most, n=n, about=about, stuck=stuck)
        _judge_clip(seen, shapes, dtype, seed, scale, most, about)


def _gradients(rank, n, shapes, dtype, seed, scale):
    """This rank's tensors; the last rank has none where `shapes` says so."""
    mine = [] if shapes == "last has none" and rank == n - 1 else [(3,), (0,), (2, 2)] if rank % 2 else [(5,), (1,)]
    return [values(shape, dtype, 10 * rank + i, seed) * scale for i, shape in enumerate(mine)]


def _clip(answer, shapes, dtype, seed, scale, most):
    tensors = _gradients(dist.get_rank(), dist.get_world_size(), shapes, dtype, seed, scale)
    seen = watched(lambda: answer(list(tensors), most))
    seen.kept = torch.cat([torch.empty(0, dtype=dtype), *(t.flatten() for t in tensors)])
    return seen


def _judge_clip(seen, shapes, dtype, seed, scale, most, about):
    n = len(seen)
    before = [
        torch.cat([torch.empty(0, dtype=dtype), *(t.flatten() for t in _gradients(r, n, shapes, dtype, seed, scale))])
        for r in range(n)
    ]
    own = [b.double().norm() for b in before]
    norm = torch.cat(before).double().norm()
    many = [len(_gradients(r, n, shapes, dtype, seed, scale)) for r in range(n)]
    for rank, one in enumerate(seen):
        for call in one.calls:
            if call.op == "barrier":
                raise Wrong("it calls barrier: the all_reduce itself waits for everybody", f"rank {rank}, {about}")
            if call.bytes > 16 * max(n, many[rank]) and call.op != "recv":
                raise Wrong(
                    f"its {call.op} moves {call.bytes} bytes, as if the gradients travelled: one number is enough, "
                    "the sum of squares", f"rank {rank}, {about}", "at most 8 bytes", f"{call.bytes} bytes",
                )  # fmt: skip
    got = [number(one.result) for one in seen]
    got = [g.double() if isinstance(g, torch.Tensor) else g for g in got]
    exact, close = (None, (1e-6, 1e-9)) if dtype == F64 else ((1e-5, 1e-7), (1e-4, 1e-7))  # many add 1e-6 to the norm
    of_tensors = [[t.double().norm() for t in _gradients(r, n, shapes, dtype, seed, scale)] for r in range(n)]
    mistakes = [
        ("each rank returns the norm of its own gradients: the squares have to be added up over the ranks", own),
        ("the ranks' norms were added: norms do not add up, their squares do", [sum(own)] * n),
        ("the square root is missing: this is the sum of squares", [norm**2] * n),
        ("the mean over the ranks was taken, where the sum is asked for", [norm / n**0.5] * n),
        ("the mean of the ranks' norms is not the norm of all", [sum(own) / n] * n),
        ("the largest of the ranks' norms is not the norm of all", [max(own)] * n),
        ("this is the norm after clipping: the one before is asked for", [norm.clamp(max=most)] * n),
        ("this is the factor, not the norm", [most / norm] * n),
        ("this is the largest element, not the root of the sum of squares",
         [torch.cat(before).double().abs().max()] * n),
        ("this is the sum of absolute values, not the root of the sum of squares",
         [torch.cat(before).double().abs().sum()] * n),
        ("the tensors' norms were added: norms do not add up, their squares do", [sum(sum(of_tensors, []))] * n),
        ("the tensors' norms were added: norms do not add up, their squares do",
         [sum(sum(norms) ** 2 for norms in of_tensors) ** 0.5] * n),
    ]  # fmt: skip
    same(got, [norm] * n, "the norm", about, mistakes, tolerance=exact)

    def times(factor):
        return [b * float(f) for b, f in zip(before, factor if isinstance(factor, list) else [factor] * n, strict=True)]

    right = times(min(1.0, most / norm) if norm else 1.0)
    squared = times(most / norm if norm**2 > most else 1.0)
    fixed = [f for f in (0.5, 1.0) if f != most and norm > f]
    mistakes = [
        *((f"max_norm is not used: it is {most} here, and not {f}", times(f / norm)) for f in fixed),
        *[("the norm is below max_norm, and yet the gradients are scaled up to it: what is compared with max_norm, the "
           "sum of squares?", squared)] * bool(norm < most < norm**2),
        ("the gradients are as they were: scale them in place (g *= …)", before),
        (f"divided by {n}, besides: one factor for all, max_norm / norm", times(most / norm / n if norm else 1.0)),
        ("gradients below max_norm were scaled up to it: clip only where the norm is above", times(most / norm)),
        ("each rank scaled by its own norm: one factor for all, from the global norm",
         times([min(1.0, most / float(o)) if o else 1.0 for o in own])),
        ("scaled by max_norm / norm twice", times(min(1.0, (most / norm) ** 2) if norm else 1.0)),
        ("divided by the norm, but not multiplied by max_norm", times(1 / norm if norm else 1.0)),
        ("every element was clamped to ±max_norm: that changes the gradient's direction",
         [b.clamp(-most, most) for b in before]),
    ]  # fmt: skip
    same([one.kept for one in seen], right, "the gradient", about, mistakes, tolerance=close)
    for rank, one in enumerate(seen):
        reduced = [call.bytes for call in one.calls if call.op == "all_reduce"]
        if len(reduced) > 1 or len(one.calls) > 2 * n:
            raise Wrong(
                f"the result is right, but it takes {len(one.calls)} calls: one is enough", f"rank {rank}, {about}"
            )
        if max(reduced, default=0) > 8:
            raise Wrong(
                f"the result is right, but the all_reduce carries {reduced[0]} bytes: one number is enough, 8 bytes",
                f"rank {rank}, {about}",
            )


exercise = Exercise(hints, check)
