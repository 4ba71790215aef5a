"""The table: how it is read, written, simulated and shown; and torch's own pipelines, which read the same text."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from unittest import mock

import pytest
from torch.distributed.pipelining import schedules as torchs
from torch.distributed.pipelining.stage import PipelineStage

from pardist_lib.mechanisms.pipeline import Action, Schedule, gpipe, interleaved, one_f_one_b, zbv, zero_bubble
from pardist_lib.mechanisms.pipeline.action import KINDS
from pardist_lib.mechanisms.pipeline.chart import COLOURS, PAPER
from pardist_lib.pictures import palette

TWO = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1"
ALL = {
    "gpipe": lambda p: gpipe(p, 5),
    "1f1b": lambda p: one_f_one_b(p, 5),
    "interleaved": lambda p: interleaved(p, 2 * p, 3),
    "h1": lambda p: zero_bubble(p, p + 3),
    "zbv": lambda p: zbv(p, 6),
}


# ---- read and written -------------------------------------------------------------------------------------------


def test_an_action_is_written_as_torch_writes_it():
    assert str(Action(2, "F", 0)) == "2F0" and Action(2, "F", 0) == (2, "F", 0)


def test_a_table_is_read_from_text_actions_and_tuples_with_idle_cells():
    rows = [[Action(0, "F", 0), "0F1", None, (0, "B", 0), "", "0B1"], [None, "1F0", " 1B0 ", "1F1", "1B1"]]
    schedule = Schedule(rows)
    assert schedule == Schedule.parse(TWO) != gpipe(2, 2)
    assert schedule.rows[0] == [(0, "F", 0), (0, "F", 1), (0, "B", 0), (0, "B", 1)]
    assert (schedule.ranks, schedule.stages, schedule.micro_batches, schedule.rank_of) == (2, 2, 2, [0, 1])
    assert str(schedule) == TWO
    assert repr(schedule) == "Schedule of 2 ranks, 2 stages, 2 micro-batches\n" + "\n".join(
        f"rank {rank}: {row.replace(',', ' ')}" for rank, row in enumerate(TWO.split("\n"))
    )


@pytest.mark.parametrize("text", [TWO, TWO.replace(",", " "), f"\n  {TWO.replace(',', ' , ')}  \n", f",,{TWO},,\r\n"])
def test_commas_blanks_and_idle_cells_are_all_read(text):
    assert str(Schedule.parse(text)) == TWO


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_what_is_written_is_read(make):
    assert Schedule.parse(str(make(3))) == make(3)


@pytest.mark.parametrize(
    "cell, says",
    [
        ("0X0", "there is no kind X: it is one of F .forward., B"),
        ("0f0", "there is no kind f"),
        ("F0", "an action is a stage, a kind and a micro-batch, such as 2F0"),
        ("0F", "an action is a stage"),
        ("-1F0", "an action is a stage"),
        ("0F1.5", "an action is a stage"),
        ("(0F1;0B0)OVERLAP_F_B", "an action is .* 2F0: write the actions that it overlaps one after the other"),
        (Action(0, "Z", 1), "there is no kind Z"),
        (Action(0, "F", -1), "an action is a stage"),
        (Action(0, "F", 1.0), "an action is a stage"),
        (7, "an action is a stage"),
    ],
)
def test_what_is_no_action_is_refused_with_its_place(cell, says):
    with pytest.raises(ValueError, match=rf"^rank 1 at place 2 \({re.escape(str(cell))}\): {says}"):
        Schedule([["0F0"], ["1F0", None, cell]])
    if isinstance(cell, str):
        with pytest.raises(ValueError, match=f"^rank 1 at place 2 .*{says}"):
            Schedule.parse(f"0F0\n1F0,,{cell}")


def test_a_text_is_not_taken_for_rows():
    for rows in (TWO, TWO.split("\n")):
        with pytest.raises(ValueError, match=r"Schedule.parse\(text\)"):
            Schedule(rows)


# ---- torch reads and writes the same ----------------------------------------------------------------------------


def runtime(schedule, rank=0):
    """torch's pipeline for a schedule, with stages that cannot compute."""
    stages = [mock.create_autospec(PipelineStage, instance=True) for _ in range(schedule.rank_of.count(rank))]
    for stage in stages:
        stage.group_rank, stage.group_size, stage.submod = rank, schedule.ranks, None
        stage.num_stages = schedule.stages
    return torchs._PipelineScheduleRuntime(stages, schedule.micro_batches)


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_torch_loads_what_we_write_and_we_read_what_torch_dumps(make, p, tmp_path):
    schedule = make(p)
    (tmp_path / "ours.csv").write_text(str(schedule))
    torch_pipeline = runtime(schedule)
    torch_pipeline._load_csv(str(tmp_path / "ours.csv"))
    assert {s: torch_pipeline.stage_index_to_group_rank[s] for s in range(schedule.stages)} == dict(
        enumerate(schedule.rank_of)
    )
    for form in ("compute_only", "compute_comms"):  # the second with SEND_F, RECV_F, UNSHARD, REDUCE_GRAD, …
        torch_pipeline._dump_csv(str(tmp_path / f"{form}.csv"), form)
        text = (tmp_path / f"{form}.csv").read_text()
        assert ("UNSHARD" in text) == (form == "compute_comms")
        assert Schedule.parse(text) == schedule


