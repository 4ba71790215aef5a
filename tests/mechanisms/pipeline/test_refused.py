"""What a pipeline refuses: on which rank or stage, and in which words; the next run works."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.mechanisms.pipeline import Pipeline, Schedule, gpipe, interleaved, one_f_one_b, zbv
from tests.mechanisms.pipeline.nets import linears, one_process, rows_of, same_gradients, stepped
from tests.mechanisms.refusals import refused

SCHEDULE = one_f_one_b(3, 4)


def made(layers=None, schedule=SCHEDULE, loss=nn.functional.mse_loss, **options):
    return Pipeline(linears(6) if layers is None else layers, schedule, loss, **options)


def on(rank, value, otherwise=None):
    return value if dist.get_rank() == rank else otherwise


class Gives(nn.Module):
    """A layer whose output is what a function makes of it, on some rank."""

    def __init__(self, fn, rank=None):
        super().__init__()
        self.fn, self.rank = fn, rank

    def forward(self, x):
        return self.fn(x) if self.rank in (None, dist.get_rank()) else x


def raises(x):
    raise OSError("no such file")


def with_layer(layer, at=2):
    layers = linears(6)
    layers[at] = layer
    return layers


class Named(nn.Module):
    """Not a list of layers, but what has one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(linears(6))


def frozen():
    layers = linears(6)
    for layer in layers:
        layer.requires_grad_(False)
    return layers


# ---- when it is made ----------------------------------------------------------------------------------------------

MAKING = [
    (lambda: made(linears(2)), "3 stages, and only 2 layers: each stage needs one"),
    (lambda: made(schedule=gpipe(2, 4)), "the schedule has rows for 2 ranks, and the group has 3"),
    (lambda: made(schedule=on(1, gpipe(3, 4), SCHEDULE)), "rank 1 of the group was given another schedule"),
    (lambda: made(schedule=on(2, one_f_one_b(3, 5), SCHEDULE)), "rank 2 of the group was given another schedule"),
    (lambda: made(cut=on(1, [4, 1, 1])), "rank 1 of the group was given another schedule, cut or option"),
    (lambda: made(schedule=Schedule([["0F0"], ["1F0"], ["2F0"]])), r"rank 0 at place 0 \(0F0\): a forward without its"),
    (lambda: made(Named()), "Named is one module: give its layers in order, as an nn.Sequential or a list"),
    (lambda: made(with_layer(torch.tanh)), "layer 2 is a builtin_function_or_method, not an nn.Module"),
    (lambda: made(linears(6)[: on(1, 5, 6)]), "rank 1 of the group was given another schedule, cut"),
    (lambda: made(linears(6, on(1, 5, 6))), r"the ranks' models differ: where rank 0 has .*0.weight.* rank 1 has"),
    (
        lambda: made(cut=[2, 2, 1]),
        r"cut=\[2, 2, 1\] has to name the number of layers of each of the 3 stages, 6 in all",
    ),
    (lambda: made(cut=[6, 0, 0]), r"cut=\[6, 0, 0\] has to name"),
    (lambda: made(costs=[1, 2]), "2 costs for 6 layers"),
    (lambda: made(cut=[2, 2, 2], costs=[1] * 6), "give cut or costs, not both"),
    (lambda: made(reduction="none"), '"mean" or "sum", not \'none\''),
]


def messages(calls):
    """On a rank: what each of them raises."""
    said = []
    for call in calls:
        try:
            call()
            said.append("nothing")
        except (TypeError, ValueError, RuntimeError) as error:
            said.append("\n".join([str(error), *getattr(error, "__notes__", [])]))
    return said


def test_what_cannot_be_made(ranks_of):
    """Every rank says so, and lives on."""
    for found in ranks_of(3).run(messages, [make for make, _ in MAKING], quiet=True):
        for said, (_, wanted) in zip(found, MAKING, strict=True):
            assert re.search(wanted, said), said


# ---- when it is called --------------------------------------------------------------------------------------------


ALONE = interleaved(1, 4, 3)  # the same three stages on one rank, which no other waits for


def called(x=None, target=None, schedule=ALONE, **options):
    x, target = (rows_of(8) if t is None else t for t in (x, target))
    made(schedule=schedule, **options).step(x, target)


def missing(x, target, schedule=ALONE):
    made(schedule=schedule).step(x, target)


def gives(fn, at, rank=None):
    return {"layers": with_layer(Gives(fn, rank), at)}


