"""What `Ranks` is for: calls, values, names, output, programs."""

import json
import os
import re
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError, connection
from pathlib import Path
from threading import Barrier

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from pardist_lib import RankError, RankHang, Ranks, progress, torchrun
from pardist_lib.ranks import ledger, newest
from pardist_lib.ranks.output import HEAD, TAIL, Printed, folded, rendered, rendered_html
from pardist_lib.ranks.program import _failure, _Process
from pardist_lib.ranks.report import plural


def whoami(scale=1, *, offset=0):
    return dist.get_rank() * scale + offset


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_results_come_in_rank_order(ranks_of, n):
    assert ranks_of(n).run(whoami, 10, offset=1) == [r * 10 + 1 for r in range(n)]


def test_on_some_ranks(ranks_of):
    assert ranks_of(4).run(whoami, on=[2, 0]) == [2, 0]
    assert ranks_of(4).run(whoami, on=3) == [3]
    with pytest.raises(ValueError, match="there is no rank 4: this Ranks has ranks 0 to 3"):
        ranks_of(4).run(whoami, on=[4])
    with pytest.raises(ValueError, match="a rank is named twice"):
        ranks_of(4).run(whoami, on=[0, 0])


def test_torchruns_environment_reaches_the_ranks(ranks_of):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS")
    for rank, got in enumerate(ranks_of(4).run(lambda: [os.environ.get(n) for n in names])):
        assert got[:3] == [str(rank), str(rank), "4"] and all(got)
        assert got[5] == "1"
    assert ranks_of(4).run(torch.get_num_threads) == [1] * 4
    assert ranks_of(4).command.startswith("torchrun --nproc-per-node 4 ") and os.sep + "tmp" not in ranks_of(4).command


def test_the_true_process_tree(ranks_of):
    ranks = ranks_of(4)
    rows = ranks.processes()
    by_pid = {row["pid"]: row for row in rows}
    parents = {row["what"]: by_pid[row["parent"]]["what"] for row in rows if row["parent"]}
    assert parents["worker"] == "torchrun" and parents["rank"] == "host"
    assert sorted(row["rank"] for row in rows if row["what"] == "rank") == [0, 1, 2, 3]
    assert [row["pid"] for row in rows if row["what"] == "rank"] == ranks.run(os.getpid)
    assert psutil.Process(ranks._link.torchrun_pid).cmdline()[2] == "torch.distributed.run"


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.randn(300, 300),
        torch.tensor(3.5),
        torch.empty(0, 4, dtype=torch.int32),
        torch.ones(4, 6)[:, 6:],  # empty, and with strides
        torch.ones(70000, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (3,), check_invariants=True),
        torch.nn.Parameter(torch.ones(3), requires_grad=False),
    ],
    ids=lambda v: f"{v.dtype}-{tuple(v.shape)}",
)
def test_tensors_come_back_as_they_are(ranks_of, value):
    for got in ranks_of(4).run(lambda x: x, value):
        assert type(got) is type(value) and got.dtype == value.dtype and got.requires_grad == value.requires_grad
        assert torch.equal(got.to_dense(), value.to_dense())


def unwaited():
    import torch.distributed._functional_collectives as functional

    return functional.all_reduce(torch.full((1000,), 1.0 + dist.get_rank()), "sum", dist.group.WORLD)


def test_a_result_that_is_still_on_its_way_is_waited_for(ranks_of):
    for got in ranks_of(4).run(unwaited):
        assert type(got) is torch.Tensor and torch.equal(got, torch.full((1000,), 10.0))


def test_results_are_the_notebooks_own(ranks_of):
    """Writing into a received tensor or array changes nobody else's, and what was sent stays as it was."""
    sent = torch.zeros(1 << 17)

    def add_one(x):
        x += 1
        return {"tensor": x, "array": np.arange(1 << 15), "list": [x, x]}

    got = ranks_of(4).run(add_one, sent)
    got[0]["tensor"].mul_(7)
    got[0]["array"][0] = 5
    assert sent.sum() == 0 and got[1]["tensor"][0] == 1 and got[1]["array"][0] == 0
    assert got[0]["list"][0] is got[0]["list"][1] is got[0]["tensor"]  # one tensor stays one


def test_torchs_operators_travel_by_name(ranks_of):
    aten, add = torch.ops.aten, torch.ops.aten.add

    def double(x):
        return torch.ops.aten.add.Tensor(aten.alias(x), add(x, 0))

    got = ranks_of(2).run(lambda x, *more: (double(x), *more), torch.ones(2), torch.ops, add.Tensor)
    assert all(torch.equal(r[0], torch.full((2,), 2.0)) and r[1:] == (torch.ops, add.Tensor) for r in got)


