"""What pictures promise: the data they were given, in the table and in words, and an image that can be read."""

import base64
import io
import subprocess
import sys
import warnings
from itertools import combinations

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from pardist_lib import pictures
from pardist_lib.pictures import figure as figures
from pardist_lib.pictures import palette
from tests.pictures.picture_examples import (
    EXAMPLES,
    LOSS,
    event,
    held_over_time,
    processes,
    random,
    ring_events,
    ring_states,
    step_events,
)

timelines = sys.modules["pardist_lib.pictures.timeline"]  # pictures.timeline is the function


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_picture_shows_itself(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib|pyparsing")  # their own
        picture = EXAMPLES[name]()
    data, metadata = picture._repr_mimebundle_()
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 5  # something is drawn
    assert 1000 < len(picture.png) <= 120_000
    assert metadata["image/png"]["width"] <= 800
    assert data["text/plain"] == repr(picture) and picture.alt[-1] == "." and len(picture.alt) > 20
    assert metadata["image/png"]["alt"] == picture.alt
    assert len(picture.table()) > 0
    picture.save(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == picture.png
    with pytest.raises(ValueError, match="png"):
        picture.save(tmp_path / "x.pdf")


@pytest.mark.parametrize("name", EXAMPLES)
def test_same_input_same_bytes(name):
    assert EXAMPLES[name]() == EXAMPLES[name]()


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_text_is_cut_or_covered_by_text(name, monkeypatch):
    drawn = []

    class Recorded(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(figures, "Figure", Recorded)
    EXAMPLES[name]()
    figure = drawn[-1]
    with matplotlib.rc_context({"text.parse_math": False}):
        boxes = [(text.get_text(), text.get_window_extent()) for text in written(figure) if text.get_text().strip()]
    width, height = figure.bbox.size
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, f"{text!r} is cut"
    for (a, first), (b, second) in combinations(boxes, 2):
        assert not first.padded(-2).overlaps(second.padded(-2)), f"{a!r} covers {b!r}"


def written(figure):
    """Every text that is drawn: matplotlib also keeps labels of ticks outside the axis, and of hidden axes."""
    yield from figure.texts
    for axes in figure.axes:
        yield from axes.texts
        if axes.get_legend():
            yield from axes.get_legend().findobj(Text)
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            yield axis.label
            low, high = sorted(axis.get_view_interval())
            yield from (tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)


def test_matplotlib_of_the_reader_is_left_alone():
    code = """
import sys, matplotlib
from pardist_lib import pictures
plain = pictures.curves({"a": [1, 2]})
assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules
matplotlib.rcParams["font.size"] = 33
before = dict(matplotlib.rcParams)
assert pictures.curves({"a": [1, 2]}) == plain
assert dict(matplotlib.rcParams) == before
import matplotlib.pyplot
assert not matplotlib.pyplot.get_fignums()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def share(picture, colour):
    """How much of the image has this colour, give or take what the palette of the PNG rounds."""
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"), int)
    return (np.abs(pixels - 255 * np.array(palette.channels(colour))).max(-1) <= 6).mean()


# shards and held


def test_shards_print_their_values():
    picture = pictures.shards([[1, 2], [3, 4.5], [5, 6]], title="x")
    assert picture.table().rows == [
        {"rank": 0, "shape": "(2,)", "values": "[1 2]"},
        {"rank": 1, "shape": "(2,)", "values": "[3 4.5]"},
        {"rank": 2, "shape": "(2,)", "values": "[5 6]"},
    ]
    assert "shape (6,), cut along dimension 0" in picture.alt and "Rank 1: [3 4.5]." in picture.alt
    assert all(share(picture, palette.rank_colour(r)) > 0.03 for r in range(3))
    assert share(picture, palette.rank_colour(3)) < 0.001


def test_shards_take_tensors():
    parts = [torch.ones(2, 3, requires_grad=True), torch.zeros(1, 3, dtype=torch.bfloat16)]
    assert "shape (3, 3)" in pictures.shards(parts).alt
    assert "shape (2, 5, 4)" in pictures.shards([torch.ones(2, 2, 4), torch.ones(2, 3, 4)], dim=1).alt


def test_owners_count_their_elements():
    picture = pictures.shards((4, 6), [[0, 0, 0, 1, 1, 2]])
    assert picture.table().rows == [{"rank": 0, "elements": 12}, {"rank": 1, "elements": 8}, {"rank": 2, "elements": 4}]
    first, second, third = (share(picture, palette.rank_colour(r)) for r in range(3))
    assert first > second > third > 0.02


def test_held_colours_say_where_values_came_from():
    gathered = pictures.held({"after": [[7], [7]]}, came_from={"after": [0, 0]})
    assert share(gathered, palette.rank_colour(0)) > 3 * share(gathered, palette.rank_colour(1))
    summed = pictures.held({"after": [[7], [7]]}, came_from={"after": [None, [-1]]})
    assert share(summed, palette.NEUTRAL) > 0.05
    assert pictures.held({"a": [[1], None]}).table().rows[1] == {"rank": 1, "a": "nothing"}


# collectives


def test_collective_finds_where_chunks_came_from():
    picture = pictures.collective("all-gather", [[10], [20]], [[10, 20], [10, 20]])
    assert "Before: rank 0 10; rank 1 20. After: every rank 10, 20." in picture.alt
    assert share(picture, palette.NEUTRAL) < 0.001
    assert share(pictures.collective("all-reduce", [[10], [20]], [[30], [30]]), palette.NEUTRAL) > 0.05


def test_a_chunk_that_several_ranks_had_belongs_to_its_holder_or_to_nobody():
    collectives = sys.modules["pardist_lib.pictures.collectives"]
    before = collectives._chunks([[1, 2], [1, 3]], "")
    assert collectives._source(np.array(1), 1, before) == 1
    assert collectives._source(np.array(3), 0, before) == 1
    assert collectives._source(np.array(1), 5, before) is None
    assert collectives._source(np.array(4), 0, before) is None


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ring_steps_say_what_is_sent(world):
    frames = pictures.ring_steps(ring_states(world))
    assert len(frames) == 2 * world - 1 and frames[0].caption == "start"
    kinds = [": add"] * (world - 1) + [": copy"] * (world - 1)
    assert [f.caption for f in frames[1:]] == [f"step {i} of {len(kinds)}{k}" for i, k in enumerate(kinds, 1)]
    for frame in frames[1:]:
        assert frame.alt.count("sends chunk") + frame.alt.count("sends") == 2 * world
    assert f"{world * world} of {world * world} chunks are complete" in frames[-1].alt
    if world == 4:
        assert "rank 0 sends chunk 0 to rank 1" in frames[1].alt
        assert frames[1].table().rows[1]["chunk 0"] == "0+1"
        assert frames[3].table().rows[3]["chunk 0"] == "0+1+2+3"


def test_ring_steps_show_whose_a_value_is_and_what_is_finished():
    start, step, end = pictures.ring_steps([[[1, 2], [10, 20]], [[1, 22], [11, 20]], [[11, 22], [11, 22]]])
    assert all(share(start, palette.rank_colour(r)) > 0.05 for r in (0, 1)) and share(start, palette.NEUTRAL) < 0.001
    assert all(share(end, palette.rank_colour(r)) < 0.02 for r in (0, 1)) and share(end, palette.NEUTRAL) > 0.05


def test_ring_steps_take_values():
    start, end = pictures.ring_steps([[[1, 2], [10, 20]], [[1, 22], [11, 20]]])
    assert end.alt.endswith("Rank 1 sends chunk 1 to rank 0 and rank 0 sends chunk 0 to rank 1.")
    assert end.table().rows[0] == {"rank": 0, "chunk 0": "1", "chunk 1": "22"}


# gradients, curves, bars


def test_gradients_say_how_far_ranks_are_apart():
    picture = pictures.gradients([[0.0, 1.0], [0.5, -1.0], [0.25, 0]], [[0.25, 0.0]] * 3)
    assert "Before synchronisation ranks differ by up to 2." in picture.alt
    assert "After synchronisation ranks differ by up to 0." in picture.alt
    rows = picture.table().rows
    assert len(rows) == 6 and rows[1]["norm"] == pytest.approx(1.25**0.5) and rows[1]["values"] == "[0.5 -1]"
    named = pictures.gradients([[0.0], [2.0]], [[1.0], [1.0]], names=("without f", "with f"))
    assert "Without f ranks differ by up to 2. With f ranks differ by up to 0." in named.alt


def test_gradients_with_nan_are_drawn():
    assert "by up to nan" in pictures.gradients([[np.nan, 1.0], [1.0, 2.0]]).alt
    assert share(pictures.gradients([np.full((30, 30), np.nan)] * 2), "#000000") > 0.2


def test_curves_give_the_numbers_and_a_bound():
    picture = pictures.curves({"one": LOSS, "four": [*LOSS[:3], 0.5 + 3e-8]}, difference=True)
    assert "one from 2.5 to 0.5" in picture.alt and "never differ by more than 1e-07" in picture.alt
    assert picture.table().column("one") == LOSS
    assert "are equal at every step" in pictures.curves({"a": LOSS, "b": LOSS}, difference=True).alt
    assert pictures.curves({"a": [1, 2], "b": [3]}).table().column("b") == [3.0, None]


def test_curves_of_ranks_have_their_colours():
    picture = pictures.curves({f"rank {r}": np.add(LOSS, r) for r in range(4)})
    assert all(share(picture, palette.rank_colour(r)) > 0.0003 for r in range(4))
    assert share(pictures.curves({"a": LOSS, "b": LOSS}), palette.rank_colour(3)) == 0


def test_a_promised_bound_and_named_steps_are_drawn():
    close = {"a": LOSS, "b": np.add(LOSS, [1e-8, 2e-7, 0, 3e-8])}
    plain, bound = pictures.curves(close, difference=True), pictures.curves(close, difference=1e-6)
    assert plain.alt == bound.alt and plain.png != bound.png
    with pytest.raises(ValueError, match="2 ticks for 4 steps"):
        pictures.curves(close, ticks=["1 kB", "4 kB"])


def test_coinciding_curves_are_both_seen():
    picture = pictures.curves({"one": LOSS, "four": LOSS})
    pale = palette.mix(palette.PAPER, palette.LINES[0], 0.45)
    assert share(picture, palette.LINES[1]) > 0.001 and share(picture, pale) > 0.001


def test_bars_put_measured_next_to_computed():
    picture = pictures.bars({"all_reduce": [30, 30], "send": [5, 0]}, [35, 31])
    assert "rank 0 35 bytes (computed 35 bytes); rank 1 30 bytes (computed 31 bytes)" in picture.alt
    assert picture.table().rows[0] == {"rank": 0, "all_reduce": 30, "send": 5, "total": 35, "computed": 35}
    by_kind = pictures.bars({"a": [1, 2]}, {"a": [1, 2]}, unit="calls").table().rows[1]
    assert by_kind == {"rank": 1, "a": 2, "total": 2, "computed a": 2, "computed": 2}


# timeline


def test_timeline_totals():
    rows = pictures.timeline(step_events()).table().rows
    assert len(rows) == 4
    for row in rows:  # compute 0–9 ms, communication 2–10 ms: 7 ms at once
        assert row["compute ms"] == pytest.approx(9) and row["communication ms"] == pytest.approx(8)
        assert row["overlapped ms"] == pytest.approx(7)
        assert row["calls"] == 3 and row["bytes"] == 3 * 1_572_864


def test_timeline_words_have_no_times_unless_asked():
    assert pictures.timeline(step_events()).alt.endswith("Every rank: 3 all_reduce (4,718,592 bytes).")
    assert "10 ms long" in pictures.timeline(step_events(), times=True).alt


def test_timelines_that_are_compared_end_at_the_same_time():
    events = step_events()  # 10 ms
    pngs = [pictures.timeline(events, title="", until=u).png for u in (None, 0.01, 0.02)]
    drawn = [np.asarray(Image.open(io.BytesIO(png)).convert("L")) for png in pngs]
    assert (drawn[0] == drawn[1]).all()
    white = [d[110:-110, d.shape[1] // 2 + 120 :] for d in drawn]  # to the right of 10 of 20 ms
    assert (white[1] < 230).mean() > 0.3 and (white[2] < 230).mean() < 0.05  # there: boxes, nothing but rules


def test_memories_that_are_compared_share_both_axes():
    held = {0: held_over_time()[0]}
    peak, long = int(held[0].bytes.sum(1).max()), held[0].times[-1]

    def drawn(**ends):
        png = pictures.memory_over_time(held, title="", **ends).png
        return (np.asarray(Image.open(io.BytesIO(png)).convert("L"))[180:-60, 250:] < 235).mean()

    alone = drawn()
    assert drawn(most=peak, until=long) == alone
    assert drawn(most=2 * peak) < 0.75 * alone > drawn(until=2 * long)


def test_timeline_takes_a_trace():
    class Trace:
        events, world_size = step_events(2), 3

    rows = pictures.timeline(Trace).table().rows
    assert len(rows) == 3 and rows[2]["calls"] == 0


def test_nested_and_touching_events_count_once():
    events = [event(0, "compute", "outer", 0, 4), event(0, "compute", "inner", 1, 2), event(0, "compute", "b", 4, 5)]
    assert pictures.timeline(events).table().rows[0]["compute ms"] == pytest.approx(5000)


def test_sends_meet_their_receives():
    from matplotlib.patches import FancyArrowPatch

    figure = Figure()
    events = [timelines.SimpleNamespace(**e) for e in ring_events()]
    timelines._arrows(figure.add_subplot(), events, 0.0, 1000.0)
    assert len(figure.findobj(FancyArrowPatch)) == 4


def test_ten_thousand_events_become_few_boxes():
    rng = np.random.default_rng(0)
    starts = np.sort(rng.uniform(0, 1, 10_000))
    events = [
        event(i % 4, "compute" if i % 3 else "communication", f"op{i % 3 and i % 7}", s, s + 5e-5, 8)
        for i, s in enumerate(starts)
    ]
    picture = pictures.timeline(events)
    assert len(picture.png) < 120_000
    assert sum(row["calls"] for row in picture.table().rows) == sum(e["kind"] == "communication" for e in events)
    lane = [timelines.SimpleNamespace(**e) for e in events if e["rank"] == 0 and e["kind"] == "compute"]
    boxes = list(timelines._boxes(lane, 0.0, 6.9))
    assert sum(box[5] for box in boxes) == len(lane) and len(boxes) < len(lane) / 2


# process tree


def test_process_tree_prints_as_a_tree_without_pids():
    picture = pictures.process_tree(processes(2))
    assert repr(picture) == "\n".join(
        [
            "processes (7)",
            "kernel",
            "├─ torchrun agent",
            "│  ├─ worker of rank 0",
            "│  └─ worker of rank 1",
            "└─ host",
            "   ├─ rank 0",
            "   └─ rank 1",
        ]
    )
    assert "host started rank 0 and rank 1." in picture.alt and "310" not in picture.alt
    assert picture.table().column("pid")[:3] == ["100", "200", "300"]


# what cannot be drawn

WRONG = {
    "one array per rank": lambda: pictures.shards(3),
    "rectangular": lambda: pictures.shards([[[1], [2, 3]]]),
    "array of numbers": lambda: pictures.shards([["a"]]),
    "cannot be joined along dim 0: rank 0 \\(2, 3\\), rank 1 \\(2, 4\\)": lambda: pictures.shards(
        [random(2, 3), random(2, 4)]
    ),
    "dim=2, but": lambda: pictures.shards([random(2, 3)], dim=2),
    "broadcast": lambda: pictures.shards((4, 4), [0, 1, 2]),
    "whole rank numbers": lambda: pictures.shards((2,), [0, -1]),
    "more than 1024 tiles": lambda: pictures.shards((64, 64), np.arange(4096).reshape(64, 64)),
    "a has 1 ranks, b has 2 ranks": lambda: pictures.held({"a": [[1]], "b": [[1], [2]]}),
    "2 entries for 1 ranks": lambda: pictures.held({"a": [[1]]}, came_from={"a": [0, 1]}),
    "2 ranks before, 1 after": lambda: pictures.collective("x", [[1], [2]], [[1]]),
    "list of chunks": lambda: pictures.collective("x", ["ab"], [["a"]]),
    "same number of ranks": lambda: pictures.ring_steps([[[1]], [[1, 2]]]),
    "all of one shape": lambda: pictures.gradients([[1, 2], [1, 2, 3]]),
    "empty gradients": lambda: pictures.gradients([[], []]),
    "at least two curves": lambda: pictures.curves({"a": [1]}, difference=True),
    "flat, non-empty": lambda: pictures.curves({"a": []}),
    "one value ≥ 0 per rank": lambda: pictures.bars({"a": [1, 2], "b": [1]}),
    "computed needs one value": lambda: pictures.bars({"a": [1, 2]}, [1, 2, 3]),
    "no events": lambda: pictures.timeline([]),
    "start ≤ end": lambda: pictures.timeline([event(0, "compute", "a", 2, 1)]),
    "are there": lambda: pictures.memory_over_time(held_over_time(), most=1),
    "are there$": lambda: pictures.memory_over_time(held_over_time(), until=0.01),
    "until is 0.5 s, but": lambda: pictures.timeline([event(0, "compute", "a", 0, 1)], until=0.5),
    "kind 'compute' or": lambda: pictures.timeline([event(0, "sleep", "a", 1, 2)]),
    "listed twice": lambda: pictures.process_tree(processes() * 2),
    "ancestors": lambda: pictures.process_tree(
        [{"pid": 1, "parent": 2, "what": "a"}, {"pid": 2, "parent": 1, "what": "b"}]
    ),
    "expected rows with pid": lambda: pictures.process_tree([{"pid": 1}]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_told(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


# matmul


def test_matmul_says_who_holds_what():
    b, c, ranks = np.arange(8).reshape(2, 4), np.arange(12).reshape(4, 3), np.array([0, 0, 1, 1])
    summands = [b[:, :2] @ c[:2], b[:, 2:] @ c[2:]]
    picture = pictures.matmul(
        b,
        c,
        b @ c,
        (ranks, ranks[:, None], -1),
        summands=summands,
        panel=(2, 4),
        title="inner",
        lines=["an all-reduce of A"],
    )
    assert "B: rank 0 columns 0–1 and rank 1 columns 2–3. C: rank 0 rows 0–1 and rank 1 rows 2–3." in picture.alt
    assert "A: whole on every rank. 2 summands as large as A" in picture.alt and "indices 2 to 3 travel" in picture.alt
    assert picture.alt.endswith("an all-reduce of A.")
    assert {"matrix": "C", "rank": "rank 1", "block": "[6 7 8 9 10 11]"} in picture.table().rows
    assert {"matrix": "summand of A", "rank": "rank 0", "block": "[3 4 5 15 24 33]"} in picture.table().rows
    assert share(picture, palette.rank_colour(1)) > 0.03 and share(picture, palette.NEUTRAL) > 0.03


def test_matmul_refuses_what_does_not_fit():
    one = np.ones((2, 2))
    with pytest.raises(ValueError, match=r"shapes \(2, 2\) × \(3, 2\) do not give \(2, 2\)"):
        pictures.matmul(one, np.ones((3, 2)), one, (0, 0, 0))
    with pytest.raises(ValueError, match="three arrays that broadcast"):
        pictures.matmul(one, one, one, ([0, 1, 2], 0, 0))
    with pytest.raises(ValueError, match=r"every summand is as large as A, \(2, 2\)"):
        pictures.matmul(one, one, one, (0, 0, 0), summands=[np.ones(2)])
