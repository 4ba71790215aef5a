"""Widgets answer, and leave a picture behind."""

import re
import shutil

import ipywidgets
import pytest

from pardist_lib import pictures
from pardist_lib.pictures import widgets
from tests.pictures.picture_examples import ring_states


@pytest.fixture
def shown(monkeypatch):
    """What a widget displays, in order."""
    outputs = []
    monkeypatch.setattr(widgets, "display", lambda thing, raw=False: outputs.append(thing))
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
    (slider,) = children(live, ipywidgets.IntSlider)
    back, forward = children(live, ipywidgets.Button)
    assert (slider.min, slider.max, slider.value) == (0, 4, 0)
    back.click()
    assert slider.value == 0
    for expected in (1, 2, 3, 4, 4):
        forward.click()
        assert slider.value == expected
    (stack,) = children(live, ipywidgets.Stack)
    assert len(stack.children) == 5
    assert all(f"step {i} of 4" in page.value for i, page in enumerate(stack.children) if i)


def test_stepper_shows_captions_that_are_its_own():
    frames = pictures.ring_steps(ring_states(2))
    pages = children(pictures.stepper(frames, ["<a>", "b", frames[2].caption]), ipywidgets.HTML)
    assert [bool(re.match("<div>", page.value)) for page in pages] == [True, True, False]
    assert pages[0].value.startswith("<div>&lt;a&gt;</div>")


def test_one_picture_needs_no_slider():
    (slider,) = children(pictures.stepper([look(1)]), ipywidgets.IntSlider)
    assert slider.disabled


def test_three_outputs_the_first_of_them_a_picture(shown):
    live = pictures.stepper([look(1), look(2)])
    live._ipython_display_()
    still, view, line = shown
    assert isinstance(still, pictures.Picture) and len(still.png) < 120_000
    assert "2 of 2 pictures to step through" in still.alt
    assert view["application/vnd.jupyter.widget-view+json"]["model_id"] == live.widget.model_id
    assert view["text/plain"] == "" and "Run this cell" in line["text/plain"]


def test_knobs_redraw_when_let_go():
    live = pictures.knobs(look, ranks=(1, 7), size=["small", "big"])
    (slider,) = children(live, ipywidgets.IntSlider)
    (choice,) = children(live, ipywidgets.Dropdown)
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
