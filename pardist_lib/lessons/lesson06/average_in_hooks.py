"""Means made in hooks, during backward. Typical: the parameter averaged, the loop's variable, register_hook."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, groups_of, own_group, values
from ..exercises.exercise import Exercise
from ..exercises.gradients import Sample, gradients, judge_average, loss_of, rows_of_rank
from ..exercises.judge import Wrong
from ..exercises.watch import calls_so_far
from .shared import watched_on

hints = (
    "p.register_post_accumulate_grad_hook(f) calls f(p) in every backward, once p.grad is complete. What it is "
    "given is the parameter: its gradient is p.grad.",
    "Define one function of p that does to p.grad what average_gradients of lesson 0 did, and register it with "
    "each parameter whose requires_grad is True.",
    "A lambda in a loop that uses the loop's variable sees its last value: use the hook's own argument.",
)


def check(run):
    cases = [  # ranks, dtype, and what is not as in the others
        (4, F64, "other weights on each rank", "4 ranks"),
        (4, F32, "", "4 ranks"),
        (4, F64, "in pairs", "two groups of 2 ranks"),
        (3, F64, "", "3 ranks"),
        (4, F64, "second", "4 ranks, the second backward"),
        (4, F64, "placed", "4 ranks, a parameter added to a layer's result"),
        (4, F64, "zeros", "4 ranks, all gradients of rank 1 zero"),
    ]
    for n, dtype, case, about in cases:
        stuck = "rank 1 does not make the calls that the others make: its gradients are zero here, and count"
        seen = run(_hooked, dtype, case, n=n, about=about, stuck=stuck * (case == "zeros"), raises=RAISES)
        try:
            judge_average(seen, groups_of(case == "in pairs", n), about)
        except Wrong as wrong:
            if wrong.diagnosis.startswith("the weights have changed"):
                wrong.diagnosis = f"a hook is given the parameter p, not its gradient p.grad: {wrong.diagnosis}"
            elif wrong.diagnosis.startswith("only extra.bias is averaged"):
                wrong.diagnosis += ". Does the hook use the loop's variable, which is the last parameter by then?"
            elif wrong.diagnosis.startswith("nothing was exchanged") and case == cases[0][2]:
                why = "p.grad is None before the first backward, so p.requires_grad tells which have one"
                wrong.diagnosis += f". Is a hook registered with each parameter? ({why})"
            elif "was not divided by" in wrong.diagnosis:
                wrong.diagnosis += " (p.grad / n alone makes a new tensor: p.grad /= n)"
            elif case == "placed":
                why = "register_hook is given a gradient on its way: the layers below are computed from the same tensor"
                wrong.diagnosis = f"{why}, so average a copy of it ({wrong.diagnosis})"
            raise
        for rank, one in enumerate(seen):
            for why in one.kept["besides"]:
                raise Wrong(why, f"rank {rank}, {about}")


RAISES = [
    (r"doesn't require gradient", "a frozen parameter has no gradient to wait for: ask p.requires_grad"),
    (r"of type torch.Tensor.*\n?.*NoneType",
     "p.grad is not there yet. Is the hook called at once, hook(p), where hook is to be handed over? Or is it a "
     "register_hook, which comes before p.grad is set?"),
    (r"missing \d+ required positional|takes \d+ positional", "torch calls such a hook with the parameter alone"),
    (r"hook returned|hooks should return None", "such a hook returns nothing: it writes into p.grad"),
    (r"has no attribute 'register_post_accumulate_grad_hook'", "this hook is a parameter's, not the model's"),
]  # fmt: skip


class Placed(Sample):
    """Sample with a parameter added to what a layer gives: backward hands one tensor to both."""

    def __init__(self, seed, dtype):
        super().__init__(seed, dtype)
        self.place = torch.nn.Parameter(values((3, 8), dtype, seed, 5))

    def forward(self, x):
        return self.extra(torch.tanh(self.fc2(torch.tanh(self.fc1(x)) + self.place)))


def _hooked(answer, dtype, case):
    rank, kind, last = dist.get_rank(), Placed if case == "placed" else Sample, 1 + (case == "second")
    model, twin = (kind(1 + rank * case.startswith("other"), dtype) for _ in range(2))
    besides, at = [], {"the beginning": calls_so_far(), "first layer": 0}

    def backward(model, number):
        model.zero_grad()
        at["last backward"] = calls_so_far()
        loss = loss_of(model, rows_of_rank(number, rank, dtype))
        (loss * float(case != "zeros" or rank != 1)).backward()

    def everything():
        answer(model, **own_group(case == "in pairs"))
        if early := calls_so_far() - at["the beginning"]:
            besides.append(f"{early} calls are made before there is any gradient: average in the hooks only")
        if made := [name for name, p in model.named_parameters() if p.grad is not None]:
            besides.append(f"{made[0]} has a gradient before any backward: what no rank uses would keep it")
        model.fc1.weight.register_hook(lambda gradient: at.update({"first layer": calls_so_far()}))  # the last to come
        for number in range(1, last + 1):
            backward(model, number)

    backward(twin, last)
    seen = watched_on(model, everything)
    if at["first layer"] <= at["last backward"]:
        besides.append("the means are made after backward, not in it: each gradient's hook makes its own")
    seen.calls = seen.calls[(at["last backward"] - at["the beginning"]) * (case == "second") :]
    seen.ops = set()  # backward's own divisions are among them
    seen.kept |= {"before": gradients(twin), "besides": besides}
    return seen


WHY = (
    "The hook is called when a gradient is complete, so sums travel while backward goes on. DDP's hooks only mark"
    " a place in a bucket as full; the bucket is what is sent."
)

exercise = Exercise(hints, check, minutes=10, level="medium", why=WHY)
