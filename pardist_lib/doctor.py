"""python -m pardist_lib.doctor: what this machine has, what the lessons will use of it, what is missing and what to do.

In a notebook: `from pardist_lib import doctor; doctor.look()`. Takes a few seconds, in which two ranks are started.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import time
from html import escape
from pathlib import Path

import psutil

GOOD, NOTE, BAD = "✓", "·", "✗"
COLOURS = {GOOD: "#009E73", NOTE: "#8a8a8a", BAD: "#D55E00"}
PACKAGES = ("torch", "numpy", "ipywidgets", "ipykernel", "jupyterlab")
LEAST = {"torch": (2, 10), "numpy": (2, 0), "ipywidgets": (7, 7)}
NEWER = {  # torch from which → what; the README has it, too
    (2, 11): "the times of two groups' calls at once in a trace",
    (2, 13): "lists in gloo's all_to_all, and pipelines on ranks that are not there",
}
LESSON_BYTES = 1.2e9  # what a lesson's processes hold together, at most


def look(start=True):
    """Examine this machine: a `Report`, which shows itself. start: False leaves out the trial start of two ranks."""
    return Report(facts(start))


def found():
    """One line: what was found, and what will not work with it."""
    versions, cores = _versions(), _cores()
    text = f"torch {versions.get('torch', 'none')}, {cores} core{'s' * (cores > 1)}"
    wrong = [said for mark, said in _packages(versions) if mark != GOOD]
    return f"{text}: {'; '.join(wrong) if wrong else 'all lessons run here'}"


class Report:
    """What `facts` mean for the lessons: `lines`, each a mark and a sentence. `good`: whether nothing stops them."""

    def __init__(self, known):
        self.facts = known
        self.lines = [line for part in PARTS for line in part(known)]

    @property
    def good(self):
        return all(mark != BAD for mark, _ in self.lines)

    def __repr__(self):
        return "\n".join(f"{mark} {said}" for mark, said in self.lines)

    def _repr_html_(self):
        return "".join(
            f'<div style="border-left:5px solid {COLOURS[mark]};padding:2px 0 2px 10px">{mark} {escape(said)}</div>'
            for mark, said in self.lines
        )


# ---- what there is --------------------------------------------------------------------------------------------


def facts(start=True):
    """What this machine is, as a dict of plain values: tests give `Report` others."""
    memory = psutil.virtual_memory()
    limit = _limit("memory.max", "memory/memory.limit_in_bytes")
    known = {
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": _versions(),
        "cores": _cores(),
        "memory": min(memory.available, limit or memory.available),
        "loopback": any(name.startswith("lo") for _, name in socket.if_nameindex()),
        "answers": os.environ.get("PARDIST_ANSWERS") or "pardist_answers",
        "writes": _writes(Path(os.environ.get("PARDIST_ANSWERS") or Path.cwd())),
        "temporary": _writes(Path(tempfile.gettempdir())),
        "disk": shutil.disk_usage(tempfile.gettempdir()).free,
        "proxies": sorted(k for k in os.environ if k.lower() in ("http_proxy", "https_proxy", "all_proxy")),
        "gpus": _gpus(),
    }
    return known | (_started() if start else {})


def _versions():
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions


def _cores():
    """Those this process may use: of the affinity, or of the share that a container has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def _limit(*names):
    """Bytes of memory that the container may still take; None without a limit."""
    for name, used in zip(names, ("memory.current", "memory/memory.usage_in_bytes"), strict=True):
        try:
            limit = int((Path("/sys/fs/cgroup") / name).read_text())
            return None if limit > 1 << 60 else max(0, limit - int((Path("/sys/fs/cgroup") / used).read_text()))
        except (OSError, ValueError):
            continue
    return None


