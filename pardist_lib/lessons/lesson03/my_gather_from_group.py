"""The exercise my_gather_from_group."""

import torch

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, equal, only_calls, same
from .shared import F32, F64, PAIRS, call_answer, differentiable, untouched

hints = (
    "dist.all_gather(parts, x) fills a list of n tensors of x's shape; torch.cat(parts, -1) puts them side by "
    "side. torch.distributed's calls know nothing of autograd: the result would have no gradient.",
    "A torch.autograd.Function with its own backward is one way: backward gets the whole gradient and returns "
    "grad.tensor_split(n, -1)[rank].",
    "There is a shorter one: put x itself into the list, parts[rank] = x, before torch.cat. Then autograd knows "
    "that part, and the gradient of a part of a cat is its slice.",
)


def check(run):
    for seed, (n, shape, dtype, options, new) in enumerate(GATHER_CASES):
        about = f"{n} ranks, each with x {shape}" + (", groups (0, 2) and (1, 3)" if "groups" in options else "")
        try:
            seen = run(call_answer, shape, dtype, seed, {"alike": True, **options}, n=n, about=about)
            _judge_gathered(seen, about, options)
        except Wrong as wrong:
            if new:
                wrong.diagnosis = f"{new}: {wrong.diagnosis}"
            raise


GATHER_CASES = [  # ranks, shape, dtype, options, what is new in it
    (4, (3, 2), F32, {}, ""),
    (4, (2, 3, 1), F64, {}, ""),
    (4, (3,), F64, {}, "where x has one dimension"),
    (4, (2, 2), F32, {"layout": "strided"}, "where the gradient is not contiguous"),
    (3, (4, 2), F32, {}, "with 3 ranks (is a 4 written into it?)"),
    (2, (2, 2), F64, {}, "with 2 ranks"),
    (4, (3, 2), F64, {"groups": PAIRS}, "in two groups of 2 ranks"),
    (4, (3,), F32, {"needs_grad": False}, "where x needs no gradient"),
]


def _judge_gathered(seen, about, options):
    xs = [one.kept["x"] for one in seen]
    why = {"all_reduce": "forward calls all_reduce, which adds the parts up: side by side they are gathered",
           "": "forward calls {op}: one all_gather is all that is needed"}  # fmt: skip
    only_calls(seen, ("all_gather",), why)
    untouched(seen, about)
    size = xs[0].numel() * xs[0].element_size()
    for members in sorted({one.kept["members"] for one in seen}):
        n, mine = len(members), [xs[r] for r in members]
        got, whole = [seen[r].result for r in members], torch.cat(mine, -1)
        for rank, result in zip(members, got, strict=True):
            if isinstance(result, torch.Tensor) and result.shape != whole.shape:
                stacked, rows = torch.stack(mine), torch.cat(mine)
                if equal(result, rows) or equal(result, stacked) or equal(result, torch.cat(xs)):
                    raise Wrong("the parts lie one under the other: torch.cat(parts, -1) puts features side by side",
                                f"rank {rank}, {about}", str(tuple(whole.shape)), str(tuple(result.shape)))  # fmt: skip
                if n < len(xs) and equal(result, torch.cat(xs, -1)):
                    raise Wrong("the group argument is ignored: these are all ranks' features", f"rank {rank}, {about}")
        own_first = [torch.cat([mine[i], *mine[:i], *mine[i + 1 :]], -1) for i in range(n)]
        same(got, [whole] * n, "the result", about, [
            ("the parts are in reverse order", [torch.cat(mine[::-1], -1)] * n),
            ("a rank's own part comes first: rank 0's is first on every rank", own_first),
            ("x stands where rank 0's part belongs: a rank's place is its own number", [
                torch.cat([m, *mine[1:]], -1) for m in mine]),
            ("every part is the rank's own", [torch.cat([m] * n, -1) for m in mine]),
        ], labels=list(members))  # fmt: skip
    if not options.get("needs_grad", True):
        return
    differentiable(seen, about, "torch.distributed's all_gather has no backward, so x would get no gradient")
    for members in sorted({one.kept["members"] for one in seen}):
        _judge_slices(seen, members, about, size)


def _judge_slices(seen, members, about, size):
    for rank in members:
        if not seen[rank].kept["intact"]:
            raise Wrong("the gradient that came in was changed: work on a copy of it", f"rank {rank}, {about}")
    n, g = len(members), seen[members[0]].kept["g"]
    parts = list(g.tensor_split(n, -1))
    mistakes = [
        (f"{n} times too large: every rank found the whole gradient by itself, and adding {n} equal ones counts it {n} "
         "times", [n * part for part in parts]),
        (f"divided by {n}: a rank's slice goes on as it is", [part / n for part in parts]),
        ("every rank gets rank 0's slice", [parts[0]] * n),
        ("the slices are in reverse order", parts[::-1]),
    ]  # fmt: skip
    same([seen[r].kept["grad"] for r in members], parts, "x.grad", about, mistakes, labels=list(members))
    for rank in members:
        back, made = seen[rank].kept["back"], [call.bytes for call in seen[rank].calls]
        if back:
            raise Wrong(f"x.grad is right, but backward calls {back[0].op}: every rank has the whole gradient, and its "
                        "slice costs nothing", f"rank {rank}, {about}")  # fmt: skip
        if len(made) != 1 or made[0] not in (size, n * size):  # what a rank gives, or room for what it gets
            raise Wrong(f"the result is right, but it takes {len(made)} all_gather of {sum(made):,} bytes: one is "
                        f"enough, to which each rank gives {size:,}", f"rank {rank}, {about}")  # fmt: skip


exercise = Exercise(hints, check)
