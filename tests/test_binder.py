"""Binder gives 2 GB: every lesson runs within them, ranks, kernel and what stands for JupyterLab together."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIMIT = 2 * 2**30
PLACES = {  # where a control group is made; files: what limits it, the most that it has used
    Path("/sys/fs/cgroup/memory"): ("memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    Path("/sys/fs/cgroup"): ("memory.max", "memory.peak"),
}


def place():
    """The first of `PLACES` in which a group that limits memory can be made; None where there is none."""
    for folder, (limit, _) in PLACES.items():
        probe = folder / f"pardist-probe-{os.getpid()}"
        try:
            probe.mkdir()
        except OSError:
            continue
        usable = (probe / limit).exists()
        probe.rmdir()
        if usable:
            return folder
    return None


@contextmanager
def limited(name):
    """A control group of at most `LIMIT` bytes: its folder. Who writes a process into it limits all below that."""
    group = place() / name
    group.mkdir()
    try:
        (group / PLACES[group.parent][0]).write_text(str(LIMIT))
        yield group
    finally:
        group.rmdir()


@pytest.mark.share(1)
@pytest.mark.timeout(600)
@pytest.mark.skipif(place() is None, reason="no control group can be made here (that takes root)")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name[:2])
def test_a_lesson_in_two_gigabytes(path):
    with limited(f"pardist-{os.getpid()}") as group:
        command = [sys.executable, "-m", "pytest", "--nbval-lax", f"notebooks/{path.name}", "-o", "addopts="]
        join = f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
        start = f"import os, sys; {join}; os.execv(sys.executable, sys.argv[1:])"
        run = subprocess.run([sys.executable, "-c", start, *command], cwd=ROOT, capture_output=True, text=True)
        most = int((group / PLACES[group.parent][1]).read_text())
    print(f"lesson {path.name[:2]}: {most / 1e6:,.0f} MB at most, with what the system keeps of files")
    assert run.returncode == 0, run.stdout[-2000:]
    assert most <= LIMIT


def test_the_environment_has_what_the_library_needs():
    """Of the same versions as the tested one, as far as Binder's file names any."""
    given = (ROOT / "binder" / "environment.yml").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.M))
    needed = re.findall(r'^  "([\w-]+)', (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2], re.M)
    for name in needed[: needed.index("tqdm") + 1]:
        known = {"torch": "pytorch", "ipython": "ipykernel"}.get(name, name)  # conda's name; what brings it along
        found = re.search(rf"^ +- {known}(?:=+([\d.]+))?", given, re.M)
        assert found, f"binder/environment.yml lacks {known}"
        if version := (found[1] or "").rstrip("."):
            assert pinned[name].startswith(version), (name, pinned[name], version)