def test_a_result_leaves_its_graph_behind(ranks_of):
    def loss():
        w = torch.ones(3, requires_grad=True)
        return (w * 2).sum(), w

    total, leaf = ranks_of(4).run(loss)[0]
    assert total == 6 and not total.requires_grad and leaf.requires_grad


def test_modules_travel_with_tied_weights(ranks_of):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    got = ranks_of(4).run(lambda m: m, model)[2]
    assert got[1].weight is got[0].weight and torch.equal(got[0].bias, model[0].bias)


def test_names_persist_until_they_are_replaced(ranks_of):
    ranks = ranks_of(4)
    ranks.push(base=torch.ones(2))
    ranks.run_cell("base = base * rank")
    assert [x.tolist() for x in ranks.pull("base")] == [[r, r] for r in range(4)]
    ranks.restart()
    with pytest.raises(RankError, match="base"):
        ranks.pull("base")


def test_every_way_to_call_a_collective_is_noted(ranks_of):
    """barrier, keyword arguments, object collectives, subgroups: the ledger must not get in the way."""

    def calls():
        n, x = dist.get_world_size(), torch.ones(4)
        dist.barrier()
        dist.all_reduce(x, op=dist.ReduceOp.AVG, async_op=True).wait()
        dist.reduce(x, dst=1)
        dist.gather(x, [torch.empty(4) for _ in range(n)] if dist.get_rank() == 0 else None)
        dist.all_gather([torch.empty(4) for _ in range(n)], x)
        dist.reduce_scatter_tensor(torch.empty(1), torch.ones(4))
        dist.all_to_all_single(torch.empty(4), x)
        objects = [None] * n
        dist.all_gather_object(objects, dist.get_rank())
        dist.broadcast_object_list(objects, src=2)
        half = dist.new_group([0, 2])
        if dist.get_rank() in (0, 2):
            dist.all_reduce(torch.ones(2 + 0 * n), group=half)
        reply = torch.empty(1)
        if dist.get_rank() == 0:
            senders = sorted(dist.recv(reply) for _ in range(n - 1))  # from anyone
            assert senders == [1, 2, 3]
        else:
            dist.send(torch.ones(1), 0)
        dist.monitored_barrier()
        return objects

    assert ranks_of(4).run(calls) == [[0, 1, 2, 3]] * 4


def test_one_call_at_a_time(ranks_of):
    ranks = ranks_of(4)
    with ranks._lock, pytest.raises(RuntimeError, match="busy with another call"):
        ranks.run(whoami)


def test_closed_ranks_say_so():
    with Ranks(1) as ranks:
        family = psutil.Process(ranks._link.host.pid).children(recursive=True)
        folder = ranks._link.folder
    assert not [p for p in family if p.is_running()] and not Path(folder).exists()
    with pytest.raises(RuntimeError, match="closed: make new ones"):
        ranks.run(whoami)
    ranks.close()  # twice is no error


@pytest.mark.parametrize("bad", [0, -1, 33, 2.0, "4"])
def test_nonsense_sizes(bad):
    with pytest.raises(ValueError, match="whole number from 1 to 32"):
        Ranks(bad)
    with pytest.raises(ValueError, match="timeout"):
        Ranks(2, timeout=0)


@pytest.mark.parametrize("bad", ["5", 0, -1, True, float("nan")])
def test_nonsense_timeouts(ranks_of, bad, program):
    with pytest.raises(ValueError, match="timeout is a number of seconds above 0"):
        ranks_of(4).run(whoami, timeout=bad)
    with pytest.raises(ValueError, match="timeout is a number of seconds above 0"):
        torchrun(program, timeout=bad)


def test_the_newest_is_the_one_made_last(ranks_of, monkeypatch):
    first = ranks_of(4)
    with Ranks(1) as second:
        monkeypatch.setattr(second._link.host, "pid", 1)  # process ids begin anew where they are used up
        assert newest() is second and first is not second
        monkeypatch.undo()