CALLING = [
    (lambda: missing(None, rows_of(8)), "this rank has the first stage: step.. needs x here"),
    (lambda: missing(rows_of(8), None), "this rank has the last stage: step.. needs target here"),
    (lambda: called(rows_of(3), rows_of(3)), "3 rows of x do not fill 4 micro-batches: each needs one at least"),
    (lambda: called(target=rows_of(7)), r"target have \[2, 2, 2, 1\] rows, those of x \[2, 2, 2, 2\]"),
    (lambda: called([rows_of(2)] * 3), "x is a list of 3, and the schedule has 4 micro-batches"),
    (lambda: called(target=[rows_of(2)] * 5), "target is a list of 5, and the schedule has 4 micro-batches"),
    (lambda: called([rows_of(2)] * 3 + [rows_of(0)]), "6 rows of x do not fill 4"),
    (lambda: called([rows_of(2)] * 3 + ["rows"]), "micro-batch 3 of x has to be a tensor with rows"),
    (lambda: called(3.0), "x has to be a tensor with rows, a tuple of such, or a list of 4 micro-batches"),
    (lambda: called((rows_of(8), rows_of(4))), r"the tensors of x have \[2, 1\] rows in micro-batch 0"),
    (lambda: called(loss=lambda y, t: y - t), r"has to be a single number, and this one gives shape \[2, 6\]"),
    (lambda: called(loss=lambda y, t: 1.0), "single number, and this one gives a float.*\nin 2F0, place 2 of its row"),
    (lambda: called(loss=lambda y, t: y.detach().sum()), "the loss requires no gradient"),
    (lambda: called(layers=frozen()), "the loss requires no gradient: everything is frozen"),
    (
        lambda: called(**gives(lambda x: {"x": x}, 3)),
        "a layer of stage 1 gives a dict: a tensor, or a tuple",
    ),
    (lambda: called(**gives(lambda x: None, 3)), "a layer of stage 1 gives a NoneType"),
    (lambda: called(**gives(lambda x: (x, 2), 1)), "a layer of stage 0 gives a int"),
    (lambda: called(layers=with_layer(nn.ReLU(inplace=True))), "\nin 1F0.*first layer works in place.*inplace=False"),
    (
        lambda: called([rows_of(2), rows_of(2, width=3)] * 2),
        "shapes cannot be multiplied.*\nin 0F1, place 4",
    ),
    (lambda: shapes_differ(), r"stage 0 gives float64 \[2, 4, 6\] for micro-batch 2, and gave float64 \[2, 3, 6\]"),
]


def test_what_cannot_be_run(ranks_of):
    for said, (_, wanted) in zip(
        *ranks_of(1).run(messages, [call for call, _ in CALLING], quiet=True), CALLING, strict=True
    ):
        assert re.search(wanted, said), said


def shapes_differ():
    """Two micro-batches of as many rows, and of other lengths."""
    layers, lengths = [nn.Identity(), *linears(2)], (3, 3, 4, 3)
    x = [torch.ones(2, n, 6, dtype=torch.float64) for n in lengths]
    called(x, layers=layers, loss=lambda y, _: y.mean())


ON_ONE_RANK = [
    (lambda: missing(on(1, rows_of(8)), rows_of(8), SCHEDULE), "this rank has the first stage: step.. needs x here", 0),
    (lambda: missing(rows_of(8), on(0, rows_of(8)), SCHEDULE), "this rank has the last stage: step.. needs target", 2),
    (
        lambda: called(schedule=SCHEDULE, **gives(raises, 3, 1)),
        "no such file\nin 1F0, place 0 of its row in the sched",
        1,
    ),
    (
        lambda: called(schedule=SCHEDULE, **gives(lambda x: (x,) * 200, 1)),
        "shapes of 200 tensors between two stages",
        0,
    ),
]


@pytest.mark.parametrize("number", range(len(ON_ONE_RANK)))
def test_what_goes_wrong_on_one_rank_is_told_of_it_and_the_next_run_works(ranks_of, number):
    call, said, rank = ON_ONE_RANK[number]
    with refused(said) as caught:
        ranks_of(3).run(call, quiet=True)
    assert caught.value.rank == rank
    ranks_of(3).run(right, quiet=True)


def right():
    layers, plain = linears(6), linears(6)
    stepped(pipeline := made(layers), rows_of(8), rows_of(8, 1))
    one_process(plain, rows_of(8), rows_of(8, 1), nn.functional.mse_loss)
    same_gradients(pipeline, plain, "after errors", rtol=1e-10, atol=1e-12)


def raised_then_right(rank):
    """A step that one rank calls under no_grad, which each of them is told; and the same pipeline's next one."""
    layers, plain = linears(6), linears(6)
    pipeline = made(layers)
    try:
        with torch.set_grad_enabled(dist.get_rank() != rank):
            stepped(pipeline, rows_of(8), rows_of(8, 1))
    except ValueError as error:
        how = "under torch.no_grad(), without" if dist.get_rank() == rank else "with"
        assert f"rank {dist.get_rank()} of the group calls this {how} gradients, and another" in str(error), error
        stepped(pipeline, rows_of(8), rows_of(8, 1))
        one_process(plain, rows_of(8), rows_of(8, 1), nn.functional.mse_loss)
        same_gradients(pipeline, plain, "after an error", rtol=1e-10, atol=1e-12)
        return True


def test_a_step_after_one_that_every_rank_has_refused(ranks_of):
    assert ranks_of(3).run(raised_then_right, 1, quiet=True) == [True] * 3


def outside():
    group = dist.new_group([0, 1])
    Pipeline(linears(4), zbv(2, 2), nn.functional.mse_loss, group)


def test_a_rank_outside_the_group_is_told_so(ranks_of):
    with refused("rank 2 is not in this group"):
        ranks_of(3).run(outside, quiet=True)