@pytest.mark.parametrize("p", range(1, 9))
def test_torch_accepts_and_lowers_every_schedule(p):
    m = 2 * p
    made = [gpipe(p, m), one_f_one_b(p, m), zero_bubble(p, m), zbv(p, m), zbv(p, 3)]
    for schedule in [*made, *(interleaved(p, m, v) for v in (2, 3))]:
        lowered(schedule)


def lowered(schedule):
    """torch's actions, messages between them; raises AssertionError where torch's checks refuse the schedule."""
    rows = {r: [torchs._Action.from_str(str(a)) for a in row] for r, row in enumerate(schedule.rows)}
    homes = torchs._validate_schedule(rows, schedule.ranks, schedule.stages, schedule.micro_batches)
    assert [homes[s] for s in range(schedule.stages)] == schedule.rank_of
    lower = torchs._add_send_recv(rows, homes.__getitem__, schedule.stages)
    assert Schedule(lower.values()) == Schedule.parse(str(schedule))
    return lower


ENDS = [(0, "SEND_F"), (1, "RECV_F"), (2, "SEND_F"), (3, "RECV_F")]
ENDS += [(3, "SEND_B"), (2, "RECV_B"), (1, "SEND_B"), (0, "RECV_B")]


def test_a_schedule_of_a_readers_own_runs_in_torch_too():
    """Four stages in a V on two ranks, one backward whole and one in halves."""
    text = """
    0F0 0F1 3F0 3B0 3F1 3I1 0B0 3W1 0I1 0W1
    1F0 2F0 1F1 2F1 2B0 1B0 2B1 1I1 1W1
    """
    lower = lowered(Schedule.parse(text).check())
    messages = {str(a) for row in lower.values() for a in row if not a.is_compute_op}
    assert messages == {f"{s}{kind}{i}" for s, kind in ENDS for i in (0, 1)}  # none from stage 1 to 2: both on rank 1


# ---- what a run takes -------------------------------------------------------------------------------------------


def test_times_of_two_ranks_by_hand():
    """F 1, I 2, W 3, a message 0.5: on paper, each action behind what it waits for."""
    schedule = Schedule.parse("0F0 0F1 0B0 0I1 0W1\n1F0 1B0 1F1 1I1 1W1")
    first, second = schedule.times(1, 2, 3, message=0.5)
    assert [str(action) for action, _, _ in first] == ["0F0", "0F1", "0B0", "0I1", "0W1"]
    assert [(start, end) for _, start, end in second] == [(1.5, 2.5), (2.5, 7.5), (7.5, 8.5), (8.5, 10.5), (10.5, 13.5)]
    assert [(start, end) for _, start, end in first] == [(0, 1), (1, 2), (8, 13), (13, 15), (15, 18)]
    assert schedule.makespan(1, 2, 3, 0.5) == 18
    assert schedule.bubble(1, 2, 3, 0.5) == (18 - 2 * 6) / 18
    assert schedule.in_flight() == [2, 1]


def test_times_for_each_stage_and_none_on_the_way_within_a_rank():
    schedule = Schedule.parse("0F0 1F0 1B0 0B0")
    assert schedule.makespan([1, 10], [2, 20], [3, 30], message=100) == 66
    assert schedule.bubble([1, 10], [2, 20], [3, 30], message=100) == 0
    assert schedule.makespan(2, 4, 6, message=100) == 12  # of both stages together
    uneven = one_f_one_b(2, 1)
    assert uneven.makespan([1, 5], [1, 5], [1, 5]) == 18
    assert uneven.bubble([1, 5], [1, 5], [1, 5]) == pytest.approx((18 - 15) / 18)