def _writes(folder):
    """Whether files can be made in a folder, or in the nearest one above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _gpus():
    try:
        import torch

        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception:  # none that works
        return []


def _started():
    """{"seconds": of starting two ranks and adding up a number over them} or {"problem": why they did not}."""
    try:
        from pardist_lib import Ranks

        began = time.monotonic()
        with Ranks(2) as ranks:
            if ranks.run(_sum, quiet=True) != [3, 3]:
                return {"problem": "their sum is wrong"}
            return {"seconds": time.monotonic() - began, "backend": ranks.backend}
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def _sum():
    import torch
    import torch.distributed as dist

    from pardist_lib import device

    one = torch.tensor([dist.get_rank() + 1], device=device())
    dist.all_reduce(one)
    return one.item()


# ---- what it means: each part gives (mark, sentence)s ---------------------------------------------------------


def _packages(versions):
    for name, least in LEAST.items():
        wanted = ".".join(map(str, least))
        if name not in versions:
            yield BAD, f"{name} is not installed: pip install '{name}>={wanted}'"
        elif _number(versions[name]) < least:
            yield BAD, f"{name} {versions[name]} is older than {wanted}, which the lessons need: pip install -U {name}"
    for since, what in NEWER.items():
        if LEAST["torch"] <= _number(versions.get("torch", "0")) < since:
            yield NOTE, f"torch {versions['torch']} works; from {'.'.join(map(str, since))} on there are also {what}"


def _number(version):
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _software(known):
    versions = known["versions"]
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield GOOD, f"Python {known['python']}, {said}"
    yield from _packages(versions)
    if known["system"] == "Windows":
        yield BAD, "on Windows ranks do not start: use WSL 2, Colab or Binder"
    if known["system"] == "Darwin":
        yield NOTE, "on macOS each rank imports torch itself: a start takes longer, and more memory"


def _machine(known):
    cores, memory = known["cores"], known["memory"]
    if cores < 2:
        yield NOTE, "one core: ranks take turns on it. All is right, but nothing overlaps, and times say little"
    else:
        yield GOOD, f"{cores} cores: {min(cores, 4)} of four ranks compute at the same time"
    if memory < LESSON_BYTES:
        yield BAD, f"{memory / 1e9:.1f} GB of memory are free, and a lesson takes up to {LESSON_BYTES / 1e9} GB: " \
                   "close other notebooks, or take Ranks(2) for Ranks(4)"  # fmt: skip
    else:
        yield GOOD, f"{memory / 1e9:.1f} GB of memory are free; a lesson takes up to {LESSON_BYTES / 1e9} GB"
    gpus = known["gpus"]
    if not gpus:
        yield GOOD, "no GPU: ranks are processes on the CPU, and gloo carries their messages. No lesson needs one"
    elif len(gpus) < 4:
        count = "one GPU, shared by all ranks" if len(gpus) == 1 else f"{len(gpus)} GPUs, shared by four ranks"
        yield GOOD, f"{count} ({gpus[0]}): gloo carries their messages, as nccl wants a GPU for each rank"
    else:
        yield GOOD, f"{len(gpus)} GPUs ({gpus[0]}): one for each of four ranks, and nccl carries their messages"


def _surroundings(known):
    if not known["loopback"]:
        yield BAD, "there is no loopback interface (lo), which carries gloo's messages: bring it up (ip link set lo up)"
    if not known["writes"]:
        yield NOTE, f"{known['answers']} cannot be written here: answers are checked but not kept; " \
                    "PARDIST_ANSWERS=… names another folder"  # fmt: skip
    if not known["temporary"]:
        yield BAD, "nothing can be written into the temporary folder: TMPDIR=… names another one"
    elif known["disk"] < 50e6:
        yield BAD, f"the temporary folder has {known['disk'] / 1e6:.0f} MB left: ranks leave their results there"
    if known["proxies"]:
        names = ", ".join(known["proxies"])
        yield NOTE, f"a proxy is set ({names}): ranks do not use it, they talk over this machine's own interface"


def _ranks(known):
    if "problem" in known:
        yield BAD, f"two ranks did not start: {known['problem']}"
    elif "seconds" in known:
        slow = known["seconds"] > 15
        said = f"two ranks start and add up in {known['seconds']:.0f} s ({known['backend']})"
        yield (NOTE, f"{said}: slow; is the machine busy, or its disk far away?") if slow else (GOOD, said)


PARTS = (_software, _machine, _surroundings, _ranks)


def main():
    parser = argparse.ArgumentParser(prog="python -m pardist_lib.doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--no-start", action="store_true", help="without the trial start of two ranks")
    report = look(not parser.parse_args().no_start)
    print(report)
    raise SystemExit(0 if report.good else 1)


if __name__ == "__main__":
    main()
