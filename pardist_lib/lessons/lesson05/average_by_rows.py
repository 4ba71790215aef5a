"""The exercise average_by_rows."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64
from ..exercises.exercise import Exercise
from ..exercises.gradients import PAIRS, Sample
from ..exercises.judge import Wrong, only_calls, same
from ..exercises.watch import watched
from ..worlds import group_of
from .shared import OTHER_CALLS, alike, gradients_of, parameters_of, replaced

hints = (
    "A mean of means is not the mean of all rows where some ranks have more rows than others: multiply each rank's "
    "parameters by its rows, add up, divide by all rows.",
    "Nobody knows all rows yet: all_reduce a tensor with this rank's number gives their sum.",
    "Multiply p.data by rows / total in place, then dist.all_reduce(p.data, group=group): the shares add up to 1.",
)


def check(run):
    cases = [  # rows, dtype, in pairs
        ([300, 40, 15, 5], F64, False),
        ([7, 7, 7, 7], F32, False),
        ([1000, 0, 3, 200], F32, False),
        ([90, 6, 10, 50], F64, True),
        ([11, 2, 5], F64, False),
        ([1, 4], F32, False),
    ]
    for seed, (rows, dtype, in_pairs) in enumerate(cases):
        n = len(rows)
        about = f"{'two groups of 2' if in_pairs else n} ranks with {', '.join(map(str, rows))} rows"
        stuck = "the ranks do not make the same calls: a rank without rows has to take part too, it counts as 0"
        seen = run(_average_by_rows, 10 * seed, dtype, rows, in_pairs, n=n, about=about, stuck=stuck)
        for members in PAIRS if in_pairs else [range(n)]:
            _judge_by_rows(seen, list(members), rows, about)


EARLIER = [3, 4]  # rows in a call before


def _average_by_rows(answer, seed, dtype, rows, in_pairs=False):
    """On a rank: a model of its own, with gradients, averaged by the answer."""
    rank = dist.get_rank()
    model = Sample(seed + rank, dtype)
    model.fc1.bias.requires_grad_(len(rows) != 3)  # what is frozen is not told by its name
    model.register_buffer("statistics", torch.full((8,), float(rank), dtype=dtype))
    model(torch.ones(2, 6, dtype=dtype)).sum().backward()
    named = dict(model.named_parameters())
    before, gradients = parameters_of(named), gradients_of(named)
    trained = {name: p.numel() * p.element_size() for name, p in named.items() if p.requires_grad}
    groups = [group_of([0, 2]), group_of([1, 3])] if in_pairs else []
    if len(rows) == 2:  # not the first call in this process
        watched(answer, Sample(seed, dtype), EARLIER[rank])
    seen = watched(answer, model, rows[rank], **({"group": groups[rank % 2]} if in_pairs else {}))
    touched = [name for name, g in gradients_of(named).items() if not alike(g, gradients[name])]
    seen.kept = {"before": before, "after": parameters_of(named), "touched": touched, "trained": trained}
    seen.kept |= {"replaced": replaced(named, model, trained), "buffer": bool((model.statistics == rank).all())}
    return seen


def _judge_by_rows(seen, members, rows, about):
    mine, n = [seen[r] for r in members], len(members)
    only_calls(mine, ("all_reduce",), OTHER_CALLS)
    own_rows = [rows[r] for r in members]
    total = sum(own_rows)
    for rank, one in zip(members, mine, strict=True):
        if one.kept["replaced"]:
            raise Wrong(one.kept["replaced"], f"rank {rank}, {about}")
        if one.kept["touched"]:
            why = f"the gradient of {one.kept['touched'][0]} has changed: average the parameters, not the gradients"
            raise Wrong(why, f"rank {rank}, {about}")
        for name in one.kept["before"]:
            if name not in one.kept["trained"] and not torch.equal(one.kept["before"][name], one.kept["after"][name]):
                why = f"{name} is frozen and has changed: leave out what does not require a gradient"
                raise Wrong(why, f"rank {rank}, {about}")
        if not one.kept["buffer"]:
            why = "`statistics` has changed, which is a buffer: only model.parameters() are averaged"
            raise Wrong(why, f"rank {rank}, {about}")
        for call in one.calls:
            if call.dtype in ("float16", "bfloat16", "int8", "uint8"):
                why = f"rows are added up as {call.dtype}, which cannot hold the number of rows of a real data set"
                if call.bytes > 2:
                    why = f"the parameters are added up as {call.dtype}: add them up in their own dtype"
                raise Wrong(why, f"rank {rank}, {about}")
    for place, name in enumerate(mine[0].kept["trained"]):
        never = "a mean was made but never reached the model: it went into a copy (p = p * … only makes a new tensor)"
        if place:
            never = f"{name} is not averaged, as the parameters before it are: all that are not frozen have to be"
        own = [one.kept["before"][name] for one in mine]
        mean = sum(r / total * p.double() for r, p in zip(own_rows, own, strict=True)).to(own[0].dtype)
        everyone = [one.kept["before"][name] for one in seen]
        shares = [torch.tensor(r) / total for r in own_rows], [torch.tensor(total).reciprocal() * r for r in own_rows]
        in_f32 = [sum(w.double() * p.double() for w, p in zip(by, own, strict=True)).to(own[0].dtype) for by in shares]
        mistakes = [(why, list(would) if isinstance(would, list) else [would] * n) for why, would in (
            ("the plain mean: a mean of means counts a rank with few rows as much as one with many",
             torch.stack(own).mean(0)),
            ("the sum of the ranks' parameters: it has to be divided", torch.stack(own).sum(0)),
            (f"multiplied by the rows, but divided by the {n} ranks: divide by all {total} rows", mean * (total / n)),
            (f"multiplied by the rows and never divided: divide by all {total} rows", mean * total),
            ("divided by all rows of an earlier call: they may be others in each call",
             mean * (total / sum(EARLIER)) if n == 2 else None),
            (f"divided by {n} once too often: the rows' shares add up to 1 already", mean / n),
            (f"divided twice by {total}, the number of all rows", mean / total),
            (f"{name} is not averaged: no loss has reached it, but it is trainable, and each rank has its own",
             own if name.startswith("unused") else None),
            *(("the share of the rows is a float32 number here, as a quotient with an integer tensor is: take "
               "total.item()", mean_in_f32) for mean_in_f32 in in_f32),
            ("a rank without rows has to take the mean over, too: it counts as 0, and goes on from where all are",
             [p if r == 0 else None for r, p in zip(own_rows, own, strict=True)]),
            (never, own),
            ("each rank multiplied its own parameters by its share, and nothing was added up after that",
             [r / total * p for r, p in zip(own_rows, own, strict=True)]),
            ("the weights are upside down: a rank with more rows has to count more",
             _upside_down(own, own_rows)),
            ("the group argument is ignored: this is the mean over all ranks",
             sum(r / sum(rows) * p for r, p in zip(rows, everyone, strict=True)) if n < len(rows) else None),
            ("the group argument is ignored where the rows are added up: these are all ranks' rows",
             mean * (total / sum(rows)) if n < len(rows) else None),
        )]  # fmt: skip
        after = [one.kept["after"][name] for one in mine]
        same(after, [mean] * n, name, about, mistakes, own, members)
    size = sum(mine[0].kept["trained"].values())
    for rank, one in zip(members, mine, strict=True):
        made = sum(call.bytes for call in one.calls)
        if made > size + 8 or len(one.calls) > len(one.kept["trained"]) + 1:
            shared = made - size - 8 <= mine[0].kept["trained"]["fc2.weight"] < made - size
            why = "a weight that two layers share comes up twice in modules()" if shared else "each once is enough"
            raise Wrong(
                f"the result is right, but {made:,} bytes in {len(one.calls)} calls are all-reduced for {size:,} bytes "
                f"of parameters and one number: {why}",
                f"rank {rank}, {about}",
                f"at most {size + 8:,} bytes in {len(one.kept['trained']) + 1} calls",
                f"{made:,} bytes in {len(one.calls)} calls",
            )


def _upside_down(own, rows):
    if 0 in rows or len(set(rows)) == 1:
        return None
    inverse = [1 / r for r in rows]
    return sum(i / sum(inverse) * p for i, p in zip(inverse, own, strict=True))


exercise = Exercise(hints, check)
