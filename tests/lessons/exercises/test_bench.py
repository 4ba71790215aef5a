"""Answers that raise, hang, end their rank or print without end: each is told what happened; the next check works."""

import os
import signal
import threading
import time

import pytest
import torch.distributed as dist

from pardist_lib.lessons.exercises import bench, check, progress

pytestmark = pytest.mark.usefixtures("ranks", "answers_folder")


def rows(n, rank, world_size):  # a right answer to shard_rows
    return range(n * rank // world_size, n * (rank + 1) // world_size)


def test_half_a_blank_is_an_answer_that_fails():
    def shard_rows(n, rank, world_size):
        start = n * rank // world_size
        if start >= 0:
            raise NotImplementedError

    verdict = check("shard_rows", shard_rows)
    assert verdict.status == "failed" and "`raise NotImplementedError` is still reached" in verdict.diagnosis


def test_an_answer_that_raises():
    def raises(tensor):
        if dist.get_rank() == 2:
            raise ValueError("bad piece")
        dist.recv(tensor, 2)

    verdict = check("my_ring_all_reduce", raises)
    assert verdict.diagnosis == "rank 2 raised ValueError: bad piece"
    assert 'raise ValueError("bad piece")' in verdict.where and "on 4 ranks" in verdict.where
    assert "replaced" in verdict.note


def test_an_answer_that_never_returns():
    def forever(n, rank, world_size):
        while True:
            pass

    began = time.monotonic()
    verdict = check("shard_rows", forever)
    assert verdict.status == "failed" and verdict.diagnosis.startswith("it does not come back")
    assert time.monotonic() - began < 10
    assert check("shard_rows", rows).passed


class SlowToArrive:
    """An answer that takes its time to be unpickled, as a module takes its time to be imported."""

    def __call__(self, n, rank, world_size):
        return rows(n, rank, world_size)

    def __reduce__(self):
        return _after_a_while, ()


def _after_a_while():
    time.sleep(2)  # longer than the patience of these tests
    return SlowToArrive()


def test_an_answer_that_goes_on_and_on(monkeypatch):
    def calls_for_ever(tensor):
        while True:
            dist.all_reduce(tensor.clone())
            time.sleep(0.01)

    monkeypatch.setattr(bench, "LONGEST", 3.0)
    verdict = check("my_ring_all_reduce", calls_for_ever)
    assert verdict.status == "failed"
    assert verdict.diagnosis.startswith("it goes on and on: rank")
    assert "test_bench.py, line" in str(verdict) and "replaced" in verdict.note


def test_an_answer_that_makes_calls_without_end_is_told_within_seconds():
    def calls_for_ever(tensor):
        works = []
        while True:
            works.append(dist.all_reduce(tensor, async_op=True))

    verdict = check("my_ring_all_reduce", calls_for_ever)
    assert "call after call, 2,000 by now: does one of its loops never end?" in verdict.diagnosis
    assert "works.append(dist.all_reduce" in verdict.where and "replaced" in verdict.note
    assert check("shard_rows", rows).passed


def test_slow_imports_are_no_hang():
    assert bench.Bench(SlowToArrive())._prepare("pardist_lib.lessons.lesson00.shard_rows") is None


@pytest.mark.parametrize("end, said", [(lambda: os._exit(3), "exit code 3"),
                                       (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL")])  # fmt: skip
def test_an_answer_that_ends_its_rank(end, said):
    def ends(tensor):
        if dist.get_rank() == 1:
            end()
        dist.recv(tensor, 1)

    verdict = check("exchange", ends)
    assert verdict.status == "failed" and "rank 1" in verdict.diagnosis and said in verdict.diagnosis
    assert check("shard_rows", rows).passed


def test_an_answer_that_exits_politely():
    def leaves(tensor):
        raise SystemExit

    assert "SystemExit" in check("exchange", leaves).diagnosis


def test_ten_megabytes_of_prints():
    def chatter(n, rank, world_size):
        if n == 8 and rank == 0:
            print("x" * 99 * 100_000, *range(1000), sep="\n")
        return rows(n, rank, world_size)

    def wrong_chatter(n, rank, world_size):
        chatter(n, rank, world_size)
        return 7

    assert check("shard_rows", chatter).passed
    verdict = check("shard_rows", wrong_chatter)
    assert "(int): a range is asked for" in verdict.diagnosis and 0 < len(verdict.printed) < 5000


def test_an_answer_that_cannot_be_sent_to_the_ranks():
    lock = threading.Lock()

    def locks(n, rank, world_size):
        with lock:
            return rows(n, rank, world_size)

    verdict = check("shard_rows", locks)
    assert verdict.status == "failed" and "`lock`, which `locks` uses, cannot be sent" in verdict.diagnosis


def test_no_ranks_is_blocked_and_never_passed(monkeypatch, answers_folder):
    def none(n):
        raise RuntimeError("the ranks could not be started: no memory")

    monkeypatch.setattr(bench, "newest", lambda at_least: None)
    monkeypatch.setattr(bench, "Ranks", none)
    verdict = check("shard_rows", rows)
    assert verdict.status == "blocked" and "four ranks are needed" in verdict.diagnosis and not verdict.passed
    assert "range" in (answers_folder / "shard_rows.py").read_text()
    assert {row["exercise"]: row["status"] for row in progress("00").rows}["shard_rows"] == "saved, not checked"


def test_busy_ranks_are_blocked(ranks):
    busy = threading.Thread(target=lambda: ranks.run(time.sleep, 1.5, timeout=5))
    busy.start()
    time.sleep(0.3)
    verdict = check("shard_rows", rows)
    busy.join()
    assert verdict.status == "blocked" and "busy" in verdict.diagnosis
