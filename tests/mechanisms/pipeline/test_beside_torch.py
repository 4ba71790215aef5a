"""The same tables in torch.distributed.pipelining: the same loss and gradients, and never less memory than ours."""

import gc
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

from pardist_lib.lessons.worlds import in_world
from pardist_lib.measure.memory import watching
from pardist_lib.mechanisms.pipeline import Pipeline, gpipe, interleaved, messages, one_f_one_b, zbv, zero_bubble
from tests.mechanisms.pipeline.nets import close, linears, mlp, rows_of, same_gradients, stepped
from tests.mechanisms.pipeline.torchs import stepper, torchs_pipeline, torchs_stages


def tables(p):
    """Before 2.13 torch sends the shapes between two stages on one rank, as ZB-V has, from this rank to itself."""
    made = [gpipe(p, p + 1), one_f_one_b(p, p + 2), zero_bubble(p, p + 1), interleaved(p, 2 * p, 2), zbv(p, 2 * p)]
    return made if torch.__version__ >= "2.13" else made[:-1]


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


@pytest.mark.share(2)
@pytest.mark.parametrize("p", [2, 3, 4])
def test_loss_and_gradients_are_torchs(ranks_of, p):
    ranks_of(4).run(in_world, p, beside, tables(p), quiet=True)


def peak(step):
    """The most bytes of tensors on this rank during a step, without what its parameters and gradients take."""
    for _ in range(2):
        step()
    gc.collect()
    with watching() as watch:
        step()
    _, held = watch.history()
    return held[:, 2:].sum(1).max().item()


def peaks(schedule, kind=None, width=128):
    """On a rank: bytes, ours and torch's, by its runtime or by a class that it has for this schedule."""
    rows = 40 * schedule.micro_batches
    x, target = rows_of(rows, width=width), rows_of(rows, 1, width=width)
    layers, theirs = (linears(2 * schedule.stages, width) for _ in range(2))
    loss = nn.functional.mse_loss
    pipeline = Pipeline(layers, schedule, loss)
    step = torchs_pipeline(theirs, schedule, loss)
    if kind:
        (stage,) = torchs_stages(theirs, schedule)
        step = stepper(kind(stage, schedule.micro_batches, loss_fn=loss), schedule)
    return peak(lambda: stepped(pipeline, x, target)), peak(lambda: step(x, target))


@pytest.mark.parametrize("p", [2, 3])
def test_no_rank_holds_more_than_torchs(ranks_of, p):
    cases = [(schedule,) for schedule in tables(p)[2:]]
    cases += [(gpipe(p, 6), ScheduleGPipe), (one_f_one_b(p, 6), Schedule1F1B), (one_f_one_b(p, 6),)]
    for case in cases:
        found = ranks_of(4).run(in_world, p, peaks, *case, quiet=True)[:p]
        assert all(ours <= theirs for ours, theirs in found), f"{case}: {found}"


def peak_of(m):
    """On a rank: bytes in a step of 1F1B with m micro-batches, with receives for the next action only."""
    schedule, rows = one_f_one_b(dist.get_world_size(), m), 32 * m
    x, target = rows_of(rows, width=64), rows_of(rows, 1, width=64)
    pipeline = Pipeline(linears(schedule.stages, 64), schedule, nn.functional.mse_loss)
    with mock.patch.object(messages, "EXPECTED", 0):
        return peak(lambda: stepped(pipeline, x, target))


def test_1f1b_holds_as_much_however_many_micro_batches_there_are(ranks_of):
    """Between the ranks that have input and target: what was sent is let go of once it is known to be there."""
    few, many = (ranks_of(4).run(peak_of, m, quiet=True)[1:3] for m in (8, 32))
    assert all(b <= 1.1 * a for a, b in zip(few, many, strict=True)), (few, many)
