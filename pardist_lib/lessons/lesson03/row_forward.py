"""A linear layer of split input features; typically the bias is added by every rank, or backward adds up again."""

import torch
import torch.distributed as dist

from ..exercises.cases import F32, F64, groups_of, own_group, untouched, values, what_is_new
from ..exercises.exercise import Exercise
from ..exercises.judge import as_many_bytes, only_calls, same
from .shared import gradients, judge_gradients, layer, there_and_back

hints = (
    "A rank's x @ weight.T has the shape of the whole result, but is only a summand of it: what do the ranks have "
    "to do with their summands?",
    "dist.all_reduce(y, group=group) replaces y by the sum over the ranks, on every rank.",
    "Whatever is added before the all_reduce is added by every rank. The bias belongs into the result once.",
    "Backward is g's: a torch.autograd.Function whose forward returns the sum of all ranks' y, and whose backward "
    "returns the gradient as it came, for every rank has it already.",
)


def check(run):
    for seed, (n, in_pairs, shape, wide, out, dtype, bias, new) in enumerate(CASES):
        about = f"{n} ranks, whole input {(*shape, wide)}, whole weight {(out, wide)}{'' if bias else ', no bias'}"
        about += ", groups (0, 2) and (1, 3)" if in_pairs else ""
        with what_is_new(new):
            seen = run(_row, in_pairs, shape, wide, out, dtype, bias, seed, n=n, about=about)
            only_calls(seen, ("all_reduce",), OTHER_CALLS)
            untouched(seen, about)
            for members in groups_of(in_pairs, n):
                _judge(members, [seen[r] for r in members], seen, about)


ALL, TWO = False, True  # whether two groups of two ranks have a layer each
CASES = [  # ranks, groups, shape of x, in, out, dtype, bias; what is new in it
    (4, ALL, (3,), 8, 5, F32, True, ""),
    (4, ALL, (3,), 10, 5, F64, True, "where 4 does not divide the input features"),
    (4, ALL, (3,), 3, 5, F32, True, "where there are fewer input features than ranks"),
    (4, ALL, (2, 3), 8, 1, F64, True, "where x has three dimensions"),
    (4, ALL, (3,), 8, 5, F32, False, "where bias is None"),
    (3, ALL, (2,), 7, 4, F64, True, "with 3 ranks (is a 4 written into it?)"),
    (2, ALL, (2,), 3, 6, F32, True, "with 2 ranks"),
    (4, TWO, (2,), 5, 3, F64, True, "in two groups of 2 ranks"),
]
OTHER_CALLS = {
    "reduce": "it calls reduce, which brings the sum to one rank only: every rank needs the output",
    "all_gather": "it calls all_gather, which brings every summand to every rank, n times as many bytes as a sum: "
    "all_reduce adds up on the way",
    "broadcast": "it broadcasts one rank's tensor: the output is the sum of all ranks'",
    "": "it calls {op}: one all_reduce of the output is all that is needed",
}


def _row(answer, in_pairs, shape, wide, out, dtype, bias, seed):
    options, inputs = own_group(in_pairs), layer(shape, wide, out, dtype, bias, seed)
    place, n = dist.get_rank(**options), dist.get_world_size(**options)
    which = dist.get_rank() % 2 if in_pairs else 0  # the groups have something else to do each
    parts = {name: inputs[name].tensor_split(n, -1)[place] + which * (name == "x") for name in ("x", "weight")}
    g = values((*shape, out), dtype, 60 + which, seed)  # the same on every rank of a group, as its loss is
    return there_and_back(answer, inputs | parts, g, **options)


def _judge(members, mine, seen, about):
    n, everywhere = len(members), sum(_summand(one) for one in seen)
    own, bias = [_summand(one) for one in mine], mine[0].kept["given"]["bias"]
    total, bias = sum(own), everywhere.new_zeros(everywhere.shape[-1]) if bias is None else bias
    ignored = "the group argument is ignored: this is the sum over all ranks"
    alone = "nothing was added up: each rank has its own summand"
    if mine[0].calls:
        alone = "the sum was made in a copy that is not returned: each rank has its own summand"
    elif mine[0].kept["back"].calls:
        alone += " (this is f, which adds up backward; here the summands of forward are to be added)"
    again = "x and weight are cut once more: they are this rank's parts already"
    mistakes = {
        ignored: everywhere + bias if n < len(seen) else None,
        f"{ignored}, with a bias from each": everywhere + len(seen) * bias if n < len(seen) else None,
        f"the bias is added {n} times, once by each rank: add it after the all_reduce": total + n * bias,
        "the bias is in the output of rank 0 only: add it before the all_reduce there, or after it everywhere": [
            total + bias * (r == members[0]) for r in members
        ],
        "the bias is left out": total,
        alone: [y + bias for y in own],
        f"{alone}, without the bias": own,
        again: sum(_summand(one, n, place) for place, one in enumerate(mine)) + bias,
        f"divided by {n}: the output is the sum of the summands, not their mean": total / n + bias,
        f"divided by {n}, bias and all: the output is the sum of the summands, not their mean": total / n + bias / n,
        "it takes the MAX over the ranks, not the sum": torch.stack(own).amax(0) + bias,
        "the bias is counted twice": total + 2 * bias,
        f"the bias is added {n} times before the all_reduce, once by each rank, and once more after it": total
        + (n + 1) * bias,
    }
    same([one.result for one in mine], total + bias, "the output", about, mistakes.items(), labels=members)
    as_many_bytes(members, mine, "the output", total.nbytes, about)

    back, mistakes = [gradients(one.kept["given"], one.kept["g"]) for one in mine], {}
    again = f"every rank comes back with the whole gradient, and adding {n} equal ones counts it {n} times"
    whole = {"bias": "a share of the bias from each rank gets a share of its gradient; add it whole, after the sum"}
    for name in back[0]:
        why = whole.get(name, "the gradient of a sum goes on to each summand whole")
        mistakes[name] = {
            f"the output is right, its backward {n} times too large: {again}": [n * grads[name] for grads in back],
            f"the output is right, its backward divided by {n}: {why}": [grads[name] / n for grads in back],
        }
    judge_gradients(members, mine, back, mistakes, about, free="every rank has the whole gradient already")


def _summand(one, n=1, place=0):
    x, weight = (one.kept["given"][name].tensor_split(n, -1)[place] for name in ("x", "weight"))
    return x @ weight.T


why = (
    "Each rank's product is a summand, and everybody wants the sum, so the bias is added once, after it. "
    "Backward must not add up again: every rank comes back with the whole gradient already. Megatron's "
    "RowParallelLinear does the same; under sequence parallelism it reduce-scatters instead. torch's own "
    "all_reduce hands a gradient on as it came, too, and warns that it may not for ever."
)
exercise = Exercise(hints, check, minutes=10, level="medium", why=why)
