"""Widgets answer, and leave a picture behind."""

import re
import shutil

import ipywidgets
import pytest

from pardist_lib import pictures
from pardist_lib.pictures import figure, widgets
from tests.pictures.picture_examples import ring_states


@pytest.fixture
def shown(monkeypatch):
    """What a widget displays, in order."""
    outputs = []
    monkeypatch.setattr(widgets, "display", lambda thing, raw=False, metadata=None: outputs.append(thing))
    return outputs


def look(ranks, size="small"):
    if ranks == 5:
        raise ValueError("five <ranks>")
    return pictures.bars({"sent": [ranks] * 2}, title=size)


def children(live, kind):
    found, left = [], [live.widget]
    while left:
        widget = left.pop(0)
        found += [widget] if isinstance(widget, kind) else []
        left += getattr(widget, "children", ())
    return found


def test_stepper_steps_and_stops_at_the_ends():
    live = pictures.stepper(pictures.ring_steps(ring_states(3)))
    (slider,) = children(live, ipywidgets.SelectionSlider)
    back, forward = children(live, ipywidgets.Button)
    assert slider.index == 0 and [label for label, _ in slider.options] == [f"{i} of 5" for i in range(1, 6)]
    back.click()
    assert slider.index == 0
    for expected in (1, 2, 3, 4, 4):
        forward.click()
        assert slider.index == expected
    (stack,) = children(live, getattr(ipywidgets, "Stack", ipywidgets.Tab))
    assert len(stack.children) == 5
    assert all(f"step {i} of 4" in page.value for i, page in enumerate(stack.children) if i)


def test_stepper_shows_captions_that_are_its_own():
    frames = pictures.ring_steps(ring_states(2))
    pages = children(pictures.stepper(frames, ["<a>", "b", frames[2].caption]), ipywidgets.HTML)
    assert [bool(re.match("<div>", page.value)) for page in pages] == [True, True, False]
    assert pages[0].value.startswith("<div>&lt;a&gt;</div>")


def test_one_picture_needs_no_slider():
    (slider,) = children(pictures.stepper([look(1)]), ipywidgets.SelectionSlider)
    assert slider.disabled


def test_three_outputs_the_first_of_them_a_picture(shown):
    live = pictures.stepper([look(1), look(2)])
    live._ipython_display_()
    still, view, line = shown
    assert len(still["image/png"]) < 160_000 and still["text/plain"] == live.still.alt
    assert "2 of 2 pictures to step through" in live.still.alt
    assert view["application/vnd.jupyter.widget-view+json"]["model_id"] == live.widget.model_id
    assert view["text/plain"] == "" and "Run this cell" in line["text/plain"]
    assert "2 of 2 pictures to step through" in line["text/html"]  # alt text that a page shows


def test_knobs_redraw_when_let_go():
    live = pictures.knobs(look, ranks=(1, 7), size=["small", "big"])
    (slider,) = children(live, ipywidgets.IntSlider)
    (choice,) = children(live, ipywidgets.SelectionSlider)  # the arrow keys move it; JupyterLab takes a dropdown's
    (page,) = children(live, ipywidgets.HTML)
    assert slider.value == 4 and not slider.continuous_update and slider.description == "ranks"
    assert "small: every rank 4 bytes" in page.value
    assert live.still.alt.endswith("(Drawn for ranks = 4, size = small.)") and "4 bytes" in live.still.alt
    slider.value = 6
    choice.value = "big"
    assert "big: every rank 6 bytes" in page.value
    slider.value = 5
    assert page.value == "<pre>ValueError: five &lt;ranks&gt;</pre>"
    slider.value = 7
    assert "big: every rank 7 bytes" in page.value


