"""The five schedules: what theory says of their time and memory, and the tables that torch makes of the same."""

import random
from unittest import mock

import pytest
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.distributed.pipelining.stage import PipelineStage

from pardist_lib.mechanisms.pipeline import Schedule, gpipe, interleaved, one_f_one_b, zbv, zero_bubble

F, I, W = 1.25, 0.75, 0.5  # noqa: E741 - W is neither longer than F nor than I; all exact in binary
B = I + W
SIZES = [(p, m) for p in (1, 2, 3, 4, 8) for m in (1, 2, 3, 4, 8, 13, 32)]


def torchs(name, p, m, v=None):
    """A schedule of torch's. Its rows have idle cells, and REDUCE_GRAD."""
    return Schedule(get_schedule_ops(name, p, m, v))


# ---- time and memory, as theory says ----------------------------------------------------------------------------


@pytest.mark.parametrize("p, m", SIZES)
def test_gpipe_and_1f1b_take_as_long_and_hold_less(p, m):
    for schedule in (gpipe(p, m), one_f_one_b(p, m)):
        assert schedule.check().makespan(F, I, W) == (m + p - 1) * (F + B)
        assert schedule.bubble(F, I, W) == pytest.approx((p - 1) / (m + p - 1))
    assert gpipe(p, m).in_flight() == [m] * p
    assert one_f_one_b(p, m).in_flight() == [min(m, p - rank) for rank in range(p)]


@pytest.mark.parametrize("v", [1, 2, 3, 4])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_interleaved_fills_v_times_faster(p, v):
    for m in (p, 2 * p, 4 * p):
        schedule = interleaved(p, m, v).check()
        assert schedule.makespan(F, I, W) == pytest.approx((m + (p - 1) / v) * (F + B), rel=1e-12)
        assert schedule.rank_of == [*range(p)] * v
        warm_up = [2 * (p - rank - 1) + (v - 1) * p for rank in range(p)]
        if v > 1:
            assert schedule.in_flight() == [min(m * v, w + 1) for w in warm_up]
    assert interleaved(p, 7, 1) == one_f_one_b(p, 7)


@pytest.mark.parametrize("p, m", [(p, m) for p, m in SIZES if m >= p])
def test_h1_has_the_papers_bubble_and_the_most_that_1f1b_holds(p, m):
    schedule = zero_bubble(p, m).check()
    for f, i, w in ((F, I, W), (1, 1, 1), (1, 2, 1), (2, 1, 0), (3, 2.5, 2)):
        assert schedule.makespan(f, i, w) == m * (f + i + w) + (p - 1) * (f + i - w)
    assert schedule.in_flight() == [max(one_f_one_b(p, m).in_flight())] * p


@pytest.mark.parametrize(
    "m, times, rates",
    [(24, (18.522, 18.086, 9.337, 0.601), (0.2431, 0.1585)), (64, (18.546, 18.097, 9.321, 0.762), (0.1240, 0.0674))],
)
def test_the_papers_measured_times_give_the_papers_bubble_rates(m, times, rates):
    """Qi et al. 2023, table 5: 1F1B and ZB-H1 on 8 ranks."""
    ours = [schedule.bubble(*times) for schedule in (one_f_one_b(8, m), zero_bubble(8, m))]
    assert [round(rate, 4) for rate in ours] == list(rates)


@pytest.mark.parametrize("p", range(1, 9))
def test_zbv_has_no_bubble_and_1f1bs_memory(p):
    for m in (2 * p - 1, 2 * p, 3 * p + 1, 32):
        schedule = zbv(p, m).check()
        assert schedule.bubble(1, 1, 1) == 0
        assert schedule.makespan(6, 6, 6) == 18 * m + 3 * (p - 1)  # it starts p − 1 stages late on the last rank
        assert schedule.in_flight() == [2 * p] * p
        assert schedule.rank_of == [*range(p), *reversed(range(p))]
    assert all(max(zbv(p, m).check().in_flight()) <= 2 * min(m, p) for m in range(1, 2 * p))


