"""Features side by side, and a way back; typically there is none, or it adds up what every rank has whole."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, groups_of, own_group, untouched, values, what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, only_calls, same
from .shared import judge_gradients, there_and_back

hints = (
    "dist.all_gather(parts, x) fills a list of n tensors of x's shape; torch.cat(parts, -1) puts them side by "
    "side. torch.distributed's calls know nothing of autograd: the result would have no gradient.",
    "A torch.autograd.Function with its own backward is one way: backward gets the whole gradient and returns "
    "grad.tensor_split(n, -1)[rank].",
    "There is a shorter one: put x itself into the list, parts[rank] = x, before torch.cat. Then autograd knows "
    "that part, and the gradient of a part of a cat is its slice.",
)


def check(run):
    for seed, (n, shape, dtype, kind, new) in enumerate(CASES):
        about = f"{n} ranks, each with x {shape}" + (", groups (0, 2) and (1, 3)" if kind == "pairs" else "")
        with what_is_new(new):
            seen = run(_gather, shape, dtype, kind, seed, n=n, about=about, raises=RAISES)
            only_calls(seen, ("all_gather",), OTHER_CALLS)
            untouched(seen, about)
            xs, groups = [one.kept["given"]["x"] for one in seen], groups_of(kind == "pairs", n)
            for members in groups:
                _judge_forward(members, xs, [seen[r].result for r in members], about)
            for members in groups if kind != "data" else ():
                _judge_backward(members, [seen[r] for r in members], about)


CASES = [  # ranks, shape, dtype, what kind of case it is, what is new in it
    (4, (3, 2), F32, "", ""),
    (4, (2, 3, 1), F64, "", ""),
    (4, (3,), F64, "", "where x has one dimension"),
    (4, (2, 2), F32, "strided", "where the gradient is not contiguous"),
    (3, (4, 2), F32, "", "with 3 ranks (is a 4 written into it?)"),
    (2, (2, 2), F64, "", "with 2 ranks"),
    (4, (3, 2), F64, "pairs", "in two groups of 2 ranks"),
    (4, (3,), F32, "data", "where x needs no gradient"),
]
RAISES = [
    (r"invalid output tensor list",
     "all_gather_into_tensor puts the parts one under the other, along the first dimension: all_gather into a list of "
     "n tensors, then torch.cat(parts, -1)"),
]  # fmt: skip
OTHER_CALLS = {
    "all_reduce": "forward calls all_reduce, which adds the parts up: side by side they are gathered",
    "": "forward calls {op}: one all_gather is all that is needed",
}


def _gather(answer, shape, dtype, kind, seed):
    options = own_group(kind == "pairs")
    whole = (*shape[:-1], shape[-1] * dist.get_world_size(**options))
    g = values(whole, dtype, 20 + (dist.get_rank() % 2 if kind == "pairs" else 0), seed)  # the same in a group
    g = torch.stack([g, g + 1], -1)[..., 0] if kind == "strided" else g
    x = values(shape, dtype, dist.get_rank(), seed)
    return there_and_back(answer, {"x": x}, g, needs_grad=kind != "data", **options)


def _side_by_side(*parts):
    return torch.cat(parts, -1)


def _judge_forward(members, everyone, got, about):
    xs = [everyone[r] for r in members]
    whole, n = _side_by_side(*xs), len(members)
    under = "the parts lie one under the other: torch.cat(parts, -1) puts features side by side"
    ways = [(under, wrong) for wrong in (torch.cat(xs), torch.stack(xs), torch.cat(everyone))]
    if xs[0].dim() > 2:
        ways.append(("features are the last dimension, -1, however many there are", torch.cat(xs, 1)))
    ways += [("stack makes a new dimension: torch.cat(parts, -1) puts features side by side", torch.stack(xs, -1))]
    ways += [("the group argument is ignored: these are all ranks' features", _side_by_side(*everyone))]
    for rank, result in zip(members, got, strict=True):
        for why, wrong in ways:
            if wrong.shape != whole.shape and equal(result, wrong):
                raise Wrong(why, f"rank {rank}, {about}", str(tuple(whole.shape)), str(tuple(wrong.shape)))
    once = "every part is the last rank's: [t] * n is one tensor n times, where n tensors are to be filled"
    own_first = [_side_by_side(xs[i], *xs[:i], *xs[i + 1 :]) for i in range(n)]
    mistakes = {
        "the parts are in reverse order": _side_by_side(*xs[::-1]),
        "a rank's own part comes first: rank 0's is first on every rank": own_first,
        "x stands where rank 0's part belongs, not in its own place": [_side_by_side(x, *xs[1:]) for x in xs],
        "every part is the rank's own": [_side_by_side(*[x] * n) for x in xs],
        once: _side_by_side(*[xs[-1]] * n),
        f"{once}, but in its own place": [
            _side_by_side(*[x if i == at else xs[-1] for i in range(n)]) for at, x in enumerate(xs)
        ],
    }
    same(got, whole, "the result", about, mistakes.items(), labels=members)


def _judge_backward(members, mine, about):
    n, parts = len(members), list(mine[0].kept["g"].tensor_split(len(members), -1))
    alone = f"every rank found the whole gradient by itself, and adding {n} equal ones counts it {n} times"
    mistakes = {
        f"{n} times too large: {alone}": [n * part for part in parts],
        f"divided by {n}: a rank's slice goes on as it is": [part / n for part in parts],
        "every rank gets rank 0's slice": parts[0],
        "the slices are in reverse order": parts[::-1],
    }
    lost = "torch.distributed's all_gather has no backward"
    free = "every rank has the whole gradient, and its slice costs nothing"
    judge_gradients(members, mine, [{"x": part} for part in parts], {"x": mistakes}, about, lost, free)
    size = parts[0].nbytes
    for rank, one in zip(members, mine, strict=True):
        made = [call.bytes for call in one.calls]
        if len(made) != 1 or made[0] not in (size, n * size):  # what a rank gives, or room for what it gets
            why = f"it takes {len(made)} all_gather of {sum(made):,} bytes: one is enough, to which each rank gives "
            raise Wrong(f"the result is right, but {why}{size:,}", f"rank {rank}, {about}")


why = (
    "All ranks go on to the same work and come back with the same whole gradient, so each takes its slice and "
    "adds up nothing. Megatron's gather_from_tensor_model_parallel_region does so too. torch.distributed.nn's "
    "all_gather adds up the ranks' gradients: right where each rank has its own loss, n times too much here."
)
exercise = Exercise(hints, check, minutes=12, level="medium", why=why)
