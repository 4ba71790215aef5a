"""The exercise broadcast_model."""

import torch
import torch.distributed as dist

from pardist_lib.ranks.report import plural

from ..exercises.cases import F32, F64, values
from ..exercises.exercise import Exercise
from ..exercises.gradients import PAIRS
from ..exercises.judge import Wrong, only_calls, same
from ..exercises.watch import watched
from .shared import group, in_their_group

hints = (
    "dist.broadcast(t, src) overwrites t on every rank by what rank src has. What does a model's state consist of?",
    "model.parameters() has the frozen ones, too, and a shared one once; model.buffers() has what is state but no "
    "parameter: a BatchNorm's running mean, for one.",
    "src counts all ranks of the world. The first of a group is dist.get_global_rank(group, 0); or say "
    "group_src=0 instead of src.",
)


def check(run):
    for in_pairs, n, dtype in ((False, 4, F32), (True, 4, F64), (False, 3, F64)):
        members = PAIRS if in_pairs else [list(range(n))]
        about = "two groups of 2 ranks" if in_pairs else f"{n} ranks"
        stuck = "the ranks do not make the same calls: each has to broadcast the same tensors in the same order"
        try:
            seen = run(_start, dtype, in_pairs, n=n, about=about, stuck=stuck)
        except Wrong as wrong:
            if "not part of" in wrong.diagnosis:
                wrong.diagnosis = (
                    "src counts all ranks, and the first one of ranks 1, 3 is not rank 0: "
                    "dist.get_global_rank(group, 0), or group_src=0"
                )
            raise
        for ranks in members:
            _judge_start([seen[r] for r in ranks], ranks, about)


class Starting(torch.nn.Module):
    """Parameters (one used twice, two frozen) and buffers: a BatchNorm's, and one that state_dict() leaves out."""

    def __init__(self, seed, dtype=F32):
        super().__init__()
        self.fc, self.norm = torch.nn.Linear(3, 4, dtype=dtype), torch.nn.BatchNorm1d(4, dtype=dtype)
        self.tied, self.frozen = torch.nn.Linear(3, 4, dtype=dtype), torch.nn.Linear(2, 2, dtype=dtype)
        self.tied.weight = self.fc.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("mask", torch.zeros(3, dtype=dtype), persistent=False)
        for i, t in enumerate([*self.parameters(), *self.buffers()]):
            t.data = values(t.shape, t.dtype, seed, i)

    def tensors(self):
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


def _start(answer, dtype, in_pairs):
    model = Starting(dist.get_rank(), dtype)
    before = {name: t.detach().clone() for name, t in model.tensors().items()}
    objects = {name: (id(t), t.requires_grad) for name, t in model.tensors().items()}
    seen = watched(answer, model, **group(in_pairs))
    now = model.tensors()
    kinds = {name: (id(t), t.requires_grad) for name, t in now.items()}  # a weight that is tied no more has a name, too
    replaced = [name for name in {**objects, **kinds} if kinds.get(name) != objects.get(name)]
    after = {name: now[name].detach().clone() for name in before if name in now}
    left = ["eval() was called"] if not model.training else ["parameters have gradients now"] * any(
        p.grad is not None for p in model.parameters())  # fmt: skip
    seen.kept = {"before": before, "after": after, "replaced": replaced, "left": left}
    return seen


def _judge_start(mine, ranks, about):
    because = {
        "all_reduce": "it calls all_reduce: a mean of random starts is no longer what one of them was drawn to be (and "
        "all of them near zero); one rank's values are asked for",
        "": "it calls {op}: dist.broadcast of each tensor is all that is needed",
    }
    only_calls(mine, ("broadcast",), because)
    first, *others = mine
    for rank, one in zip(ranks, mine, strict=True):
        if one.kept["replaced"]:
            raise Wrong(
                f"{one.kept['replaced'][0]} is another tensor than before (or trainable where it was not): the "
                "optimizer still holds the old one, so write into it",
                f"rank {rank}, {about}",
            )
    in_their_group(ranks, mine, about)
    wanted = first.kept["before"]
    stale = [name for name, t in wanted.items()
             if all(torch.equal(o.kept["after"][name], o.kept["before"][name]) for o in others)]  # fmt: skip
    buffers = [name for name in wanted if name.startswith(("norm.running", "norm.num", "mask"))]
    if stale:
        if stale == list(wanted):
            talked = any(one.calls for one in mine)
            why = "the values arrived in a copy: write them into the model's own" if talked else "nothing was sent"
        elif stale == ["mask"]:
            why = "mask is a buffer that state_dict() leaves out (persistent=False): buffers() has it"
        elif stale == buffers:
            why = "the buffers are left out: the running statistics of a BatchNorm are state, too"
        elif set(stale) <= set(buffers):
            why = f"{stale[0]} is a buffer and left out: all of model.buffers() are state, the whole numbers, too"
        elif set(stale) <= {"frozen.weight", "frozen.bias", *buffers}:
            why = f"{stale[0]} is left out: a frozen parameter does not change, but it has to be equal as well"
        else:
            why = f"{', '.join(stale[:3])}{' …' * (len(stale) > 3)} still hold each rank's own values"
        raise Wrong(why, f"{plural(ranks[1:])}, {about}")
    for name, t in wanted.items():
        mistakes = []
        for rank, one in zip(ranks, mine, strict=True):
            why = f"every rank has what rank {rank} had: the group's first, rank {ranks[0]}, is asked for"
            mistakes.append((why, [one.kept["before"][name]] * len(mine)))
        same([one.kept["after"][name] for one in mine], [t] * len(mine), name, about, mistakes, None, ranks)
    size = sum(t.numel() * t.element_size() for t in wanted.values())
    twice = wanted["fc.weight"].numel() * wanted["fc.weight"].element_size()  # state_dict() names it twice
    for rank, one in zip(ranks, mine, strict=True):
        if sum(call.bytes for call in one.calls) > size + twice:
            raise Wrong("the values are right, but tensors are sent more than once", f"rank {rank}, {about}",
                        f"{size:,} bytes", f"{sum(call.bytes for call in one.calls):,} bytes")  # fmt: skip
        for what in one.kept["left"]:
            raise Wrong(f"the values are right, but {what}: nothing else is to change", f"rank {rank}, {about}")


exercise = Exercise(hints, check)