def test_every_size_gives_a_schedule_that_runs_or_names_the_nearest_that_does():
    rng = random.Random(2)
    for p, m in rng.sample([(p, m) for p in range(1, 9) for m in range(1, 33)], 60):
        makes = {"gpipe": gpipe, "one_f_one_b": one_f_one_b, "zero_bubble": zero_bubble, "zbv": zbv}
        makes |= {f"interleaved {v}": lambda p, m, v=v: interleaved(p, m, v) for v in (1, 2, 3, 4)}
        for name, make in makes.items():
            try:
                schedule = make(p, m)
            except ValueError as error:
                nearest = int(str(error).split()[-1])
                works = [k for k in range(1, 65) if (k >= p if name == "zero_bubble" else k % p == 0)]
                assert m not in works and abs(nearest - m) == min(abs(k - m) for k in works), error
                schedule = make(p, nearest)
                assert schedule.micro_batches == nearest
            else:
                assert (schedule.ranks, schedule.micro_batches) == (p, m)
            assert schedule.check() is schedule


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "4", None])
def test_what_is_no_number_of_ranks_is_refused(wrong):
    for make in (gpipe, one_f_one_b, zero_bubble, zbv, lambda p, m: interleaved(p, m, 2)):
        with pytest.raises(ValueError, match="^p is .* whole number from 1 on"):
            make(wrong, 4)
        with pytest.raises(ValueError, match="^m is .* whole number from 1 on"):
            make(4, wrong)
    with pytest.raises(ValueError, match="^v is "):
        interleaved(4, 4, wrong)


# ---- torch's -----------------------------------------------------------------------------------------------------


def ran(kind, rank, p, m):
    """What torch's schedule calls on the stage of a rank, as a row: its steps themselves, for the table that it shows
    of 1F1B (pipeline_order, torch 2.13) counts the forwards of the last rank from 1."""
    row, stage = [], mock.create_autospec(PipelineStage, instance=True)
    stage.num_stages, stage.stage_index, stage.group_rank, stage.group_size, stage.is_last = p, rank, rank, p, False
    for ops in (stage.get_fwd_recv_ops, stage.get_fwd_send_ops, stage.get_bwd_recv_ops, stage.get_bwd_send_ops):
        ops.return_value = []
    stage.forward_one_chunk.side_effect = lambda i, *_, **__: row.append((rank, "F", i))
    stage.backward_one_chunk.side_effect = lambda i, **_: row.append((rank, "B", i))
    schedule = kind(stage, m)
    schedule._initialize_stage = mock.Mock()
    schedule._step_microbatches([()] * m, [{}] * m)
    return row


@pytest.mark.parametrize("p, m", [(1, 1), (1, 3), (2, 2), (2, 5), (3, 3), (4, 4), (4, 8), (4, 11), (8, 24)])
def test_gpipe_and_1f1b_are_torchs(p, m):
    for make, kind, name in ((gpipe, ScheduleGPipe, "GPipe"), (one_f_one_b, Schedule1F1B, "1F1B")):
        assert make(p, m).rows == [ran(kind, rank, p, m) for rank in range(p)]
        assert make(p, m).rows[: p - 1] == torchs(name, p, m).rows[: p - 1]


@pytest.mark.parametrize("v", [2, 3, 4])
@pytest.mark.parametrize("p, groups", [(1, 3), (2, 1), (2, 4), (3, 2), (4, 1), (4, 3), (8, 3)])
def test_interleaved_is_torchs(p, groups, v):
    assert interleaved(p, p * groups, v) == torchs("Interleaved1F1B", p, p * groups, v)


@pytest.mark.parametrize("p", range(1, 9))
def test_zbv_is_torchs(p):
    for m in (1, 2, p, p + 2, 2 * p - 1, 2 * p, 3 * p + 1):
        assert zbv(p, m) == torchs("ZBVZeroBubble", p, m)


# ---- what holds for any times ------------------------------------------------------------------------------------


def test_no_run_is_shorter_than_its_work_and_slower_messages_never_help():
    rng = random.Random(0)
    for _ in range(20):
        p, v = rng.randint(1, 6), rng.randint(1, 3)
        m = p * rng.randint(1, 4)
        f, i, w = (rng.uniform(0, 3) for _ in range(3))
        for schedule in (gpipe(p, m), one_f_one_b(p, m), interleaved(p, m, v), zero_bubble(p, m), zbv(p, m)):
            spans = [schedule.makespan(f, i, w, message) for message in (0, 0.1, 1)]
            assert m * (f + i + w) <= spans[0] * (1 + 1e-12) and spans == sorted(spans)
            assert 0 <= schedule.bubble(f, i, w, 0.1) < 1
