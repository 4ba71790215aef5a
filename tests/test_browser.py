"""Every lesson as a reader meets it, in JupyterLab in headless Chromium: opened, run, its knobs moved, interrupted.

    python -m pytest tests/test_browser.py --whole        all lessons; a CI run takes two, chosen by the commit
    PARDIST_SCREENSHOTS=folder python -m pytest …         keeps pictures and a table there

A lesson is opened as it was committed and run from top to bottom; each widget is moved by mouse and by keyboard; an
exercise is answered wrong and right; a cell is stopped in the middle, the kernel restarted. Nothing may be left behind.
"""

import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import psutil
import pytest

from pardist_lib.lessons.exercises import reader

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
WIDTH, LAPTOP, PAGE = 1280, 900, 3000  # pixels
MOST = 1.2e9  # bytes of a lesson's processes, each shared page counted in parts
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells that are not in sight are on the page, too
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

# ---- what is asked of the page --------------------------------------------------------------------------------

CELLS = """() => {
    const cells = jupyterapp.shell.currentWidget.content.model.cells;
    if (jupyterapp.shell.currentWidget.sessionContext.session.kernel.status !== "idle") return [];
    return Array.from({length: cells.length}, (_, i) => cells.get(i)).filter(c => c.type === "code")
        .map(c => [c.executionCount, c.outputs.toJSON()]);
}"""
BROKEN = """() => [...document.querySelectorAll('.jp-OutputArea-output')].filter(e => e.offsetParent)
    .map(e => e.innerText).filter(t => /Error (displaying|creating) widget|Loading widget/.test(t))"""
CUT = """() => [...document.querySelectorAll('.jp-Notebook .jp-RenderedMarkdown, .jp-Notebook .jp-OutputArea-output, '
    + '.jp-Notebook .cm-scroller')].filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 2)
    .map(e => e.className + ': ' + e.innerText.slice(0, 100))"""
WORDLESS = """() => [...document.querySelectorAll('.jp-OutputArea-output img')]
    .filter(i => i.offsetParent && i.naturalWidth > 60 && (i.getAttribute('alt') || '').length < 20
        && !i.closest('.jp-OutputArea-child').nextElementSibling?.innerText.includes('in words')).length"""
LIVE = """() => [...document.querySelectorAll('.jp-Notebook .pardist-live')].map(box =>
    [...box.querySelectorAll('.noUi-handle')].map(h => h.offsetParent && !h.closest('[disabled]') ? 'slider' : 'none')
    .concat([...box.querySelectorAll('input[type=checkbox]')].map(_ => 'checkbox')))"""
SHOWN = """box => [...box.querySelectorAll('img')].filter(i => i.offsetParent).map(i => i.src).join() +
    [...box.querySelectorAll('pre')].filter(i => i.offsetParent).map(i => i.innerText).join()"""
SCROLL = """top => {
    const one = [...document.querySelectorAll('.jp-Notebook, .jp-Notebook *')].slice(0, 9)
        .find(e => e.scrollHeight > e.clientHeight + 50) || document.querySelector('.jp-Notebook');
    one.scrollTop = top;
    return [one.scrollTop, one.clientHeight, one.scrollHeight];
}"""
SET = """([at, text]) => jupyterapp.shell.currentWidget.content.widgets[at].model.sharedModel.setSource(text)"""
RUN = """at => { const panel = jupyterapp.shell.currentWidget; panel.content.activeCellIndex = at;
    jupyterapp.commands.execute('notebook:run-cell'); }"""
SAID = """at => { const outputs = jupyterapp.shell.currentWidget.content.widgets[at].model.outputs.toJSON();
    return outputs.map(o => o.text || (o.traceback || []).join('\\n') || JSON.stringify(o.data)).join('\\n'); }"""
IDLE = """() => jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"""


