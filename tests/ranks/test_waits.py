"""Who waits for whom, where a rank waits on another thread, or in calls that C++ makes for itself."""

import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pardist_lib import RankHang, Ranks
from pardist_lib.mechanisms.sharded import ShardedDataParallel
from pardist_lib.ranks import waits

TIMEOUT, GRACE = 2.0, 3.0  # seconds of stall until it is reported; a message comes at most so much later


@pytest.fixture(scope="module")
def ranks():
    with Ranks(3, timeout=TIMEOUT) as ranks:
        yield ranks


def hang(ranks, fn, *args):
    ranks.run(on_rank_0, lambda: None, None, timeout=60)  # fresh ranks have joined, and imported this module
    began = time.monotonic()
    with pytest.raises(RankHang) as caught:
        ranks.run(fn, *args, quiet=True)
    assert time.monotonic() - began < TIMEOUT + GRACE
    return caught.value


def sharded(width):
    w = ShardedDataParallel(torch.nn.Linear(width, width))
    return lambda: w(torch.ones(2, width))


def sharded_evenly():
    return sharded(8)  # 24 weights of 72 each


def sharded_unevenly():
    return sharded(7)  # messages instead of one all_gather


def full_state_dict():
    return ShardedDataParallel(torch.nn.Linear(8, 8)).full_state_dict


def ddp():
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    return lambda: model(torch.ones(2, 8)).sum().backward()


def fsdp2():
    return lambda: fully_shard(torch.nn.Linear(8, 8))(torch.ones(2, 8))


def dtensor():
    return distribute_tensor(torch.ones(6, 6), init_device_mesh("cpu", (3,)), [Shard(0)]).full_tensor


def own_thread():
    group = dist.new_group()

    def wait_for_thread():
        thread = threading.Thread(target=dist.all_reduce, args=(torch.ones(3),), kwargs={"group": group})
        thread.start()
        thread.join()

    return wait_for_thread


def handle():
    group = dist.new_group()
    return lambda: dist.all_reduce(torch.ones(3), group=group, async_op=True).wait()


def beside_a_group_of_others():
    dist.new_group([1, 2])  # rank 0 gets a number in its place
    return ddp()


def on_rank_0(make, then_all):
    mine = make()
    if dist.get_rank() == 0 and mine:
        mine()
    if then_all:
        dist.barrier()


EVERY = [
    sharded_evenly, sharded_unevenly, full_state_dict, ddp, fsdp2, dtensor, own_thread, handle,
    beside_a_group_of_others,
]  # fmt: skip


@pytest.mark.parametrize("make", EVERY)
def test_two_calls_that_wait_for_each_other(ranks, make):
    if make is fsdp2 and torch.__version__ < "2.13":
        pytest.skip("before torch 2.13 fully_shard calls from Python: the ledger sees another call first")
    error = hang(ranks, on_rank_0, make, True)
    head = "rank 0 waits for ranks 1, 2, and ranks 1, 2 for rank 0 in another call: a deadlock"
    if make is sharded_unevenly:  # its messages go to one rank after the other
        head = "ranks 0–2 wait for each other: a deadlock"
    assert error.message.startswith(head), error
    assert error.cause == "deadlock" and error.rank == 0 and "only slow" not in str(error)
    assert "ranks 1, 2 were in barrier() at test_waits.py" in str(error)
    assert "rank 0 was in " in str(error) and error.cell == "test_waits.py"


@pytest.mark.parametrize("make", EVERY)
def test_a_call_that_the_others_leave_out_is_seen_without_waiting_for_the_timeout(ranks, make):
    error = hang(ranks, on_rank_0, make, False)
    assert error.message.endswith(", which returned without making that call"), error
    assert error.message.startswith("rank 0 waits for rank") and error.cause == "skipped call" and error.rank


@pytest.mark.parametrize("call", ["one line", "a handle"])
def test_a_rank_that_sleeps_after_a_call_does_not_wait_in_it(ranks, call):
    def sleeps():
        dist.barrier(); time.sleep(12)  # fmt: skip  # noqa: E702

    def has_a_handle():
        alone = dist.get_rank() == 0
        work = dist.all_reduce(torch.ones(3), async_op=True) if alone else 0; time.sleep(12)  # fmt: skip  # noqa: E702
        return work

    error = hang(ranks, sleeps if call == "one line" else has_a_handle)
    assert error.message.startswith("no sign of life from ranks 0–2 for") and error.cause == "stall"
    assert "time.sleep(12)" in str(error) and " in barrier" not in str(error) and "in all_reduce" not in str(error)


def test_those_who_wait_for_each_other_do_not_wait_for_a_third_that_is_slow(ranks):
    def beside():
        rank = dist.get_rank()
        time.sleep(30) if rank == 2 else dist.recv(torch.ones(1), 1 - rank)

    error = hang(ranks, beside)
    assert error.message.startswith("ranks 0, 1 wait for each other: a deadlock") and "rank 2 was at" in str(error)


def test_whoever_waits_in_a_chain_waits_for_its_end(ranks):
    def chain():
        rank = dist.get_rank()
        dist.recv(torch.ones(1), rank - 1) if rank else time.sleep(30)

    error = hang(ranks, chain)
    assert error.message.startswith("ranks 1, 2 wait for rank 0: no sign of life") and error.rank == 0


def test_a_call_that_all_have_made_is_no_deadlock(ranks):
    call = waits.Call("0", ("0", "gloo"), 3, (0, 1), "all_reduce(float32 [4])", "")
    instead = waits.Call("0", ("0", "gloo"), 3, (0, 1), "all_reduce(float32 [5])", "")
    made = {("0", "gloo"): 3}
    assert not waits._is_elsewhere(call, [call], made) and waits._is_elsewhere(call, [instead], made)
    gather = call._replace(text="all_gather(float32 [4])")
    assert not waits._is_elsewhere(gather, [call._replace(text="all_gather(float32 [3])")], made)
    assert waits._is_elsewhere(gather, [call], made) and waits._is_elsewhere(call, [], {})


@pytest.mark.parametrize(
    "line, where, name",
    [
        ("f(); work.wait()", (1, 1, 5, 16), "wait"),
        ("f(); time.sleep(1)", (1, 1, 5, 18), "sleep"),
        ("é = handles[0].get(g(1))", (1, 1, 5, 25), "get"),
        ("x + y", (1, 1, 0, 5), None),
        ("x.wait()", None, None),
    ],
)
def test_the_name_of_what_a_line_calls(tmp_path, line, where, name):
    (tmp_path / "program.py").write_text(line, encoding="utf-8")
    assert waits.called_at(str(tmp_path / "program.py"), where) == name
