"""The exercise average_in_hooks."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.gradients import PAIRS, Sample, gradients, judge_average, loss_of, rows_of_rank
from ..exercises.judge import Wrong
from ..exercises.watch import calls_so_far, watched
from .shared import group

hints = (
    "p.register_post_accumulate_grad_hook(f) calls f(p) in every backward, once p.grad is complete. What it is "
    "given is the parameter: its gradient is p.grad.",
    "Define one function of p that does to p.grad what average_gradients of lesson 0 did, and register it with "
    "each parameter whose requires_grad is True.",
    "A lambda in a loop that uses the loop's variable sees its last value: use the hook's own argument.",
)


def check(run):
    cases = [
        (4, F64, False, False, False), (4, F32, True, False, False), (4, F64, True, True, False),
        (3, F64, True, False, False), (4, F64, True, False, True), (4, F64, True, False, False, True),
        (4, F64, True, False, False, False, 1),
    ]  # fmt: skip
    for n, dtype, same_weights, in_pairs, second, *more in cases:
        placed, zero = any(more[:1]), len(more) > 1
        about = "two groups of 2 ranks" if in_pairs else f"{n} ranks"
        about += ", the second backward" if second else ", a parameter added to a layer's result" if placed else ""
        about += ", all gradients of rank 1 zero" if zero else ""
        stuck = "rank 1 does not make the calls that the others make: its gradients are zero here, and count" * zero
        seen = run(_hooked, dtype, same_weights, in_pairs, second, *more, n=n, about=about, stuck=stuck)
        try:
            judge_average(seen, PAIRS if in_pairs else [list(range(n))], about)
        except Wrong as wrong:
            if wrong.diagnosis.startswith("the weights have changed"):
                wrong.diagnosis = f"a hook is given the parameter p, not its gradient p.grad: {wrong.diagnosis}"
            elif wrong.diagnosis.startswith("only extra.bias is averaged"):
                wrong.diagnosis += ". Does the hook use the loop's variable, which is the last parameter by then?"
            elif placed:
                wrong.diagnosis = (
                    "register_hook is given a gradient on its way: the layers below are computed from the same "
                    f"tensor, so average a copy of it ({wrong.diagnosis})"
                )
            raise
        for rank, one in enumerate(seen):
            if one.kept["early"]:
                raise Wrong(
                    f"{one.kept['early']} calls are made before there is any gradient: average in the hooks only",
                    f"rank {rank}, {about}",
                )
            if one.kept["made"]:
                why = f"{one.kept['made'][0]} has a gradient before any backward: what no rank uses would keep it"
                raise Wrong(why, f"rank {rank}, {about}")
            if not one.kept["within"]:
                raise Wrong(
                    "the means are made after backward, not in it: each gradient's hook makes its own",
                    f"rank {rank}, {about}",
                )


class Placed(Sample):
    """Sample with a parameter added to what a layer gives: backward hands one tensor to both."""

    def __init__(self, seed, dtype):
        super().__init__(seed, dtype)
        self.place = torch.nn.Parameter(values((3, 8), dtype, seed, 5))

    def forward(self, x):
        return self.extra(torch.tanh(self.fc2(torch.tanh(self.fc1(x)) + self.place)))


def _hooked(answer, dtype, same_weights, in_pairs, second, placed=False, zero_on=None):
    rank, kept, kind = dist.get_rank(), {}, Placed if placed else Sample
    model, twin = (kind(1 if same_weights else 1 + rank, dtype) for _ in range(2))
    scale = float(rank != zero_on)
    (loss_of(twin, rows_of_rank(1 + second, rank, dtype)) * scale).backward()
    before, weights = gradients(twin), {name: p.detach().clone() for name, p in model.named_parameters()}

    trainable = {name: p.numel() * p.element_size() for name, p in model.named_parameters() if p.requires_grad}

    def first_layer(gradient):  # the last one to be computed
        kept["within"] = calls_so_far() > kept["started"]

    def everything():
        sequence = calls_so_far()
        answer(model, **group(in_pairs))
        kept["early"] = calls_so_far() - sequence
        kept["made"] = [name for name, p in model.named_parameters() if p.grad is not None]
        model.fc1.weight.register_hook(first_layer)
        for backward in range(1 + second):
            model.zero_grad()
            kept["started"], kept["earlier calls"] = calls_so_far(), calls_so_far() - sequence
            (loss_of(model, rows_of_rank(1 + backward, rank, dtype)) * scale).backward()

    seen = watched(everything)
    seen.calls = seen.calls[kept["earlier calls"] :] if second else seen.calls
    seen.ops = set()  # backward's own divisions are among them
    touched = [name for name, p in model.named_parameters() if not torch.equal(p, weights[name])]
    turned = [name for name, p in model.named_parameters() if p.requires_grad != (name in trainable)]
    seen.kept = {"before": before, "after": gradients(model), "touched": touched, "turned": turned, **kept}
    seen.kept["trainable"] = trainable
    return seen


exercise = Exercise(hints, check)
