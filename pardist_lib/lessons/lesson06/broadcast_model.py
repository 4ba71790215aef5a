"""The first rank's model for all. Typical: no buffers, no frozen ones, rank 0 in every group, new tensors."""

import torch
import torch.distributed as dist

from pardist_lib.ranks.report import plural

from ..exercises.cases import F32, F64, groups_of, own_group, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, only_calls, only_within, same
from ..exercises.watch import watched

hints = (
    "dist.broadcast(t, src) overwrites t on every rank by what rank src has. What does a model's state consist of?",
    "model.parameters() has the frozen ones, too, and a shared one once; model.buffers() has what is state but no "
    "parameter: a BatchNorm's running mean, for one.",
    "src counts all ranks of the world. The first of a group is dist.get_global_rank(group, 0); or say "
    "group_src=0 instead of src.",
)
OTHER_CALLS = {
    "all_reduce": "it calls all_reduce: a mean of random starts is no longer what one of them was drawn to be (and "
    "all of them near zero); one rank's values are asked for",
    "": "it calls {op}: dist.broadcast of each tensor is all that is needed",
}
RAISES = [
    (r"Must specify", "whose values is everybody to have? src=… of all ranks, or group_src=0, the group's first"),
    (r"'tuple' object has no attribute", "named_parameters() and named_buffers() give pairs, (name, tensor)"),
    (r"of type torch.Tensor.*\n?.*NoneType", "p.grad is None before the first backward: p.data is asked for"),
]


def check(run):
    for in_pairs, n, dtype in ((False, 4, F32), (True, 4, F64), (False, 3, F64)):
        about = "two groups of 2 ranks" if in_pairs else f"{n} ranks"
        stuck = "the ranks do not make the same calls: each has to broadcast the same tensors in the same order"
        try:
            seen = run(_started, dtype, in_pairs, n=n, about=about, stuck=stuck, raises=RAISES)
        except Wrong as wrong:
            if "not part of" in wrong.diagnosis:
                why = "src counts all ranks, and the first one of ranks 1, 3 is not rank 0"
                wrong.diagnosis = f"{why}: dist.get_global_rank(group, 0), or group_src=0"
            raise
        only_calls(seen, ("broadcast",), OTHER_CALLS)
        for members in groups_of(in_pairs, n):
            _judge(members, [seen[r] for r in members], about)


class Starting(torch.nn.Module):
    """Parameters (one used twice, two frozen) and buffers: a BatchNorm's, and one that state_dict() leaves out."""

    def __init__(self, seed, dtype):
        super().__init__()
        self.fc, self.norm = torch.nn.Linear(3, 4, dtype=dtype), torch.nn.BatchNorm1d(4, dtype=dtype)
        self.tied, self.frozen = torch.nn.Linear(3, 4, dtype=dtype), torch.nn.Linear(2, 2, dtype=dtype)
        self.tied.weight = self.fc.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("mask", torch.zeros(3, dtype=dtype), persistent=False)
        for i, t in enumerate(self.tensors().values()):
            t.data = values(t.shape, t.dtype, seed, i)

    def tensors(self):
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


def _started(answer, dtype, in_pairs):
    model = Starting(dist.get_rank(), dtype)
    old = model.tensors()
    before = {name: t.detach().clone() for name, t in old.items()}
    trained = {name: t.requires_grad for name, t in old.items()}
    seen = watched(answer, model, **own_group(in_pairs))
    now = model.tensors()  # a weight that is tied no more has a name of its own in it
    others = [name for name in {**old, **now} if now.get(name) is not old.get(name)]
    others += [name for name, t in old.items() if t.requires_grad != trained[name]]
    after = {name: now[name].detach().clone() for name in old if name in now}
    left = ["eval() was called"] * (not model.training)
    left += ["parameters have gradients now"] * any(p.grad is not None for p in model.parameters())
    seen.kept = {"before": before, "after": after, "replaced": others, "left": left}
    return seen


def _judge(members, mine, about):
    for rank, one in zip(members, mine, strict=True):
        if one.kept["replaced"]:
            why = f"{one.kept['replaced'][0]} is another tensor than before (or trainable where it was not): the "
            raise Wrong(f"{why}optimizer still holds the old one, so write into it", f"rank {rank}, {about}")
    only_within(members, mine, about)
    before, after = ([one.kept[when] for one in mine] for when in ("before", "after"))
    others = list(zip(before, after, strict=True))[1:]
    if stale := [name for name in before[0] if all(torch.equal(b[name], a[name]) for b, a in others)]:
        talked = any(one.calls for one in mine)
        raise Wrong(_left_out(stale, list(before[0]), talked), f"{plural(members[1:])}, {about}")
    for name, expected in before[0].items():
        why = f"every rank has what rank {{}} had: the group's first, rank {members[0]}, is asked for"
        mistakes = [(why.format(rank), own[name]) for rank, own in zip(members, before, strict=True)]
        same([a[name] for a in after], expected, name, about, mistakes, labels=members)
    size = sum(t.nbytes for t in before[0].values())
    for rank, one in zip(members, mine, strict=True):
        made, where = sum(call.bytes for call in one.calls), f"rank {rank}, {about}"
        if made > size + before[0]["fc.weight"].nbytes:  # state_dict() names it twice
            why = "the values are right, but tensors are sent more than once"
            raise Wrong(why, where, f"{size:,} bytes", f"{made:,} bytes")
        for what in one.kept["left"]:
            raise Wrong(f"the values are right, but {what}: nothing else is to change", where)


def _left_out(stale, names, talked):
    """Why these tensors are as they were on all ranks but the first."""
    buffers = [name for name in names if name.startswith(("norm.running", "norm.num", "mask"))]
    if stale == names:
        return "the values arrived in a copy: write them into the model's own" if talked else "nothing was sent"
    if stale == ["mask"]:
        return "mask is a buffer that state_dict() leaves out (persistent=False): buffers() has it"
    if stale == buffers:
        return "the buffers are left out: the running statistics of a BatchNorm are state, too"
    if set(stale) <= set(buffers):
        return f"{stale[0]} is a buffer and left out: all of model.buffers() are state, the whole numbers, too"
    if set(stale) <= {"frozen.weight", "frozen.bias", *buffers}:
        return f"{stale[0]} is left out: a frozen parameter does not change, but it has to be equal as well"
    return f"{', '.join(stale[:3])}{' …' * (len(stale) > 3)} still hold each rank's own values"


WHY = (
    "One broadcast of each tensor makes all ranks equal, and equal steps keep them so. DDP does it when it is "
    "made, several tensors in one message, and sends buffers again before each forward."
)

exercise = Exercise(hints, check, minutes=5, level="easy", why=WHY)