def test_the_span_of_a_rank_begins_with_its_first_action():
    """Rank 1 has work for 12 seconds, from 1 to 13: it never waits, though the run takes 13."""
    late = Schedule.parse("0F0 0I0 0W0\n1F0 1I0 1W0")
    assert late.makespan(1, 1, [0, 10]) == 13
    assert late.bubble(1, 1, [0, 10]) == 0
    assert gpipe(1, 3).bubble(0, 0, 0) == 0


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), "1", None])
def test_times_that_cannot_be_are_refused(wrong):
    schedule = one_f_one_b(2, 2)
    for name, times in {
        "F": (wrong, 1, 1),
        "I": (1, wrong, 1),
        "W": (1, 1, [1, wrong]),
        "message": (1, 1, 1, wrong),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} is .*finite number"):
            schedule.makespan(*times)
    with pytest.raises(ValueError, match="^I has 3 times for 2 stages"):
        schedule.bubble(1, [1, 1, 1], 1)


def test_a_circle_is_refused_by_all_that_would_wait_for_ever():
    schedule = Schedule.parse("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1")
    for ask in (schedule.check, schedule.chart, *(lambda f=f: f(1, 1, 1) for f in (schedule.times, schedule.bubble))):
        with pytest.raises(ValueError, match="wait for each other"):
            ask()
    assert schedule.in_flight() == [1, 2]  # from the rows alone


# ---- how it shows itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_schedule_shows_itself_with_every_action_in_words(make):
    schedule = make(4)
    html = schedule._repr_html_()
    svg = ElementTree.fromstring(html[html.index("<svg") : html.index("</div>")])
    words = [element.text for element in svg.iter() if element.tag.endswith("text")]
    many = schedule.stages > schedule.ranks
    for action in itertools.chain(*schedule.rows):
        assert (str(action) if many else str(action).lstrip("0123456789")) in words
    boxes = sum(element.get("d", "").count("v22") for element in svg.iter())
    assert boxes == sum(map(len, schedule.rows))
    title = next(element.text for element in svg.iter() if element.tag.endswith("title"))
    assert f"4 ranks, {schedule.micro_batches} micro-batches: time {schedule.makespan(1, 1, 1):g}, bubble" in title
    assert f"in flight {', '.join(map(str, schedule.in_flight()))}" in title
    assert int(svg.get("font-size")) >= 10 and "overflow-x:auto" in html
    assert len(html) < 100_000


def test_a_chart_of_other_times_is_drawn_to_their_scale():
    svg = one_f_one_b(1, 1).chart(3, 1, 1).svg
    widths = [float(width) for width in re.findall(r"M[\d.]+ \d+h([\d.]+)v22", svg)]
    assert widths == [pytest.approx(widths[0]), pytest.approx(widths[0] * 2 / 3, abs=0.1)]
    huge = one_f_one_b(4, 64).chart(1000, 1000, 0.001)
    assert int(re.search(r'width="(\d+)"', huge.svg)[1]) < 9000
    assert repr(huge).startswith("4 ranks, 64 micro-batches: time 134,000, bubble 4.5 %, in flight 4, 3, 2, 1")


def test_charts_that_are_compared_share_a_scale():
    for schedule in (gpipe(4, 8), interleaved(4, 8, 2)):
        width = int(re.search(r'width="(\d+)"', schedule.chart(scale=40).svg)[1])
        assert width == pytest.approx(40 * schedule.makespan(1, 1, 1) + 70)


def test_a_table_that_cannot_run_shows_its_rows_and_why():
    html = Schedule.parse("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1")._repr_html_()
    assert "rank 1: 1F0 1F1 1B0 1B1" in html and "the ranks wait for each other" in html and "<svg" not in html


def test_the_charts_colours_can_be_read_and_are_no_ranks():
    assert PAPER == palette.PAPER and set(COLOURS) == set(KINDS)
    for fill, ink in COLOURS.values():
        full = "#" + "".join(2 * digit for digit in ink[1:])
        assert palette.contrast(fill, full) >= 4.5
        assert fill not in palette.RANKS
