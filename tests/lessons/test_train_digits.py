"""The program to take home (lesson 06): it learns on any number of ranks, and sends one all-reduce a step."""

import math
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pardist_lib.lessons.lesson06 import train_digits
from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.ranks import RankHang, torchrun


def program(wrap, epochs=2):
    torch.manual_seed(dist.get_rank())
    with patch.object(dist, "init_process_group"), patch.object(dist, "destroy_process_group"):
        return train_digits.main(epochs, wrap=wrap)


@pytest.mark.parametrize("n", [3, 4])
def test_one_all_reduce_a_step(ranks_of, n):
    steps = 2 * math.ceil(1440 // n / 32)
    found = []
    for wrap in (DistributedDataParallel, DataParallel):
        trace = ranks_of(n).trace(program, wrap)
        for rank in range(n):
            calls = [e for e in trace.collectives if e.rank == rank and e.name == "all_reduce" and e.bytes > 1000]
            assert len(calls) == steps  # all gradients fit in one bucket
        small = [e for e in trace.collectives if e.rank == 0 and e.name == "all_reduce" and e.bytes <= 1000]
        assert len(small) < 3  # DDP's, when it deals out its buckets anew; none in every step
        found.append(trace.results)
    assert found[0] == found[1] and len(set(found[0])) == 1


def test_it_is_a_program_of_its_own():
    source = open(train_digits.__file__).read()
    assert "import pardist_lib" not in source and "from pardist_lib" not in source
    assert "2 ranks, 12 epochs: more than 85 %" in "".join(torchrun(train_digits.__file__, nproc=2))


# A gloo thread that comes to nothing while Python computes: what it has carried, it lets go of last of all
SLOW_THREADS = """
import os, sys
from pathlib import Path
import train_digits

class Wrapped(train_digits.DistributedDataParallel):
    def forward(self, x):
        if len(x) < 32:  # the epoch's last batch: on a busy machine each one would take seconds
            self.make_threads_slow()
        return super().forward(x)

    def make_threads_slow(self):
        sys.setswitchinterval(1000)
        core = {min(os.sched_getaffinity(0))}
        os.sched_setaffinity(0, core)
        for task in Path("/proc/self/task").iterdir():
            if "pt_gloo" in (task / "comm").read_text():
                os.sched_setaffinity(int(task.name), core)
                os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))

train_digits.main(epochs=1, wrap=Wrapped)
"""


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a thread's priority is Linux's")


def slowly(folder, without=""):
    """Run it where gloo's thread is slow. without: leave out the line that begins so."""
    lines = Path(train_digits.__file__).read_text().splitlines(keepends=True)
    kept = [line for line in lines if not (without and line.startswith(without))]
    assert len(kept) == len(lines) - bool(without)
    (folder / "train_digits.py").write_text("".join(kept))
    (folder / "slow.py").write_text(SLOW_THREADS)
    return "".join(torchrun(folder / "slow.py", nproc=2, quiet=True, timeout=25 if without else 60))


@ON_LINUX
def test_it_ends_also_where_gloos_thread_is_slow(tmp_path):
    """The model goes before its group does."""
    assert "2 ranks, 1 epochs" in slowly(tmp_path)


@ON_LINUX
@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="the trap is torch 2.13's: not in 2.11, nor in 2.14"
)
def test_where_the_model_goes_last_it_waits_for_ever_and_is_told_why(tmp_path):
    with pytest.raises(RankHang, match="DistributedDataParallel that is freed after"):
        slowly(tmp_path, without="    del model")
