"""The same tables in torch.distributed.pipelining: the same loss and gradients, and never less memory than ours."""

import gc

import pytest
from torch import nn

from pardist_lib.lessons.worlds import in_world
from pardist_lib.measure.memory import watching
from pardist_lib.mechanisms.pipeline import Pipeline, gpipe, interleaved, one_f_one_b, zbv, zero_bubble
from tests.mechanisms.pipeline.nets import close, linears, mlp, rows_of, same_gradients, stepped
from tests.mechanisms.pipeline.torchs import torchs_pipeline


def tables(p):
    return [gpipe(p, p + 1), one_f_one_b(p, p + 2), zero_bubble(p, p + 1), interleaved(p, 2 * p, 2), zbv(p, 2 * p)]


def beside(schedules):
    """On a rank: two steps of each. The batch is a multiple of m, for torch weights micro-batches equally; and what
    earlier steps have left in .grad it divides by m once more, hence zero_grad."""
    for schedule in schedules:
        n, rows = 2 * schedule.stages, 3 * schedule.micro_batches
        layers, theirs = mlp(n), mlp(n)
        pipeline = Pipeline(layers, schedule, nn.functional.mse_loss)
        step = torchs_pipeline(theirs, schedule, nn.functional.mse_loss)
        for k in range(2):
            pipeline.zero_grad(), nn.Sequential(*theirs).zero_grad()
            x, target = rows_of(rows, k), rows_of(rows, k + 5)
            got, wanted = stepped(pipeline, x, target), step(x, target)
            if wanted is not None:
                close(got, wanted, f"{schedule!r}: loss", rtol=1e-10, atol=0)
            same_gradients(pipeline, theirs, f"{schedule!r}, step {k}", rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("p", [2, 3, 4])
def test_loss_and_gradients_are_torchs(ranks_of, p):
    ranks_of(4).run(in_world, p, beside, tables(p), quiet=True)


def peak(step, *batch):
    """The most bytes of tensors on this rank during a step, without what its parameters and gradients take."""
    for _ in range(2):
        step(*batch)
    gc.collect()
    with watching() as watch:
        step(*batch)
    _, held = watch.history()
    return held[:, 2:].sum(1).max().item()


def peaks(schedule, layers, rows, width):
    """On a rank: bytes, ours and torch's."""
    x, target = rows_of(rows, width=width), rows_of(rows, 1, width=width)
    pipeline = Pipeline(linears(layers, width), schedule, nn.functional.mse_loss)
    step = torchs_pipeline(linears(layers, width), schedule, nn.functional.mse_loss)
    ours = peak(lambda *batch: stepped(pipeline, *batch), x, target)
    return ours, peak(step, x, target)


@pytest.mark.parametrize("p", [2, 4])
def test_no_rank_holds_more_than_torchs(ranks_of, p):
    for schedule in [gpipe(p, 8), one_f_one_b(p, 8), zero_bubble(p, 8), interleaved(p, 8, 2), zbv(p, 8)]:
        found = ranks_of(4).run(in_world, p, peaks, schedule, 2 * schedule.stages, 64, 512, quiet=True)[:p]
        print(f"{schedule!r}"[:60], found)
        assert all(ours <= theirs for ours, theirs in found), f"{schedule!r}: {found}"