def test_the_notes_of_ranks_can_be_read_while_they_are_written(tmp_path, monkeypatch):
    notes = ledger.Ledger(tmp_path / "ledger", 2, create=True)
    assert (tmp_path / "ledger").stat().st_blocks * 512 >= 2 * ledger.PAGE  # a hole, on a full disk, ends the process
    here, plain = ledger.channel([0, 1]), ledger._entry
    for _ in range(7):
        notes.write(0, here, "all_reduce(float32 [4], SUM)", "In[1]:1")
    assert notes.read(0, here, 7) == ("all_reduce(float32 [4], SUM)", "In[1]:1")

    class Overtaken:
        size, pack = plain.size, plain.pack

        def unpack_from(self, memory, at):
            header = plain.unpack_from(memory, at)
            monkeypatch.setattr(ledger, "_entry", plain)
            for _ in range(ledger.SLOTS):  # the other rank makes its next calls between two reads of this one
                notes.write(0, here, "broadcast(float32 [9], root 0)", "In[1]:2")
            return header

    monkeypatch.setattr(ledger, "_entry", Overtaken())
    assert notes.read(0, here, 7) is None


def test_threads_of_a_rank_note_their_calls_at_once(tmp_path):
    """No call is lost: a count that is one too low would be taken for a mismatch."""
    notes, before, together = ledger.Ledger(tmp_path / "ledger", 1, create=True), sys.getswitchinterval(), Barrier(4)

    def make_calls(_):
        together.wait()
        for number in range(2000):
            notes.write(0, ledger.channel([0], number % 10), "send", "")

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(make_calls, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert notes.total(0) == 8000 and set(notes.counts(0).values()) == {800}


def test_not_a_function(ranks_of):
    with pytest.raises(TypeError, match="fn is a function, not int; give it without calling it"):
        ranks_of(4).run(3)


def test_without_fork_each_worker_is_a_rank():
    with Ranks(2, fork=False, timeout=5) as ranks:
        assert ranks.run(whoami) == [0, 1]
        parents = [psutil.Process(pid).ppid() for pid in ranks.run(os.getpid)]
        assert parents == [ranks._link.torchrun_pid] * 2
        with pytest.raises(RankError, match="rank 1 has gone"):
            ranks.run(lambda: dist.get_rank() == 1 and os._exit(3) or dist.barrier())
        assert ranks.run(whoami) == [0, 1]


# ---- doors ----------------------------------------------------------------------------------------------------


def test_strangers_are_refused(ranks_of):
    ranks = ranks_of(4)
    folder = Path(ranks._link.folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE((folder / "key").stat().st_mode) == 0o600

    knock = f"""
from multiprocessing import connection
connection.Client({str(folder / "door")!r}, family="AF_UNIX", authkey=b"guess")
"""
    stranger = subprocess.Popen([sys.executable, "-c", knock], stderr=subprocess.PIPE, text=True)
    silent = connection.socket.socket(connection.socket.AF_UNIX)
    silent.connect(str(folder / "door"))  # says nothing, and must not hold the notebook for long
    assert ranks.run(whoami) == [0, 1, 2, 3]
    while stranger.poll() is None:  # the door is looked at while ranks run
        ranks.run(time.sleep, 0.2)
    assert AuthenticationError.__name__ in stranger.communicate()[1]
    silent.close()
    assert ranks.run(whoami) == [0, 1, 2, 3]


def test_nothing_listens_beyond_loopback(ranks_of):
    """Our own processes and torchrun's listen nowhere; each rank's gloo listens on loopback (README)."""
    ranks = ranks_of(4)
    family = [psutil.Process(ranks._link.host.pid)]
    family += family[0].children(recursive=True)
    pids = set(ranks.run(os.getpid))
    for process in family:
        for c in process.net_connections("inet"):
            if c.status == psutil.CONN_LISTEN:
                assert process.pid in pids, f"{process.cmdline()} listens on {c.laddr}"
                assert c.laddr.ip in ("127.0.0.1", "::1")


# ---- output ---------------------------------------------------------------------------------------------------


def test_what_ranks_print_is_kept_in_rank_order(ranks_of, capsys):
    ranks = ranks_of(4)

    def talk():
        print("all say this")
        os.write(1, f"rank {dist.get_rank()} from C\n".encode())
        sys.stderr.write("and this\n")

    ranks.run(talk)
    assert ranks.output == [f"all say this\nrank {r} from C\nand this\n" for r in range(4)]
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["ranks 0–3 │ all say this"] + [f"rank {r}    │ rank {r} from C" for r in range(4)] + [
        "ranks 0–3 │ and this"
    ]
    ranks.run(talk, quiet=True)
    assert capsys.readouterr().out == "" and len(ranks.output[0]) > 0
    ranks.run(talk, on=2, quiet=True)
    assert ranks.output[2].startswith("all say") and ranks.output[0] == ""


def test_what_is_dropped_of_a_flood_is_said():
    printed = Printed()
    for _ in range(40):
        printed.add(b"x" * (1 << 20))
    printed.add(b"the end")
    text = printed.text()
    assert text.endswith("the end") and f"\n… {16 << 20:,} bytes dropped …\n" in text


def test_folding():
    assert folded({0: ["a", "b"], 1: ["a", "b"]}) == [([0, 1], ["a", "b"])]
    assert folded({0: ["a", "1"], 1: ["a", "2"], 2: ["a", "2"]}) == [([0, 1, 2], ["a"]), ([0], ["1"]), ([1, 2], ["2"])]
    assert folded({0: [], 1: ["x"]}) == [([1], ["x"])]
    assert folded({}) == []
    long = [str(i) for i in range(1000)]
    text = rendered({0: long})
    assert f"{1000 - HEAD - TAIL} more lines, all of them in ranks.output[0]" in text and text.endswith("999")
    assert len(rendered({0: ["x" * 10_000]})) < 600
    apart = rendered({rank: [f"{rank}: {i}" for i in range(3000)] for rank in range(4)})
    assert len(apart.splitlines()) == 4 * (HEAD + TAIL + 1)
    assert apart.count(f"{3000 - HEAD - TAIL:,} more lines, all of them in ranks.output") == 4


def test_a_page_shows_each_rank_in_its_colour():
    page = rendered_html({0: ["a<b"], 1: ["c"], 2: ["c"]}, "a note")
    assert "background:#0072B2;color:#fff\"> rank 0     </span> a&lt;b" in page and page.endswith("a note</pre>")
    assert "background:#deded8" in page  # ranks 1 and 2 say the same
    assert rendered_html({0: ["\x1b[31mred\x1b[0m"]}) is None


def test_progress_bars_leave_their_last_state():
    printed = Printed()
    printed.add(b"  0%|   |\r 50%|## |\r100%|####|\ndone\n\x1b[A")
    assert printed.lines() == ["100%|####|", "done"]


def test_progress_and_tqdm_on_ranks(ranks_of):
    def train():
        from tqdm import tqdm

        return sum(progress(range(50), "steps")), sum(tqdm(range(10)))

    assert ranks_of(4).run(train, quiet=True) == [(1225, 45)] * 4
    assert sum(progress(range(5))) == 10  # outside of ranks it is tqdm


def test_plural():
    assert [plural(x) for x in ([1], [0, 1], [0, 1, 2], [3, 0, 1, 2, 6])] == [
        "rank 1", "ranks 0, 1", "ranks 0–2", "ranks 0–3, 6",
    ]  # fmt: skip


# ---- whole programs -------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
print("arguments", sys.argv[1:])
if "raise" in sys.argv and rank == 1:
    raise ValueError("broken shard")
if "die" in sys.argv and rank == 1:
    os.kill(os.getpid(), 9)
if "sleep" in sys.argv:
    time.sleep(60)
x = torch.ones(1) * rank
dist.all_reduce(x)
print("sum", x.item())
dist.destroy_process_group()
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


FORKS = pytest.mark.skipif(sys.platform == "darwin", reason="forking after an import of torch is not safe there")
FORKED_OR_NOT = pytest.mark.parametrize("fork", [pytest.param(True, marks=FORKS), False])


@FORKED_OR_NOT
def test_a_program_under_torchrun(program, fork):
    printed = torchrun(program, "x", 3, nproc=2, quiet=True, fork=fork)
    said = [text.splitlines()[-2:] for text in printed]  # before them, torch 2.10's gloo says a line
    assert said == [["arguments ['x', '3']", "sum 1.0"]] * 2


@FORKED_OR_NOT
@pytest.mark.parametrize("how, cause", [("raise", "ValueError"), ("die", "SIGKILL")])
def test_a_program_that_fails(program, how, cause, fork, capsys):
    with pytest.raises(RankError) as caught:
        torchrun(program, how, nproc=3, fork=fork)
    assert (caught.value.rank, caught.value.cause) == (1, cause)
    assert len(str(caught.value).splitlines()) < 12
    if how == "raise":
        assert caught.value.line == PROGRAM.splitlines().index('    raise ValueError("broken shard")') + 1
    assert "Traceback" not in capsys.readouterr().out


WORLDLY = """
import atexit, json, os, pickle, random, signal, sys, time, numpy
import helper_beside_it

class Mine: pass

assert type(pickle.loads(pickle.dumps(Mine()))) is Mine and sys.stdin.read() == ""
atexit.register(print, "and left in order")
state = {"file": __file__, "name": __name__, "given": os.environ["GIVEN"], "folder": os.getcwd()}
print(json.dumps(state | {"draws": [random.random(), numpy.random.rand()], "signal": sys.argv[1:]}), flush=True)
if os.environ["RANK"] == "1":
    while not os.path.exists("ready"):
        time.sleep(0.1)
    sys.exit(3)
signal.signal(signal.SIGTERM, lambda *_: (print("told to end"), sys.exit(0)))
open("ready", "w").close()
time.sleep(60)
"""


@FORKED_OR_NOT
def test_a_program_finds_the_world_that_torchrun_gives_it(tmp_path, fork, monkeypatch, capsys):
    """Its own file, folder, arguments and environment, generators that differ, and torchrun's SIGTERM when rank 1 ends
    with an exit code."""
    (tmp_path / "helper_beside_it.py").touch()
    (tmp_path / "worldly.py").write_text(WORLDLY)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RankError, match="rank 1 ended its process with exit code 3") as caught:
        torchrun("worldly.py", "-x", nproc=2, fork=fork, env={"GIVEN": "it"})
    assert caught.value.rank == 1
    said = capsys.readouterr().out
    first, second = (json.loads(re.search(rf"rank {r} +│ ({{.*}})", said)[1]) for r in range(2))
    assert all(a != b for a, b in zip(first.pop("draws"), second.pop("draws"), strict=True))
    expected = {"name": "__main__", "given": "it", "folder": str(tmp_path), "signal": ["-x"]}
    assert [first | {"file": 0}, second | {"file": 0}] == [expected | {"file": 0}] * 2
    assert os.path.samefile(first["file"], tmp_path / "worldly.py")
    assert "told to end" in said and re.search(r"ranks 0, 1 +│ and left in order", said)


def test_a_program_that_ends_before_gloos_threads_do(tmp_path):
    """What torch says then (the race itself comes once in a while), and that we say what to do about it."""
    path = tmp_path / "program.py"
    path.write_text("import os, sys\nsys.stderr.write('terminate called without an active exception\\n')\nos.abort()")
    with pytest.raises(RankError, match="import it at the top of the program"):
        torchrun(path, nproc=1, quiet=True)


@FORKED_OR_NOT
def test_a_program_that_stalls(program, fork):
    with pytest.raises(RankHang, match="no sign of life from ranks 0, 1 for 20 s") as caught:
        torchrun(program, "sleep", nproc=2, timeout=20, quiet=True, fork=fork)
    line = PROGRAM.splitlines().index("    time.sleep(60)") + 1
    assert f"ranks 0, 1 were at program.py, line {line}: time.sleep(60)" in str(caught.value) or not fork


def test_a_program_that_cannot_be_read(tmp_path):
    (tmp_path / "program.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(RankError, match="SyntaxError") as caught:
        torchrun(tmp_path / "program.py", nproc=1, quiet=True)
    assert (caught.value.cell, caught.value.line) == ("program.py", 2)


def test_a_program_that_torchrun_starts_again(tmp_path):
    text = "import os\nn = os.environ['TORCHELASTIC_RESTART_COUNT']\nprint('attempt', n, flush=True)\nassert n == '1'"
    (tmp_path / "program.py").write_text(text)
    [said] = torchrun(tmp_path / "program.py", nproc=1, quiet=True, options=["--max-restarts=1"])
    assert said.startswith("attempt 0\n") and said.endswith("attempt 1\n")


def test_what_a_program_has_started_ends_with_it(tmp_path):
    text = "import subprocess\nprint(subprocess.Popen(['sleep', '60']).pid)"
    (tmp_path / "program.py").write_text(text)
    [said] = torchrun(tmp_path / "program.py", nproc=1, quiet=True)
    if psutil.pid_exists(int(said)):
        assert not psutil.wait_procs([psutil.Process(int(said))], timeout=3)[1]


def test_who_was_killed_long_after_the_first_failure_did_not_begin_it(tmp_path):
    """Who outlives torchrun's SIGTERM gets SIGKILL after 30 seconds; one that is killed at once is the cause."""
    block = "  time : 2026-01-01_00:00:{}\n  host : h\n  rank : {} (local_rank: {})\n  exitcode : {} (pid: 1)\n"
    ranks = [_Process(0, tmp_path), _Process(1, tmp_path)]
    for second, rank in ((31, 1), (1, 0)):
        ranks[1].printed.data[:] = (
            b'Traceback (most recent call last):\n  File "a.py", line 3, in f\nValueError: boom\n'
        )
        said = block.format(f"{second:02}", 0, 0, -9) + block.format("01", 1, 1, 1)
        assert _failure(ranks, said, 1).rank == rank


def test_programs_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no script"):
        torchrun(tmp_path / "nothing.py")
    with pytest.raises(RankError, match="No module named"):
        torchrun("no_such_module_here", nproc=1, quiet=True)
