"""The doctor says true things of machines that are not this one."""

import os
import subprocess
import sys

import pytest

from pardist_lib import doctor

HEALTHY = {
    "python": "3.11.7",
    "system": "Linux",
    "versions": {"torch": "2.13.0+cpu", "numpy": "2.4.6", "ipywidgets": "8.1.9"},
    "cores": 4,
    "memory": 8e9,
    "loopback": True,
    "answers": "pardist_answers",
    "writes": True,
    "temporary": True,
    "disk": 1e10,
    "proxies": [],
    "gpus": [],
    "seconds": 4.0,
    "backend": "gloo",
}


def versions(**others):
    return {"versions": HEALTHY["versions"] | others}


def said(**changes):
    return doctor.Report(HEALTHY | changes)


def test_a_healthy_machine():
    report = said()
    assert report.good and {mark for mark, _ in report.lines} == {doctor.GOOD}
    assert "two ranks start and add up in 4 s (gloo)" in repr(report) and "No lesson needs one" in repr(report)
    assert report._repr_html_().count("<div") == len(report.lines)


@pytest.mark.parametrize(
    "changes, good, sentence",
    [
        ({"cores": 1}, True, "one core: ranks take turns on it"),
        ({"memory": 1e9}, False, "1.0 GB of memory are free, and a lesson takes up to 1.2 GB: close other notebooks"),
        (versions(torch="2.8.0"), False, "torch 2.8.0 is older than 2.10"),
        (versions(torch="2.11.0+cu128", ipywidgets="7.7.1"), True, "torch 2.11.0+cu128 works"),
        ({"versions": {"numpy": "2.1", "ipywidgets": "8.0"}}, False, "torch is not installed: pip install"),
        (versions(numpy="1.26.4"), False, "numpy 1.26.4 is older than 2.0"),
        ({"loopback": False}, False, "there is no loopback interface (lo)"),
        ({"writes": False}, True, "pardist_answers cannot be written here: answers are checked but not kept"),
        ({"temporary": False}, False, "TMPDIR=… names another one"),
        ({"disk": 1e6}, False, "the temporary folder has 1 MB left"),
        ({"proxies": ["https_proxy"]}, True, "a proxy is set (https_proxy): ranks do not use it"),
        ({"gpus": ["T4"]}, True, "one GPU, shared by all ranks (T4): gloo carries their messages"),
        ({"gpus": ["A100"] * 2}, True, "2 GPUs, shared by four ranks (A100): gloo"),
        ({"gpus": ["H200"] * 8}, True, "8 GPUs (H200): one for each of four ranks, and nccl"),
        ({"system": "Windows"}, False, "use WSL 2"),
        ({"system": "Darwin"}, True, "each rank imports torch itself"),
        ({"seconds": 40.0}, True, "in 40 s (gloo): slow"),
        ({"problem": "OSError: no sockets"}, False, "two ranks did not start: OSError: no sockets"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(changes, good, sentence):
    report = said(**changes)
    assert sentence in repr(report) and report.good == good


def test_this_machine(tmp_path):
    code = "from pardist_lib import doctor; r = doctor.look(); print(r); print(doctor.found()); print(r.facts['cores'])"
    env = os.environ | {"https_proxy": "http://nobody", "PARDIST_ANSWERS": "/proc/nothing"}
    pinned = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); {code}"]
    done = subprocess.run(pinned, env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert "two ranks start and add up in" in done.stdout, done
    assert "one core" in done.stdout and "https_proxy" in done.stdout
    assert "/proc/nothing cannot be written" in done.stdout
    assert done.stdout.splitlines()[-1] == "1" and ", 1 core:" in done.stdout.splitlines()[-2]


def test_without_a_loopback_interface_and_without_memory(monkeypatch):
    monkeypatch.setattr(doctor.socket, "if_nameindex", lambda: [(1, "eth0")])
    monkeypatch.setattr(doctor, "_limit", lambda *names: 5e8)
    report = doctor.look(start=False)
    assert not report.good and "no loopback interface" in repr(report) and "0.5 GB of memory are free" in repr(report)
    assert "two ranks" not in repr(report)


def test_the_command_says_what_it_does():
    done = subprocess.run([sys.executable, "-m", "pardist_lib.doctor", "--help"], capture_output=True, text=True)
    assert "what this machine has" in done.stdout and "--no-start" in done.stdout