@pytest.mark.parametrize(
    "message, wrong",
    {
        "0 pictures": lambda: pictures.stepper([]),
        "1 pictures with 2": lambda: pictures.stepper([look(1)], ["a", "b"]),
        "at least one control": lambda: pictures.knobs(look),
        "from ranks=None": lambda: pictures.knobs(look, ranks=None),
        "must return a picture": lambda: pictures.knobs(lambda n: n, n=3),
    }.items(),
)
def test_wrong_input_is_told(message, wrong):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize(
    "state, visible",
    {
        '<div class="pardist-live"><input></div>': ["widget"],  # the kernel is there
        '<div class="jupyter-widgets">Error displaying widget: model not found</div>': [
            "still",
            "line",
        ],  # opened again
        "Loading widget...": ["still", "line"],
        "": ["still", "line"],  # an untrusted notebook shows text/plain
    }.items(),
)
def test_the_browser_hides_what_is_not_needed(state, visible):
    """JupyterLab's own elements, by hand: one child of the output area for each output."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright for Python")
    if not browser:
        pytest.skip("needs Chromium")
    inside = {
        "before": "a table",
        "still": "<img>",
        "widget": state,
        "line": f'{widgets.HIDE}<em class="pardist-run">Run this cell</em>',
        "after": "text",
    }
    page = "".join(
        f'<div class="jp-OutputArea-child" id="{name}"><div class="jp-OutputArea-output">{html}</div></div>'
        for name, html in inside.items()
    )
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        tab = chromium.new_page()
        tab.set_content(f'<div class="jp-OutputArea">{page}</div>')
        seen = [
            name
            for name in inside
            if tab.evaluate(f"getComputedStyle(document.getElementById('{name}')).display") != "none"
        ]
        chromium.close()
    assert seen == ["before", *visible, "after"]


def test_choices_are_sliders_and_have_words():
    many = ipywidgets.Dropdown(options={"one": 1, "two": 2}, value=2, description="how many ranks")
    live = pictures.knobs(look, ranks=many, size=["small", "big"])
    ranks, size = children(live, ipywidgets.SelectionSlider)
    assert (ranks.description, ranks.value, size.description) == ("how many ranks", 2, "size")
    assert live.hint.startswith("Drawn for how many ranks = two, size = small.")
    ranks.value = 1
    (page,) = children(live, ipywidgets.HTML)
    assert "every rank 1 byte" in page.value


def test_while_it_works_the_old_picture_is_pale():
    seen = []

    def slow(ranks):
        seen.append(children(live, ipywidgets.HTML)[0].value if "live" in known else "")
        return look(ranks)

    known = set()
    live = pictures.knobs(slow, ranks=(1, 4))
    known.add("live")
    (slider,) = children(live, ipywidgets.IntSlider)
    slider.value = 3
    assert seen[-1].startswith("<em>working …</em>") and "opacity" in seen[-1]
    assert "working" not in children(live, ipywidgets.HTML)[0].value


def test_without_a_stack_pages_are_tabs(monkeypatch):
    monkeypatch.delattr(ipywidgets, "Stack", raising=False)  # ipywidgets 7
    live = pictures.stepper([look(1), look(2)])
    assert len(children(live, ipywidgets.Tab)[0].children) == 2


def test_pictures_beside_each_other_only_where_they_can_be_read():
    small = pictures.Picture(figure.paint((2, 1), lambda figure: None), "a small one")
    wide = look(1)
    beside, below = pictures.stepper([small, small]).still, pictures.stepper([wide, wide]).still

    def size(picture):
        return int.from_bytes(picture.png[16:20]), int.from_bytes(picture.png[20:24])

    assert size(beside)[0] > 2 * size(small)[0] and size(beside)[1] < 2 * size(small)[1]
    assert size(below)[0] > size(wide)[0] and size(below)[1] > 2 * size(wide)[1]


def test_a_long_name_leaves_a_slider_its_track():
    live = pictures.knobs(
        lambda between_all_of_the_nodes_gbit_per_second: look(1), between_all_of_the_nodes_gbit_per_second=[1, 2]
    )
    (slider,) = children(live, ipywidgets.SelectionSlider)
    assert (slider.layout.width, slider.layout.max_width) == ("100%", "640px")
    own = ipywidgets.IntSlider(layout={"width": "200px"})
    pictures.knobs(lambda x: look(1), x=own)
    assert own.layout.width == "200px"
