"""f: nothing forward, the sum backward; typically not summed, averaged, or summed where others hold it, too."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, groups_of, own_group, untouched, values, what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import as_many_bytes, only_calls, same
from .shared import judge_gradients, there_and_back

hints = (
    "A class inside the function does it: class Copy(torch.autograd.Function), with static methods forward(ctx, x) "
    "and backward(ctx, grad); then return Copy.apply(x).",
    "forward returns x.view_as(x). backward returns what is to be x's gradient: the sum over the ranks of what "
    "each rank's backward is given.",
    "dist.all_reduce works in place. total = grad.clone(memory_format=torch.contiguous_format) is yours to change.",
)


def check(run):
    for seed, (n, shape, dtype, kind, new) in enumerate(CASES):
        about = f"{n} ranks, x {shape}" + (", groups (0, 2) and (1, 3)" if kind == "pairs" else "")
        with what_is_new(new):
            seen = run(_copy, shape, dtype, kind, seed, n=n, about=about)
            only_calls(seen, (), {"": "forward calls {op}: x is the same on every rank already, forward sends nothing"})
            untouched(seen, about)
            xs = [one.kept["given"]["x"] for one in seen]
            divided = "x is divided by the number of ranks: forward leaves it as it is", [x / n for x in xs]
            same([one.result for one in seen], xs, "the result", about, [divided])
            if kind != "data":
                back = "backward calls {op}: one all_reduce of the gradient is all that is needed"
                only_calls([one.kept["back"] for one in seen], ("all_reduce",), {"": back})
                for members in groups_of(kind == "pairs", n):
                    _judge(members, [seen[r] for r in members], seen, kind == "beside", about)


CASES = [  # ranks, shape, dtype, what kind of case it is, what is new in it
    (4, (3, 5), F32, "", ""),
    (4, (7,), F64, "", ""),
    (4, (2, 3, 2), F32, "strided", "where the gradient is not contiguous"),
    (4, (3, 2), F64, "expanded", "where the gradient is one number for all elements (after a sum)"),
    (4, (3, 2), F64, "beside", "where x is used a second time, beside the layer"),
    (3, (4,), F32, "", "with 3 ranks (is a 4 written into it?)"),
    (2, (2, 2), F64, "", "with 2 ranks"),
    (4, (3,), F64, "pairs", "in two groups of 2 ranks"),
    (4, (3,), F32, "data", "where x needs no gradient (it is data)"),
]


def _copy(answer, shape, dtype, kind, seed):
    x = values(shape, dtype, dist.get_rank() % 2 if kind == "pairs" else 0, seed)  # the same in a group
    g = values((1,) if kind == "expanded" else shape, dtype, 20 + dist.get_rank(), seed).expand(shape)
    g = torch.stack([g, g + 1], -1)[..., 0] if kind == "strided" else g
    options = {"needs_grad": kind != "data", "beside": kind == "beside"}
    return there_and_back(answer, {"x": x}, g, **options, **own_group(kind == "pairs"))


def _judge(members, mine, seen, beside, about):
    n, own = len(members), [one.kept["g"] for one in mine]
    total, everyone = sum(own), sum(one.kept["g"] for one in seen)

    def and_beside(value):  # what comes back from the other use of x is each rank's own
        return [value + g * beside for g in own]

    ignored = "the group argument is ignored: this is the sum over all ranks"
    alone = "nothing is added up: each rank passes on its own part of the gradient (the all_reduce is missing"
    alone += ", or nobody calls this backward: is it Copy.apply(x)?)"
    other = "what x gets from its other use is added up over the ranks, too: give the result a hook of its own, not x"
    mistakes = {
        ignored: and_beside(everyone) if n < len(seen) else None,
        alone: [g * (1 + beside) for g in own],
        f"its own part times {n}: the others' parts are other numbers, so they have to be sent (all_reduce)": [
            g * (n + beside) for g in own
        ],
        f"divided by {n}: parts of a gradient are summands, their mean is {n} times too small": and_beside(total / n),
        f"{n} times too large: every rank had the sum, and it was added up again": and_beside(n * total),
        other: 2 * total if beside else None,
    }
    judge_gradients(members, mine, [{"x": x} for x in and_beside(total)], {"x": mistakes}, about)
    as_many_bytes(members, [one.kept["back"] for one in mine], "the gradient", total.nbytes, about)


why = (
    "All ranks have used the same x, so its gradient is the sum of what each found. Megatron's "
    "copy_to_tensor_model_parallel_region is this function; its ColumnParallelLinear starts the all-reduce of "
    "the gradient and computes the weight's gradient meanwhile."
)
exercise = Exercise(hints, check, minutes=12, level="medium", why=why)
