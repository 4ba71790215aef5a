"""The fault table: whatever goes wrong on the ranks ends soon, in one message with the root cause first, and the
next call works."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from pardist_lib import RankError, RankHang, Ranks
from pardist_lib.ranks import CollectiveMismatch, RanksInterrupted

TIMEOUT = 4.0  # seconds of stall until it is reported
GRACE = 3.0  # a message comes at most this much later


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4, timeout=TIMEOUT) as ranks:
        ranks.run(rank_sum, timeout=60)  # they import this module
        yield ranks


def rank_sum():
    x = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(x)
    return x.item()


def fails(ranks, fn, *args, error=RankError, within=GRACE, **kwargs):
    """The error that running `fn` gives, after checking when it came and that the next call works."""
    began = time.monotonic()
    with pytest.raises(error) as caught:
        ranks.run(fn, *args, **kwargs)
    took = time.monotonic() - began
    assert took < within, f"the message took {took:.1f} s"
    assert ranks.run(rank_sum, timeout=60) == [6.0] * 4  # fresh ones import this module again
    return caught.value


def raises_alone():
    if dist.get_rank() == 2:
        raise ValueError("bad shard")  # the line that must be named
    rank_sum()


def raises_everywhere():
    raise KeyError("weight")


def shapes_differ():
    dist.all_reduce(torch.ones(4 if dist.get_rank() else 5))


def dtypes_differ():
    dist.all_reduce(torch.ones(4, dtype=torch.float64 if dist.get_rank() == 3 else torch.float32))


def collectives_differ():
    x = torch.ones(4)
    dist.broadcast(x, 0) if dist.get_rank() == 1 else dist.all_reduce(x)


def roots_differ():
    dist.broadcast(torch.ones(4), dist.get_rank() % 2)


def operations_differ():
    dist.all_reduce(torch.ones(4), dist.ReduceOp.MAX if dist.get_rank() == 1 else dist.ReduceOp.SUM)


def message_sizes_differ():
    if dist.get_rank() == 0:
        dist.send(torch.ones(4), 1)
    elif dist.get_rank() == 1:
        dist.recv(torch.ones(5), 0)


def receives_from_itself():
    dist.recv(torch.ones(1), dist.get_rank())


def skips_a_call():
    if dist.get_rank() != 1:
        dist.all_reduce(torch.ones(4))


def leaves_a_call_open():
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(4), async_op=True)


def sleeps():
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.all_reduce(torch.ones(4))


def never_returns():
    while True:
        pass


def everybody_receives():
    dist.recv(torch.ones(1), (dist.get_rank() + 1) % 4)


def exits():
    if dist.get_rank() == 1:
        os._exit(3)
    dist.all_reduce(torch.ones(4))


def sys_exits():
    if dist.get_rank() == 1:
        raise SystemExit(2)
    dist.all_reduce(torch.ones(4))


def is_killed():
    if dist.get_rank() == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(4))


def aborts():
    if dist.get_rank() == 0:
        os.abort()  # what C++ does in a `terminate`
    dist.all_reduce(torch.ones(4))


def line_of(fn, text):
    import inspect

    lines, start = inspect.getsourcelines(fn)
    return next(start + i for i, line in enumerate(lines) if text in line)


def test_one_rank_raises(ranks):
    error = fails(ranks, raises_alone)
    assert (error.rank, error.cause, error.message) == (2, "ValueError", "bad shard")
    assert error.line == line_of(raises_alone, "bad shard") and error.cell == "test_faults.py"
    assert str(error).startswith("rank 2 raised ValueError: bad shard")
    assert "ranks 0, 1, 3 were in all_reduce(float32 [1], SUM)" in str(error)


def test_all_ranks_raise_and_keep_their_names(ranks):
    ranks.push(kept=7)
    error = fails(ranks, raises_everywhere)
    assert str(error).startswith("ranks 0–3 raised KeyError") and "still there" in str(error)
    assert ranks.pull("kept") == [7] * 4


@pytest.mark.parametrize(
    "fn, both",
    [
        (shapes_differ, ["all_reduce(float32 [4], SUM)", "all_reduce(float32 [5], SUM)"]),
        (dtypes_differ, ["all_reduce(float64 [4], SUM)", "all_reduce(float32 [4], SUM)"]),
        (collectives_differ, ["broadcast(float32 [4], root 0)", "all_reduce(float32 [4], SUM)"]),
        (roots_differ, ["broadcast(float32 [4], root 0)", "broadcast(float32 [4], root 1)"]),
        (operations_differ, ["all_reduce(float32 [4], MAX)", "all_reduce(float32 [4], SUM)"]),
        (message_sizes_differ, ["send(float32 [4], to rank 1)", "recv(float32 [5], from rank 0)"]),
    ],
)
def test_calls_that_differ_are_named_on_both_sides(ranks, fn, both):
    error = fails(ranks, fn)
    assert error.cause == CollectiveMismatch.__name__
    assert all(call in error.message for call in both)
    assert f"test_faults.py, line {error.line}" in error.message and "ipykernel" not in str(error)


def test_a_mismatch_says_what_is_wrong_then_who_makes_which_call(ranks):
    first, second, third = str(fails(ranks, shapes_differ)).splitlines()[:3]
    assert first.endswith(
        "CollectiveMismatch: all ranks of a group must call with the same shape, dtype, operation and root"
    )
    assert re.fullmatch(r" +rank \d makes all_reduce\(float32 \[.\], SUM\) at test_faults.py, line \d+,", second)
    assert re.fullmatch(r" +but rank \d makes all_reduce\(float32 \[.\], SUM\) at test_faults.py, line \d+", third)


def test_a_message_to_oneself(ranks):
    assert "ranks 0–3 raised ValueError" not in str(fails(ranks, receives_from_itself))
    assert "receives from itself" in ranks.last_error.message
    error = fails(ranks, lambda: dist.recv(torch.ones(1), 7))
    assert "there is no rank 7 to receive from: the group has ranks 0 to 3" in error.message


def test_names_that_went_with_replaced_ranks(ranks):
    ranks.push(kept=1)
    ranks.run_cell("import os\nfor made in range(3):\n    def helper(): pass")
    fails(ranks, is_killed)
    for name in ("kept", "made", "helper", "os"):
        with pytest.raises(RankError, match=f"the ranks were replaced since `{name}` was set: run the cell"):
            ranks.run_cell(name)
    ranks.run_cell("made = 1")
    ranks.run_cell("del made")
    with pytest.raises(RankError) as caught:
        ranks.run_cell("made")
    assert "replaced since" not in str(caught.value)


def test_an_error_in_none_of_the_readers_lines_shows_none(ranks):
    error = fails(ranks, threading.Lock)
    assert "rank.py" not in str(error) and (error.cell, error.line) == (None, None)


def test_a_skipped_call_is_seen_without_waiting_for_the_timeout(ranks):
    error = fails(ranks, skips_a_call, error=RankHang)
    assert (error.rank, error.cause) == (1, "skipped call")
    assert "ranks 0, 2, 3 wait for rank 1, which returned without making that call" in str(error)
    assert error.line == line_of(skips_a_call, "all_reduce")


def test_a_call_for_some_ranks_that_needs_all(ranks):
    error = fails(ranks, rank_sum, on=[0, 2], error=RankHang)
    assert "ranks 0, 2 wait for ranks 1, 3, which take no part in this call" in str(error)


def test_a_call_left_open(ranks):
    error = fails(ranks, leaves_a_call_open)
    assert error.cause == "unmatched call" and "rank 0 made a call that ranks 1–3 did not make" in str(error)


def test_a_rank_sleeps(ranks):
    error = fails(ranks, sleeps, error=RankHang, within=TIMEOUT + GRACE)
    assert (error.rank, error.line) == (1, line_of(sleeps, "time.sleep"))
    assert "ranks 0, 2, 3 wait for rank 1" in str(error) and "time.sleep(60)" in str(error)


def test_nobody_returns(ranks):
    error = fails(ranks, never_returns, error=RankHang, within=TIMEOUT + GRACE)
    assert str(error).startswith("no sign of life from ranks 0–3")


def test_deadlock(ranks):
    error = fails(ranks, everybody_receives, error=RankHang, within=TIMEOUT + GRACE)
    assert error.cause == "deadlock" and "recv(float32 [1], from rank 1)" in str(error)


def test_it_is_in_the_receive_on_its_line_and_not_in_a_send_that_it_has_started(ranks):
    def waits_for_the_wrong_neighbour():
        rank, n = dist.get_rank(), dist.get_world_size()
        message = dist.isend(torch.zeros(2), (rank + 1) % n)
        dist.recv(torch.zeros(2), (rank + 1) % n)  # what it has sent is at the other one
        message.wait()

    with pytest.raises(RankHang) as hang:
        ranks.run(waits_for_the_wrong_neighbour)
    assert all("in recv(" in doing for doing in hang.value.where), hang.value.where


@pytest.mark.parametrize(
    "fn, rank, cause", [(exits, 1, "exit code 3"), (is_killed, 3, "SIGKILL"), (aborts, 0, "SIGABRT")]
)
def test_a_rank_dies(ranks, fn, rank, cause):
    error = fails(ranks, fn)
    assert error.rank == rank and cause in str(error).splitlines()[0]
    if fn is aborts:
        assert error.line == line_of(aborts, "os.abort")


def test_a_rank_that_died_between_two_calls(ranks):
    os.kill(ranks.run(os.getpid)[1], signal.SIGKILL)
    time.sleep(0.2)
    error = fails(ranks, rank_sum)
    assert error.rank == 1 and "SIGKILL" in str(error)


def test_sys_exit_is_an_error_like_others(ranks):
    error = fails(ranks, sys_exits)
    assert (error.rank, error.cause) == (1, "SystemExit")


def test_a_result_that_cannot_be_sent(ranks):
    error = fails(ranks, threading.Lock)
    assert "cannot pickle" in str(error) and "plain values" in str(error)


def test_a_function_that_cannot_be_sent(ranks):
    lock = threading.Lock()
    with pytest.raises(TypeError, match="`lock`, which `uses_it` uses, cannot be sent"):

        def uses_it():
            return lock

        ranks.run(uses_it)
    with pytest.raises(TypeError, match="stays in the notebook"):
        ranks.run(print, ranks)


def test_ten_megabytes_of_prints(ranks):
    def chatter():
        for i in range(100_000):
            print(f"{i:098d}")
        print("the end")

    began = time.monotonic()
    ranks.run(chatter, quiet=True)
    assert time.monotonic() - began < 15
    for text in ranks.output:
        assert len(text) == 100_000 * 99 + 8 and text.endswith("the end\n")


def test_a_call_that_goes_on_and_on_has_a_limit(ranks):
    def endless():
        while True:  # with signs of life
            rank_sum()

    error = fails(ranks, endless, error=RankHang, within=2 + GRACE, quiet=True, at_most=2)
    assert error.message.startswith("ranks 0–3 went on and on, and had not come to an end after 2 s")
    assert error.cause == "endless" and "rank_sum()" in error.details


@pytest.fixture(autouse=True)
def interruptible():
    """Python's own answer to SIGINT, also where the tests run in the background of a shell that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_stop_button(ranks):
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    error = fails(ranks, sleeps, error=RanksInterrupted, within=1 + GRACE)
    assert "time.sleep(60)" in str(error) and isinstance(error, KeyboardInterrupt)


