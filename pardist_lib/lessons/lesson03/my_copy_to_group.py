"""The exercise my_copy_to_group."""

import torch

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, same
from .shared import F32, F64, PAIRS, call_answer, differentiable, untouched

hints = (
    "A class inside the function does it: class Copy(torch.autograd.Function), with static methods forward(ctx, x) "
    "and backward(ctx, grad); then return Copy.apply(x).",
    "forward returns x.view_as(x). backward returns what is to be x's gradient: the sum over the ranks of what "
    "each rank's backward is given.",
    "dist.all_reduce works in place. total = grad.clone(memory_format=torch.contiguous_format) is yours to change.",
)


def check(run):
    for seed, (n, shape, dtype, options, new) in enumerate(COPY_CASES):
        about = f"{n} ranks, x {shape}" + (", groups (0, 2) and (1, 3)" if "groups" in options else "")
        try:
            seen = run(call_answer, shape, dtype, seed, options, n=n, about=about)
            _judge_copy(seen, about, options)
        except Wrong as wrong:
            if new:
                wrong.diagnosis = f"{new}: {wrong.diagnosis}"
            raise


COPY_CASES = [  # ranks, shape, dtype, options, what is new in it
    (4, (3, 5), F32, {}, ""),
    (4, (7,), F64, {}, ""),
    (4, (2, 3, 2), F32, {"layout": "strided"}, "where the gradient is not contiguous"),
    (4, (3, 2), F64, {"layout": "expanded"}, "where the gradient is one number for all elements (after a sum)"),
    (4, (3, 2), F64, {"direct": True}, "where x is used a second time, beside the layer"),
    (3, (4,), F32, {}, "with 3 ranks (is a 4 written into it?)"),
    (2, (2, 2), F64, {}, "with 2 ranks"),
    (4, (3,), F64, {"groups": PAIRS}, "in two groups of 2 ranks"),
    (4, (3,), F32, {"needs_grad": False}, "where x needs no gradient (it is data)"),
]


def _judge_copy(seen, about, options):
    n = len(seen)
    xs = [one.kept["x"] for one in seen]
    only_calls(seen, (), {"": "forward calls {op}: x is the same on every rank already, forward sends nothing"})
    untouched(seen, about)
    same([one.result for one in seen], xs, "the result", about, [
        ("x is divided by the number of ranks: forward leaves it as it is", [x / n for x in xs]),
    ])  # fmt: skip
    if not options.get("needs_grad", True):
        return
    differentiable(seen, about, "detach() and .data cut x off, and x would get no gradient")
    backward = {"": "backward calls {op}: one all_reduce of the gradient is all that is needed"}
    for rank, one in enumerate(seen):
        for call in one.kept["back"]:
            if call.op != "all_reduce":
                raise Wrong(backward[""].format(op=call.op), f"rank {rank}")
        if not one.kept["intact"]:
            raise Wrong(
                "the gradient that came in was changed: whoever else was handed it (the other branch of a residual "
                "connection, say) now has the sum too; all_reduce a clone of it", f"rank {rank}, {about}",
            )  # fmt: skip
    direct, gs = options.get("direct"), [one.kept["g"] for one in seen]
    for members in sorted({one.kept["members"] for one in seen}):
        k, mine = len(members), [gs[r] for r in members]
        total = sum(mine)
        extra = mine if direct else [torch.zeros_like(total)] * k
        everyone = sum(gs)
        mistakes = [
            ("nothing is added up: each rank passes on its own part of the gradient (the all_reduce is missing)",
             [g + e for g, e in zip(mine, extra, strict=True)]),
            (f"divided by {k}: the parts of a gradient are summands, their mean is {k} times too small",
             [total / k + e for e in extra]),
            (f"{k} times too large: every rank had the sum, and it was added up again", [k * total + e for e in extra]),
        ]  # fmt: skip
        if direct:
            mistakes.append(("what x gets from its other use is added up over the ranks, too: give the result a hook "
                             "of its own, not x", [2 * total] * k))  # fmt: skip
        if k < n:
            mistakes[:0] = [("the group argument is ignored: this is the sum over all ranks",
                             [everyone + e for e in extra])]  # fmt: skip
        same([seen[r].kept["grad"] for r in members], [total + e for e in extra], "x.grad", about, mistakes,
             labels=list(members))  # fmt: skip
        for rank in members:
            made, fair = [call.bytes for call in seen[rank].kept["back"]], total.numel() * total.element_size()
            if sum(made) != fair or len(made) > 1:
                raise Wrong(f"the gradient is right, but {len(made)} all_reduce of {sum(made):,} bytes are made for a "
                            f"gradient of {fair:,}", f"rank {rank}, {about}")  # fmt: skip


exercise = Exercise(hints, check)
