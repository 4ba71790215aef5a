"""A whole program in which a rank ends before the others."""

import re

import pytest

from pardist_lib import RankError, RankHang, torchrun
from pardist_lib.ranks.program import _failure, _Process
from tests.ranks.test_ranks import FORKS

ENDS = """
import os, sys, time, traceback, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank, how = dist.get_rank(), sys.argv[1]
if rank == 1:
    if how == "handles":
        try:
            raise ValueError("no matter")
        except ValueError:
            traceback.print_exc()
    if how == "exits":
        os._exit(0)
    if how == "destroys":
        dist.destroy_process_group()
    sys.exit(0)
if how == "sleeps":
    time.sleep(600)
dist.barrier()  # nobody comes
"""


@pytest.mark.parametrize(
    "how, nproc, fork",
    [
        *(pytest.param(how, 2, True, marks=FORKS) for how in ("ends", "destroys", "exits", "handles")),
        pytest.param("ends", 3, True, marks=FORKS),
        ("ends", 2, False),
    ],
)
def test_a_rank_that_ends_while_others_wait_for_it(tmp_path, how, nproc, fork):
    (tmp_path / "ends.py").write_text(ENDS)
    with pytest.raises(RankError) as caught:
        torchrun(tmp_path / "ends.py", how, nproc=nproc, quiet=True, fork=fork, timeout=200)
    error, waited = caught.value, "rank 0" if nproc == 2 else "ranks 0, 2"
    assert re.match(rf"rank 1 (ended|left the group) while {waited} still waited for it\n", str(error)), error
    assert error.rank == 1 and error.line == 1 + ENDS.splitlines().index("dist.barrier()  # nobody comes")
    assert "was stopped" not in str(error) and "no matter" not in str(error)


def test_a_rank_that_has_ended_is_not_busy(tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    with pytest.raises(RankHang) as caught:
        torchrun(tmp_path / "ends.py", "sleeps", nproc=2, quiet=True, timeout=25)
    assert caught.value.message.startswith("no sign of life from rank 0 for") and "rank 1 had finished" in str(
        caught.value
    )


LOST = b"""Traceback (most recent call last):
  File "a.py", line 3, in f
RuntimeError: [pair.cc, line 1] Connection reset by peer
"""


def test_who_left_is_named_as_far_as_it_is_known(tmp_path):
    """torchrun tells only who has failed: rank 0, that lost its connection."""
    said = "  time : 2026-01-01_00:00:01\n  host : h\n  rank : 0 (local_rank: 0)\n  exitcode : 1 (pid: 1)\n"

    def told(n, noted):
        ranks = [_Process(r, tmp_path) for r in range(n)]
        ranks[0].printed.data[:] = LOST
        return str(_failure(ranks, said, 1, noted))

    assert told(2, {}).startswith("rank 1 left the group while rank 0 still waited for it")
    assert told(3, {}).startswith("one of ranks 1, 2 left the group while rank 0 still waited for it")
    assert told(3, {2: 0}).startswith("rank 2 ended while rank 0 still waited for it")
    assert "rank 1 was stopped" in told(3, {2: 0}) and "ranks 1, 2 ended while" in told(3, {1: 0, 2: 0})
    assert told(3, {2: -11}).startswith("rank 2 was ended by SIGSEGV")


def test_a_connection_of_the_readers_own_is_not_that_of_a_rank(tmp_path):
    said = "  time : 2026-01-01_00:00:01\n  host : h\n  rank : 0 (local_rank: 0)\n  exitcode : 1 (pid: 1)\n"
    ranks = [_Process(r, tmp_path) for r in range(2)]
    ranks[0].printed.data[:] = LOST.replace(
        b"[pair.cc, line 1] Connection reset by peer", b"<urlopen error: Connection refused>"
    )
    assert str(_failure(ranks, said, 1, {1: 0})).startswith("rank 0 raised RuntimeError: <urlopen error")