def test_the_stop_button_twice(ranks, monkeypatch):
    """The second press comes while the first is answered: before any rank is replaced, or in the middle of that."""
    link = ranks._link
    for place in ("ask_where", "_order"):

        def pressed_again(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(link, place, pressed_again)
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            ranks.run(sleeps, timeout=20)
        began = time.monotonic()
        assert ranks.run(rank_sum) == [6.0] * 4 and time.monotonic() - began < GRACE


def test_the_stop_button_while_fresh_ranks_join(ranks, monkeypatch):
    with pytest.raises(RankError):
        ranks.run(is_killed)
    door, accept = ranks._link.door, ranks._link.door.accept

    def accept_and_press():
        accept()
        raise KeyboardInterrupt  # the connection just made is lost

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(door, "accept", accept_and_press)
        ranks.run(rank_sum)
    assert ranks.run(rank_sum) == [6.0] * 4


def test_a_rank_is_stopped_by_a_signal(ranks):
    error = fails(ranks, lambda: os.kill(os.getpid(), signal.SIGSTOP), error=RankHang, within=TIMEOUT + GRACE)
    assert "ranks 0–3 were stopped by a signal (SIGSTOP)" in str(error)
    os.kill(ranks.run(os.getpid)[1], signal.SIGSTOP)  # and one that does not read what it is sent, however much that is
    error = fails(ranks, len, "x" * 10_000_000, error=RankHang, within=TIMEOUT + GRACE)
    assert error.rank == 1 and "rank 1 was stopped by a signal" in str(error)


def test_a_function_that_forks(ranks):
    def forks():
        return "parent" if os.fork() else "child"

    assert ranks.run(forks) == ["parent"] * 4
    assert ranks.run(rank_sum) == [6.0] * 4


def test_what_a_rank_has_started_ends_with_it(ranks):
    def starts():
        return subprocess.Popen(["sleep", "60"]).pid

    started = [psutil.Process(pid) for pid in ranks.run(starts)]
    fails(ranks, is_killed)
    assert not psutil.wait_procs(started, timeout=GRACE)[1]


def test_the_notebook_forks_itself(ranks):
    if not os.fork():
        ranks.close()  # what leaving Python does there
        os._exit(0)
    os.wait()
    assert os.path.isdir(ranks._link.folder) and ranks.run(rank_sum) == [6.0] * 4
    fails(ranks, is_killed)


def test_a_function_that_destroys_the_group(ranks):
    with pytest.warns(
        UserWarning, match=r"left their group \(destroy_process_group\). A fresh set of ranks takes over"
    ):
        assert ranks.run(dist.destroy_process_group) == [None] * 4
    assert ranks.run(rank_sum) == [6.0] * 4
    assert "in a group already" in str(fails(ranks, dist.init_process_group, "gloo"))


def test_a_call_that_closes_its_output(ranks):
    def closes():
        sys.stdout.close()
        os.close(1)

    assert ranks.run(closes) == [None] * 4
    ranks.run(lambda: print("said") or os.write(1, b"too\n"), quiet=True)
    assert ranks.output == ["said\ntoo\n"] * 4


def test_exceptions_that_are_hard_to_tell(ranks):
    def circle():
        a, b = ValueError("a"), ValueError("b")
        a.__cause__, b.__cause__ = b, a
        raise a

    class Unspeakable(Exception):
        def __str__(self):
            raise SystemExit

    def unspeakable():
        raise Unspeakable

    assert "ranks 0–3 raised ValueError: a" in str(fails(ranks, circle))
    assert "ranks 0–3 raised Unspeakable: (its text cannot be shown" in str(fails(ranks, unspeakable))


@pytest.mark.parametrize(
    "consequence",
    [
        RuntimeError("Connection closed by peer [127.0.0.1]:1"),
        ConnectionError("worker 1 is lost"),
        EOFError(),
        BrokenPipeError(32, "gone"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
    ],
)
def test_the_cause_may_come_later_than_its_consequences(ranks, consequence):
    """On a busy machine the neighbours' "connection closed" can be told long before the death that closed it."""

    def told_late():
        if dist.get_rank() == 1:
            time.sleep(0.9)
            raise ValueError("the cause")
        raise consequence

    error = fails(ranks, told_late)
    assert (error.rank, error.message) == (1, "the cause")


def test_a_lost_connection_is_the_cause_where_there_is_no_other(ranks):
    def refused():
        if dist.get_rank() == 2:
            raise ConnectionRefusedError("no server")

    error = fails(ranks, refused)
    assert (error.rank, error.cause) == (2, "ConnectionRefusedError") and "still there" in str(error)


def test_a_rank_that_left_the_group_is_named_and_not_those_who_waited(ranks):
    def leaves():
        if dist.get_rank() == 1:
            return dist.destroy_process_group()
        dist.barrier()  # nobody comes

    error = fails(ranks, leaves)
    assert str(error).startswith("rank 1 left the group while ranks 0, 2, 3 still waited for it")
    assert error.rank == 1 and error.line == line_of(leaves, "nobody comes")


def test_after_a_kill_the_next_call_answers_within_a_second(ranks):
    with pytest.raises(RankError):
        ranks.run(is_killed)
    began = time.monotonic()
    assert ranks.run(rank_sum) == [6.0] * 4
    assert time.monotonic() - began < 5  # the figure itself is the benchmark's: this machine may be busy


def test_a_rank_that_calls_on_until_it_is_replaced_leaves_no_note(ranks_of):
    """The next set of ranks would be compared with what the last one did while it was being ended."""

    def calls_on():
        if dist.get_rank() == 0:
            raise ValueError("first")
        under_way = []
        while True:
            under_way.append(dist.isend(torch.zeros(2), 0))

    def one_message():
        number = torch.full((1,), 7.0)
        dist.send(number, 0) if dist.get_rank() else dist.recv(number.zero_(), 1)
        return number.item()

    ranks = ranks_of(2)
    for _ in range(3):
        with pytest.raises(RankError, match="first"):
            ranks.run(calls_on, quiet=True)
        assert ranks.run(one_message, quiet=True) == [7, 7]