@pytest.mark.share(2)
@pytest.mark.timeout(900)
@pytest.mark.skipif(not CHROMIUM and not os.environ.get("CI"), reason="no Chromium on this machine")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name[:2])
def test_a_lesson_in_jupyterlab(path, tmp_path):
    assert CHROMIUM, "CI installs Chromium for this test"
    kept = Path(os.environ.get("PARDIST_SCREENSHOTS", tmp_path))
    kept.mkdir(exist_ok=True)
    with lab(path, tmp_path) as (address, server), page_of(address) as (page, errors):
        assert not page.evaluate(BROKEN), "as it was committed"
        with watched(server) as memory:
            seconds = run_all(page)
        for all_of_it in (
            "expand-all-headings",
            "show-all-cell-code",
            "show-all-cell-outputs",
        ):  # what is behind a fold
            page.evaluate(f"() => jupyterapp.commands.execute('notebook:{all_of_it}')")
        page.wait_for_timeout(1000)
        assert not page.evaluate(BROKEN)
        assert not page.evaluate(WORDLESS), "pictures without words"
        assert page.evaluate(CUT) == []
        moved = move_all(page)
        answer(page, path)
        for theme in ("Light", "Dark"):
            pictures_of(page, kept / f"{path.name[:2]}-{theme.lower()}", theme)
        stop_and_restart(page)
        assert not errors, "\n".join(errors)
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])]
    assert not left
    row = {"lesson": path.name[:2], "run all, s": round(seconds), "PSS, MB": round(max(memory) / 1e6), "moved": moved}
    with open(kept / "browser.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    assert max(memory) < MOST, row


# ---- JupyterLab and a page of it --------------------------------------------------------------------------------


@contextmanager
def lab(path, folder):
    """JupyterLab on a copy of a lesson: (its address, its process)."""
    shutil.copy(path, folder)
    for name, values in SETTINGS.items():
        file = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(folder / "config"), "PARDIST_LIVE": "1", "HOME": str(folder)}
    env |= {"PARDIST_ANSWERS": str(folder / "answers"), "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--LabApp.expose_app_in_browser=True", "--IdentityProvider.token=", "--LabApp.news_url="]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(
            [*command, f"--ServerApp.root_dir={folder}"], cwd=folder, env=env, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2)
                break
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/lab/tree/{path.name}", psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def page_of(address):
    """A page with the open lesson, and what went wrong on it: exceptions, and errors on its console."""
    from playwright.sync_api import sync_playwright

    errors = []
    with sync_playwright() as p:
        page = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS).new_page(
            viewport={"width": WIDTH, "height": LAPTOP}
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.isReady", timeout=60_000)
        yield page, errors


@contextmanager
def watched(server):
    """The bytes (PSS) of all processes below `server`, JupyterLab's own left out, in a list that grows."""
    found, over = [0], threading.Event()

    def look():
        while not over.wait(2):
            total = 0
            for process in server.children(recursive=True):
                with suppress(psutil.Error):
                    total += process.memory_full_info().pss
            found.append(total)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


# ---- what a reader does -------------------------------------------------------------------------------------------


def run_all(page):
    """Run the lesson from top to bottom; returns the seconds that takes."""
    page.evaluate("() => jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells'); }")
    began, saved = time.monotonic(), []
    while time.monotonic() - began < 400 and not (saved and all(count for count, _ in saved)):
        page.wait_for_timeout(1000)
        saved = page.evaluate(CELLS)
    seconds = time.monotonic() - began
    counts, outputs = zip(*saved, strict=True)
    assert counts == tuple(range(1, len(counts) + 1))
    assert not [o for cell in outputs for o in cell if o["output_type"] == "error"]
    page.wait_for_timeout(1000)
    return seconds


def move_all(page):
    """Move each control by keyboard and by mouse; of those of one widget, some must give another picture. Returns how
    many were moved."""
    boxes, moved = page.query_selector_all(".jp-Notebook .pardist-live"), 0
    for box, controls in zip(boxes, page.evaluate(LIVE), strict=True):
        if box.query_selector("iframe"):  # a page of its own, the timeline
            continue
        assert controls, "a widget without a control"
        seen = {box.evaluate(SHOWN)}
        handles = [
            h for h, kind in zip(box.query_selector_all(".noUi-handle"), controls, strict=False) if kind == "slider"
        ]
        for handle in handles:
            place = "h => h.getAttribute('aria-valuenow')"
            seen.add(after(page, box, handle, place, lambda h=handle: by_keys(h)))
            seen.add(after(page, box, handle, place, lambda h=handle: by_mouse(page, h)))
        ticks = box.query_selector_all("input[type=checkbox]")
        for tick in ticks:
            by_space = lambda t=tick: (t.focus(), page.keyboard.press("Space"))  # noqa: E731
            seen.add(after(page, box, tick, "t => t.checked", by_space))
            seen.add(after(page, box, tick, "t => t.checked", tick.click))
        moved += len(handles) + len(ticks)
        assert len(seen) > 1, f"the picture stays the same: {box.inner_text()[:300]}"
    return moved


def after(page, box, control, place, act):
    """What a widget shows after one of its controls was moved."""
    before, stood = box.evaluate(SHOWN), control.evaluate(place)
    for _ in range(3):  # the page may have moved below the mouse: a picture above has come
        control.evaluate("c => c.scrollIntoView({block: 'center'})")
        page.wait_for_timeout(200)
        act()
        page.wait_for_timeout(200)
        if control.evaluate(place) != stood:
            break
    assert control.evaluate(place) != stood, f"it cannot be moved: {box.inner_text()[:300]}"
    began, works = time.monotonic(), False
    while time.monotonic() - began < 90:
        if "working" in box.inner_text():
            works = True
        elif works or box.evaluate(SHOWN) != before or time.monotonic() - began > 5:
            break
        page.wait_for_timeout(50)
    now = box.evaluate(SHOWN)
    assert "working" not in box.inner_text() and "data:image" in now, box.inner_text()[-500:]
    return now


def by_keys(handle):
    at_the_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    handle.focus()
    handle.press("ArrowLeft" if at_the_end else "ArrowRight")


def by_mouse(page, handle):
    """Drag it to the end of its track from which it is farther away."""
    left, width = handle.evaluate(
        "h => { const b = h.closest('.noUi-base').getBoundingClientRect(); return [b.x, b.width]; }"
    )
    assert width > 100, f"a track of {width} pixels"
    now, least, most = (float(handle.get_attribute(f"aria-value{end}")) for end in ("now", "min", "max"))
    far_end = left + width - 1 if now < (least + most) / 2 else left + 1
    spot = handle.bounding_box()
    x, y = spot["x"] + spot["width"] / 2, spot["y"] + spot["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(far_end, y, steps=5)
    page.mouse.up()


def answer(page, path):
    """The lesson's first exercise: as it stands, answered with nothing, and answered as the course does."""
    blanks = [
        (at, cell, found[1])
        for at, cell in enumerate(nbformat.read(path, 4).cells)
        if "raise NotImplementedError" in cell.source and (found := re.search(r'check\("(\w+)"', cell.source))
    ]
    at, cell, name = blanks[0]
    said = run_cell(page, at, cell.source.replace("raise NotImplementedError", "return None"))
    assert "✗" in said and name in said, said
    own = inspect.unwrap(reader.reference(name))
    source = "from pardist_lib.lessons.exercises import check\n"
    source += f"import pardist_lib.lessons.lesson{path.name[:2]}.solutions as own\n"
    source += "globals().update({k: v for k, v in vars(own).items() if not k.startswith('__')})\n"
    source += inspect.getsource(own)
    said = run_cell(page, at, f"{source}\ncheck('{name}', {name})")
    assert "✓" in said and "✗" not in said, said


def run_cell(page, at, source, seconds=120):
    page.evaluate(SET, [at, source])
    page.evaluate(RUN, at)
    page.wait_for_timeout(500)
    page.wait_for_function(IDLE, timeout=seconds * 1000)
    page.wait_for_timeout(300)
    return page.evaluate(SAID, at)


def stop_and_restart(page):
    """The stop button while ranks work; then a kernel that knows nothing any more, and says what to run again."""
    last = page.evaluate("() => jupyterapp.shell.currentWidget.content.widgets.length") - 1
    page.evaluate("at => { jupyterapp.shell.currentWidget.content.activeCellIndex = at; }", last)
    page.evaluate("() => jupyterapp.commands.execute('notebook:insert-cell-below')")
    run_cell(page, last + 1, "import time\nfrom pardist_lib import Ranks\nranks = Ranks(2)")
    sleeps = "ranks.run(time.sleep, 300, timeout=400)"
    page.evaluate(SET, [last + 1, sleeps])
    page.evaluate(RUN, last + 1)
    page.wait_for_timeout(3000)
    page.evaluate("() => { jupyterapp.commands.execute('notebook:interrupt-kernel'); }")
    page.wait_for_function(IDLE, timeout=30_000)
    assert "Interrupted" in page.evaluate(SAID, last + 1)
    assert run_cell(page, last + 1, "print(sum(ranks.run(int)))").strip() == "0"
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    page.wait_for_function(IDLE, timeout=60_000)
    run_cell(page, last + 1, "import pardist_lib")
    said = run_cell(page, last + 1, "ranks.run(int)")
    assert "NameError" in said and "which has not run since the kernel started" in said, said


def pictures_of(page, file, theme):
    """The whole lesson from top to bottom, in as many pictures as that takes: file-1.png, file-2.png, …"""
    page.evaluate("name => jupyterapp.commands.execute('apputils:change-theme', {theme: name})", f"JupyterLab {theme}")
    page.set_viewport_size({"width": WIDTH, "height": PAGE})
    page.wait_for_timeout(1000)
    top, number = 0, 0
    while number < 12:
        number += 1
        at, seen, tall = page.evaluate(SCROLL, top)
        page.wait_for_timeout(300)
        page.screenshot(path=f"{file}-{number}.png")
        if at + seen >= tall - 2:
            break
        top += seen - 100
    page.set_viewport_size({"width": WIDTH, "height": LAPTOP})
