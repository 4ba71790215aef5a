"""Lesson 00 as a reader meets it: JupyterLab in headless Chromium, run from top to bottom, pictures on the page."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "00_start_here.ipynb"
CODE_CELLS = """() => {
    const cells = jupyterapp.shell.currentWidget.content.model.cells;
    if (jupyterapp.shell.currentWidget.sessionContext.session.kernel.status !== "idle") return [];
    return Array.from({length: cells.length}, (_, i) => cells.get(i)).filter(c => c.type === "code")
        .map(c => [c.executionCount, c.outputs.toJSON()]);
}"""


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a copy of the lesson; gives its address."""
    shutil.copy(NOTEBOOK, tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "PARDIST_LIVE": "1", "HOME": str(tmp_path)}
    env |= {"PARDIST_ANSWERS": str(tmp_path / "answers")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += [
        "--LabApp.expose_app_in_browser=True",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={tmp_path}",
        "--LabApp.news_url=",
    ]
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2)
            break
        except OSError:
            time.sleep(0.3)
    yield f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK.name}"
    server.terminate()
    server.wait(20)


@pytest.mark.timeout(400)
@pytest.mark.skipif(not CHROMIUM and not os.environ.get("CI"), reason="no Chromium on this machine")
def test_lesson_00_runs_in_jupyterlab(lab, tmp_path):
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "CI installs Chromium for this test"
    with sync_playwright() as p:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
        page = p.chromium.launch(executable_path=CHROMIUM, args=flags).new_page(
            viewport={"width": 1200, "height": 3000}
        )
        page.goto(lab)
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.isReady", timeout=60_000)
        page.evaluate("() => jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells'); }")
        began, saved = time.monotonic(), []
        while time.monotonic() - began < 240 and not (saved and all(count for count, _ in saved)):
            page.wait_for_timeout(1000)
            saved = page.evaluate(CODE_CELLS)
        counts, outputs = zip(*saved, strict=True)
        assert counts == tuple(range(1, len(counts) + 1))
        kinds = [set(o.get("data", {})) for cell in outputs for o in cell]
        assert not [o for cell in outputs for o in cell if o["output_type"] == "error"]
        assert sum("image/png" in kind for kind in kinds) >= 4
        assert any("application/vnd.jupyter.widget-view+json" in kind for kind in kinds)
        page.screenshot(path=str(tmp_path / "lesson.png"))
