"""The timeline to move about in: what the page holds, that it needs nothing else, and how fast a browser draws it."""

import json
import os
import re
import shutil

import pytest

from pardist_lib import pictures
from pardist_lib.measure.trace import Event
from pardist_lib.pictures.timeline_page import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ALL = (0, 1, 2, 3)


def many(count=10_000, ranks=4):
    """Events like those of a long run: four of compute, then a collective that waits for rank 3."""
    made, each = [], count // ranks
    for rank in range(ranks):
        for i in range(each):
            start = i * 1e-4 + rank * 1e-5
            if i % 5:
                made.append(Event(rank, "compute", ("mm", "addmm", "relu")[i % 3], start, start + 8e-5))
            else:
                late = (None, 0.0) if rank == 3 else (3, (3 - rank) * 1e-5)
                made.append(Event(rank, "communication", "all_reduce", start, start + 3e-4, 4096 + i, ALL, None, *late))
    return made


def test_the_page_is_one_file_that_needs_no_network(tmp_path):
    shown = pictures.explore(many(40), title="</script><b>mine</b>")
    text = shown.save(tmp_path / "timeline.html").read_text()
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", text)
    assert "</script><b>" not in text and "&lt;b&gt;mine" in text
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.S)[1])
    assert data["calls"] == ["all_reduce"] and data["groups"] == [[], [0, 1, 2, 3]]
    assert [len(lane["c"]) + len(lane["m"]) for lane in data["lanes"]] == [10] * 4
    assert data["lanes"][0]["m"][1] == [0, 500.0, 300.0, 4101, 1, -1, 3, 30.0]
    with pytest.raises(ValueError, match="must end in .html"):
        shown.save(tmp_path / "timeline.png")


def test_the_widget_leaves_a_picture_and_refuses_what_the_timeline_refuses():
    shown = pictures.explore(many(40))
    assert "iframe" in shown.widget.value and shown.still.alt.startswith("timeline of 4 ranks")
    with pytest.raises(ValueError, match="there are no events"):
        pictures.explore([])


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "CI installs Chromium for this test"
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
    with sync_playwright() as p:
        yield p.chromium.launch(executable_path=CHROMIUM, args=flags)


PAN = """async () => {
    const t = window.timeline, spans = [], draws = [];
    t.look(0, t.data.end / 4);
    for (let i = 0; i < 60; i++) {
        const [a, b] = t.span(), began = performance.now();
        t.look(a + t.data.end / 100, b + t.data.end / 100);
        await new Promise(requestAnimationFrame);
        spans.push(performance.now() - began); draws.push(t.draw.took);
    }
    spans.sort((a, b) => a - b); draws.sort((a, b) => a - b);
    return [spans[30], draws[30], draws[59]];
}"""


@pytest.mark.timeout(120)
@pytest.mark.skipif(not CHROMIUM and not os.environ.get("CI"), reason="no Chromium on this machine")
def test_ten_thousand_events_draw_in_under_a_second_and_scroll(browser, tmp_path):
    """Loosely, for a machine that does other things: the whole page in a second, a step of scrolling in 100 ms."""
    path = tmp_path / "timeline.html"
    path.write_text(page(many(), "ten thousand"), encoding="utf-8")
    tab = browser.new_page(viewport={"width": 1200, "height": 500})
    wrong = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda request: None if request.url.startswith("file:") else wrong.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_function("() => window.timeline && window.timeline.draw.times > 0")
    loaded = tab.evaluate("() => performance.timing.domContentLoadedEventEnd - performance.timing.responseStart")
    first = tab.evaluate("() => { timeline.look(0, timeline.data.end); timeline.draw(); return timeline.draw.took; }")
    step, draw, worst = tab.evaluate(PAN)
    print(
        f"page {loaded} ms, all events {first:.1f} ms, a step {step:.1f} ms, of it drawing {draw:.1f}, {worst:.1f} ms"
    )
    assert loaded < 1000 and first < 1000 and draw < 100 and step < 100
    tab.evaluate("() => timeline.look(0, timeline.data.end)")
    tab.select_option("#rank", "1")
    tab.select_option("#name", "all_reduce")
    said = tab.inner_text("#said")
    assert "rank 1: all_reduce" in said and "4,096 bytes on this rank" in said
    assert "in a group of 4: 0, 1, 2, 3" in said and "waited 20 µs for rank 3, which came last" in said
    tab.click("#next")
    assert "4,101 bytes" in tab.inner_text("#said")
    before = tab.evaluate("() => timeline.span()")
    tab.mouse.move(600, 120), tab.mouse.wheel(0, -400)
    tab.wait_for_function(f"() => timeline.span()[1] - timeline.span()[0] < {before[1] - before[0]}")
    assert not wrong
    if shots := os.environ.get("PARDIST_SHOTS"):
        tab.select_option("#rank", "")
        tab.click("#next")
        tab.screenshot(path=f"{shots}/timeline_page.png")
