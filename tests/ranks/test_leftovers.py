"""What ranks, programs and starts broken off leave in shared memory and in the temporary folder: nothing."""

import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from multiprocessing import shared_memory, synchronize, util
from pathlib import Path

import psutil
import pytest
from torch.utils.data import DataLoader

from pardist_lib import RankError, RankHang, Ranks, torchrun
from pardist_lib.ranks import RanksInterrupted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /dev/shm")


def left(names, within=15):
    """Those of the files in shared memory that stay for so many seconds: trackers end after their ranks."""
    deadline = time.monotonic() + within
    while (there := [n for n in names if Path("/dev/shm", n).exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return there


def semaphores():
    locks = [o for o in gc.get_objects() if isinstance(o, synchronize.SemLock)]
    return [f"sem.{lock._semlock.name.lstrip('/')}" for lock in locks]


kept = []  # on a rank: what lives on after the call


def spawned_loader():
    loader = DataLoader(range(4), num_workers=1, persistent_workers=True, multiprocessing_context="spawn")
    kept.append([loader, batches := iter(loader)])
    next(batches)
    return semaphores()


def forkserver_pool():
    kept.append(pool := multiprocessing.get_context("forkserver").Pool(1))
    pool.map(abs, [-1])
    return semaphores()


def spawned_queue():
    kept.append(multiprocessing.get_context("spawn").Queue())
    return semaphores()


def block():
    kept.append(memory := shared_memory.SharedMemory(create=True, size=100))
    return [memory.name]


@pytest.mark.parametrize("make", [spawned_loader, forkserver_pool, spawned_queue, block])
def test_shared_memory_of_closed_ranks(make):
    with Ranks(2) as ranks:
        names = sum(ranks.run(make, timeout=200), [])
        assert len(names) >= 2 and len(left(names, 0)) == len(names)
    assert not left(names)


def test_shared_memory_of_a_rank_that_was_killed():
    with Ranks(2) as ranks:
        names = sum(ranks.run(block, timeout=60), [])
        with pytest.raises(RankError, match="SIGKILL"):
            ranks.run(lambda: os.kill(os.getpid(), signal.SIGKILL), quiet=True)
        assert not left(names)
        assert "resource_tracker" not in "".join(ranks.output)


def test_shared_memory_of_a_program_that_was_stopped(tmp_path, monkeypatch):
    text = (
        "import time\nfrom multiprocessing import shared_memory\nm = shared_memory.SharedMemory(create=True, size=9)\n"
    )
    (tmp_path / "program.py").write_text(f"{text}open('name', 'w').write(m.name)\ntime.sleep(600)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RankHang):
        torchrun("program.py", nproc=1, quiet=True, timeout=25)
    assert not left([(tmp_path / "name").read_text()])


def test_multiprocessings_own_folder_goes_with_the_ranks():
    def manager():
        kept.append(manager := multiprocessing.get_context("spawn").Manager())
        return manager.dict(a=1)["a"], util.get_temp_dir()

    with Ranks(2) as ranks:
        told = ranks.run(manager, timeout=200)
        assert told == [(1, ranks._link.folder)] * 2
    assert not os.path.exists(told[0][1])


@pytest.fixture
def temporary(tmp_path_factory, monkeypatch):
    """A temporary folder of our own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a short path: a long one would be left for /tmp
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder
    signal.signal(signal.SIGINT, before)


def processes_of(folder):
    running = psutil.process_iter(["cmdline", "status"])
    return [p for p in running if folder in " ".join(p.info["cmdline"] or ()) and p.info["status"] != "zombie"]


@pytest.mark.parametrize("after", [0.02, 0.3, 1.5])
@pytest.mark.parametrize("fork", [True, False])
def test_a_start_that_is_interrupted(temporary, after, fork):
    """torchrun goes, too: alone, it would make its folder anew when it comes to its log."""
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(RanksInterrupted), Ranks(2, fork=fork):
        time.sleep(60)  # on a very fast machine
    assert not processes_of(temporary) and not os.listdir(temporary)


def test_a_host_that_does_not_answer(temporary):
    """As on a machine so busy that it takes minutes to import torch."""
    ranks = Ranks(2)
    os.kill(ranks._link.host.pid, signal.SIGSTOP)
    ranks.close()
    assert not processes_of(temporary) and not os.listdir(temporary)
