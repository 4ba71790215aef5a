"""Means of parameters by rows; typically plain means, sums not divided by all rows, ranks without rows left out."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, LOOSE, groups_of, own_group
from ..exercises.exercise import Exercise
from ..exercises.gradients import Sample
from ..exercises.judge import Wrong, only_calls, same
from ..exercises.watch import watched
from .shared import OTHER_CALLS, gradients_of, no_more_than, spoilt, values_of

hints = (
    "A mean of means is not the mean of all rows where some ranks have more rows than others: multiply each rank's "
    "parameters by its rows, add up, divide by all rows.",
    "Nobody knows all rows yet: all_reduce a tensor with this rank's number gives their sum.",
    "Multiply p.data by rows / total in place, then dist.all_reduce(p.data, group=group): the shares add up to 1.",
)


def check(run):
    stuck = "the ranks do not make the same calls: a rank without rows has to take part too, it counts as 0"
    for seed, (rows, dtype, in_pairs) in enumerate(CASES):
        n = len(rows)
        about = f"{'two groups of 2' if in_pairs else n} ranks with {', '.join(map(str, rows))} rows"
        seen = run(_average, 10 * seed, dtype, rows, in_pairs, n=n, about=about, stuck=stuck)
        for members in groups_of(in_pairs, n):
            mine = [seen[r] for r in members]
            only_calls(mine, ("all_reduce",), OTHER_CALLS)
            for rank, one in zip(members, mine, strict=True):
                if one.kept["spoilt"]:
                    raise Wrong(one.kept["spoilt"], f"rank {rank}, {about}")
            for name in mine[0].kept["trained"]:
                _judge_mean(name, members, seen, rows, about)
            for rank, one in zip(members, mine, strict=True):
                no_more_than(one.kept["trained"], one, f"rank {rank}, {about}", number=8)


CASES = [  # rows of each rank, dtype, whether in two groups of 2
    ([300, 40, 15, 5], F64, False),
    ([7, 7, 7, 7], F32, False),
    ([1000, 0, 3, 200], F32, False),
    ([90, 6, 10, 50], F64, True),
    ([11, 2, 5], F64, False),
    ([1, 4], F32, False),
]
EARLIER = [3, 4]  # rows in a call before the one of two ranks


def _average(answer, seed, dtype, rows, in_pairs):
    """On a rank: a model of its own, with gradients, averaged by the answer."""
    rank = dist.get_rank()
    model = Sample(seed + rank, dtype)
    model.fc1.bias.requires_grad_(len(rows) != 3)  # what is frozen is not told by its name
    model.register_buffer("statistics", torch.full((8,), float(rank), dtype=dtype))
    model(torch.ones(2, 6, dtype=dtype)).sum().backward()
    named = dict(model.named_parameters())
    before, gradients = values_of(named), gradients_of(named)
    trained = {name: p.nbytes for name, p in named.items() if p.requires_grad}
    if len(rows) == 2:  # not the first call in this process
        watched(answer, Sample(seed, dtype), EARLIER[rank])
    seen = watched(answer, model, rows[rank], **own_group(in_pairs))
    wrong = spoilt(model, named, trained, before, gradients)
    if not wrong and not (model.statistics == rank).all():
        wrong = "`statistics` has changed, which is a buffer: only model.parameters() are averaged"
    for call in seen.calls:
        if not wrong and call.dtype in ("float16", "bfloat16", "int8", "uint8"):
            wrong = f"rows are added up as {call.dtype}, which cannot hold the number of rows of a real data set"
            if call.bytes > 2:
                wrong = f"the parameters are added up as {call.dtype}: add them up in their own dtype"
    seen.kept = {"before": before, "after": values_of(named), "trained": trained, "spoilt": wrong}
    return seen


def _judge_mean(name, members, seen, all_rows, about):
    everyone, rows, n = [one.kept["before"][name] for one in seen], [all_rows[r] for r in members], len(members)
    own, total, overall = [everyone[r] for r in members], sum(rows), sum(all_rows)

    def mean_by(weights, tensors=own):
        return sum(float(w) * p.double() for w, p in zip(weights, tensors, strict=True)).to(own[0].dtype)

    mean, in_group = mean_by([r / total for r in rows]), n < len(seen)
    unused = f"{name} is not averaged: no loss has reached it, but it is trainable, and each rank has its own"
    no_rows = "a rank without rows has to take the mean over, too: it counts as 0, and goes on from where all are"
    never = f"{name} is not averaged, as the parameters before it are: all that are not frozen have to be"
    if name == next(iter(seen[0].kept["trained"])):
        never = "a mean was made but never reached the model: it went into a copy (p = p * … only makes a new tensor)"
    alone = "each rank multiplied its own parameters by its share, and nothing was added up after that"
    upside_down = "the weights are upside down: a rank with more rows has to count more"
    all_ranks = "the group argument is ignored: this is the mean over all ranks"
    all_ranks_rows = "the group argument is ignored where the rows are added up: these are all ranks' rows"
    mistakes = {
        "the plain mean: a mean of means counts a rank with few rows as much as one with many": sum(own) / n,
        "the sum of the ranks' parameters: it has to be divided": sum(own),
        f"multiplied by the rows, but divided by the {n} ranks: divide by all {total} rows": mean * (total / n),
        f"multiplied by the rows and never divided: divide by all {total} rows": mean * total,
        "divided by all rows of an earlier call: they may be others in each call": mean * (total / sum(EARLIER)),
        f"divided by {n} once too often: the rows' shares add up to 1 already": mean / n,
        f"divided twice by {total}, the number of all rows": mean / total,
        unused: own if name.startswith("unused") else None,
        no_rows: [p if r == 0 else None for r, p in zip(rows, own, strict=True)],
        never: own,
        alone: [r / total * p for r, p in zip(rows, own, strict=True)],
        upside_down: mean_by([1 / r / sum(1 / r for r in rows) for r in rows]) if 0 not in rows else None,
        all_ranks: mean_by([r / overall for r in all_rows], everyone) if in_group else None,
        all_ranks_rows: mean * (total / overall) if in_group else None,
    }
    got = [seen[r].kept["after"][name] for r in members]
    same(got, mean, name, about, mistakes.items(), own, members, LOOSE)


why = (
    "Each row of the data counts the same only if a rank's parameters count as often as it has rows. "
    "Federated averaging (McMahan and others, 2017) weights just so; DDP does not weight: its mean counts "
    "ranks."
)
exercise = Exercise(hints, check, minutes=12, level="medium", why=why)
