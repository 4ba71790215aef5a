"""The notebook's side of a set of ranks: start them, replace them, take their messages. What a call means, and
what to say when it fails, is in session.py."""

import json
import os
import selectors
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from . import report
from .host import stop
from .ledger import Ledger, is_readers
from .output import Printed, Waiting
from .rank import END
from .transport import Door, private_folder, receive
from .waits import calls_of
from .worker import GIVEN

SLOW_START = 15  # seconds after which it is said what a start waits for
START_SECONDS = 120  # the slowest machine we know needs 30
HERE = Path(__file__).parent


class Rank:
    """What the notebook knows of one rank; `outcome` is described in report.py."""

    def __init__(self, number):
        self.number, self.pid = number, None
        self.calls = self.watch = self.out = None  # connections
        self.backend = self.device = self.problem = None
        self.in_group = True  # until a call has destroyed its process group
        self.begin(False)

    def begin(self, taking_part):
        self.printed, self.marked, self.bar = Printed(), False, None
        self.outcome = ("busy", None) if taking_part else ("idle",)
        self.spot = self.under_way = None  # see waits.py

    @property
    def joined(self):
        return None not in (self.calls, self.watch, self.out)

    @property
    def ended(self):
        """Its call is over when its reply is there and everything it printed before."""
        kind = self.outcome[0]
        return kind in ("idle", "died") or kind in ("result", "error") and self.marked


class Link:
    """`n` ranks under one torchrun: their processes, connections and messages."""

    def __init__(self, n, threads, fork):
        self.n, self.fork, self.generation, self.number, self.asked = n, fork, 0, 0, 0
        self.ranks, self.workers, self.lost = [Rank(r) for r in range(n)], {}, None
        self.folder = private_folder("pardist-")
        self.door = Door(self.folder)
        self.ledger = Ledger(Path(self.folder, "ledger"), n, create=True)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.door, selectors.EVENT_READ, (self._on_door, None))
        mode = "--fork" if fork else "--plain"
        self.torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.folder}/rdzv-{{generation}}",
            "--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1", "--log-dir", f"{self.folder}/log",
            str(HERE / "worker.py"), self.folder, mode, "{generation}",
        ]  # fmt: skip
        path = [p or os.getcwd() for p in sys.path]
        setup = {"torchrun": self.torchrun, "ranks": n, "path": path, "notebook": os.getpid()}
        Path(self.folder, "setup.json").write_text(json.dumps(setup))
        self.host_conn = self.torchrun_pid = None
        with open(Path(self.folder, "host.log"), "w") as log:
            self.host = subprocess.Popen(
                [sys.executable, str(HERE / "host.py"), self.folder, mode],
                env=environment(threads),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the stop button's SIGINT is for the notebook alone
            )

    def wait_joined(self):
        """Until every rank has joined the group; RuntimeError with the logs where one cannot."""
        if all(r.joined for r in self.ranks):
            return
        with Waiting() as waiting:
            self._wait_joined(waiting)

    def _wait_joined(self, waiting):
        began = time.monotonic()
        deadline, told = began + START_SECONDS, False
        while not all(r.joined for r in self.ranks):
            self.pump(0.5)
            took = time.monotonic() - began
            if 1 < took < SLOW_START:
                waiting.say(f"{self.n} ranks are starting …")
            elif took > SLOW_START and not told:
                told = True
                said = f"The ranks have been starting for {SLOW_START} s: {self._awaited()}."
                waiting.say(said) or print(said, flush=True)
            problem = self.lost or next((r.problem for r in self.ranks if r.problem), None)
            if not problem and time.monotonic() > deadline:
                problem = f"after {START_SECONDS} s they are not there: {self._awaited()}"
            if problem:
                logs = [Path(self.folder, name) for name in ("torchrun.log", "host.log")]
                said = "\n".join(log.read_text()[-1500:] for log in logs if log.exists()).strip()
                self.close()
                raise RuntimeError(f"the ranks could not be started: {problem}\n{said}")

    def _awaited(self):
        """What a start waits for, in words."""
        if self.host_conn is None:
            return "their host process has not reported yet"
        missing = [r for r in range(self.n) if r not in self.workers]
        if self.fork and missing:
            return f"torchrun has not started the workers of {report.plural(missing)} yet"
        late = [r.number for r in self.ranks if not r.joined]
        return f"{report.plural(late)} {'has' if len(late) == 1 else 'have'} not joined the group yet"

    def replace(self):
        """A fresh set of ranks; they join while the reader reads what happened."""
        for r in self.ranks:
            for conn in (r.calls, r.watch, r.out):
                self._hang_up(conn)
        self.generation += 1
        self.ranks = [Rank(r) for r in range(self.n)]
        self._order("kill")
        self._order("fork" if self.fork else "restart torchrun", self.generation)

    def close(self):
        """End the ranks, torchrun and everything they opened."""
        self.door.close()
        for r in self.ranks:
            for conn in (r.calls, r.watch, r.out):
                self._hang_up(conn)
        for conn in (*self.workers.values(), self.host_conn):
            self._hang_up(conn)
        self.selector.close()
        try:
            self.host.wait(10)  # it ends the ranks and torchrun, then itself
        except subprocess.TimeoutExpired:  # on a busy machine it may still be importing torch
            stop(self.host, patience=0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def pump(self, seconds):
        """Take what has arrived within `seconds`; True when a rank gave a sign of life."""
        moved = False
        for key, _ in self.selector.select(seconds):
            if key.fileobj in self.selector.get_map():  # an earlier message of this round may have ended it
                handler, who = key.data
                moved |= handler(key.fileobj, who)
        if self.host.poll() is not None:
            self.lost = self.lost or "their host process has ended"
        return moved

    def ask_where(self, seconds):
        """Ask the watch thread of every rank for its stack and for its calls under way: the outcome of a busy one
        becomes ("busy", frames), or ("busy", None, whether a signal has stopped it) where it does not answer. Returns
        {busy rank: collectives so far}, also those of C++ code."""
        self.asked += 1
        asked = [r for r in self.ranks if r.outcome[0] != "died" and _try(r.watch.send, self.asked)]
        deadline, counted = time.monotonic() + seconds, {}
        for r in self.ranks:
            r.spot = r.under_way = None  # what it told another time is no answer
        while len(counted) < len(asked) and time.monotonic() < deadline:
            for r in asked:
                if r.number in counted or not _try(r.watch.poll, 0.01):
                    continue
                answer = _try(r.watch.recv)
                if answer and answer[0] != self.asked:
                    continue  # a late one, to an earlier question
                _, frames, spot, so_far, under_way = answer or (0, None, None, None, None)
                counted[r.number] = so_far
                if answer and r.outcome[0] == "busy":
                    r.outcome, r.spot = ("busy", frames), spot
                r.under_way = under_way
            self.pump(0)
        for r in asked:
            if r.number not in counted and r.outcome[0] == "busy":
                r.outcome = "busy", None, _stopped(r.pid)
        return {r.number: counted[r.number] for r in asked if r.number in counted and r.outcome[0] == "busy"}

    def calls(self):
        """{rank: the call that it waits in}, for those that have just been asked."""
        return calls_of(self.ranks, self.ledger)

    def last_calls(self):
        return [self.ledger.last(r) for r in range(self.n)]

    def fault_frames(self, rank):
        """The stack that faulthandler left when native code brought a rank down, or []."""
        path = Path(self.folder, f"fault-{self.generation}-{rank}")
        text = path.read_text() if path.exists() else ""
        frames = report.native_frames(text.partition("Current thread")[2].partition("\n\n")[0])
        return frames if any(is_readers(f[0]) for f in frames) else []

    # ---- messages: each handler returns True for a sign of life from a rank ------------------------------------

    def _on_door(self, door, _):
        arrived = door.accept()
        if arrived is None:
            return False
        conn, who = arrived
        role = who["role"]
        if role == "host":
            self.host_conn, self.torchrun_pid = conn, who["torchrun"]
            self.selector.register(conn, selectors.EVENT_READ, (self._on_host, None))
        elif role == "worker":
            self.workers[who["rank"]] = conn
            conn.given = who
        elif who["generation"] != self.generation:
            conn.close()  # from a set that is being replaced
            return False
        else:
            r = self.ranks[who["rank"]]
            r.pid = who["pid"]
            setattr(r, role, conn)
            if role == "calls":
                r.backend, r.device, r.problem = who.get("backend"), who.get("device"), who.get("problem")
                self.selector.register(conn, selectors.EVENT_READ, (self._on_reply, r))
            elif role == "out":
                os.set_blocking(conn.fileno(), False)
                self.selector.register(conn, selectors.EVENT_READ, (self._on_output, r))
        if role in ("host", "worker") and self.fork and self.host_conn and len(self.workers) == self.n:
            self._order("envs", [self.workers[r].given["env"] for r in range(self.n)])
            self._order("fork", self.generation)
        return True

    def _on_host(self, conn, _):
        message = _try(conn.recv)
        if message is None:
            self._hang_up(conn)
            self.lost = "their host process has ended"
        elif message[0] == "died" and message[2] == self.generation:
            r = self.ranks[message[1]]
            while r.out is not None and self._on_output(r.out, r):
                pass  # what it printed last
            r.outcome = "died", message[3], time.time_ns()
            if not r.joined:
                self.lost = f"rank {r.number} {report.fate(message[3])[0]}"
        elif message[0] == "torchrun ended" and not all(r.joined for r in self.ranks):
            self.lost = f"torchrun ended with exit code {message[1]}"
        return True

    def _on_reply(self, conn, r):
        arrived = _try(receive, conn)
        if arrived is None:
            self._deaf(conn)
            if not self.fork:  # nobody but torchrun could tell how it ended
                r.outcome = "died", None, time.time_ns()
        elif arrived.head[0] == "progress":
            r.bar = arrived.head[1:]
        elif arrived.head[0] == self.number:
            _, kind, r.in_group = arrived.head
            r.outcome = kind, arrived if kind == "result" else arrived.load()
        return True

    def _on_output(self, conn, r):
        try:
            data = os.read(conn.fileno(), 1 << 20)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._deaf(conn)
            return False
        r.printed.add(data)
        mark = END + str(self.number).encode() + END
        if (at := r.printed.data.rfind(mark, -len(data) - len(mark))) >= 0:
            del r.printed.data[at : at + len(mark)]
            r.marked = True
        return True

    def _deaf(self, conn):
        if conn in self.selector.get_map():
            self.selector.unregister(conn)

    def _hang_up(self, conn):
        if conn is not None and not conn.closed:
            self._deaf(conn)
            conn.close()

    def _order(self, *what):
        if _try(self.host_conn.send, what) is None:
            self.lost = "their host process has ended"


def _try(communicate, *args):
    """The value (True for none) of something done with a connection, None where the other side is gone."""
    try:
        value = communicate(*args)
        return True if value is None else value
    except (EOFError, OSError):
        return None


def _stopped(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def environment(threads):
    """What the ranks' processes find in their environment: the notebook's, without what a cluster's job has left there
    for other ranks and another torchrun (which reads each PET_… as an option of its own: PET_NNODES=2 would wait for a
    second machine), and with what ranks need."""
    kept = {k: v for k, v in os.environ.items() if k not in GIVEN and not k.startswith(("PET_", "TORCHELASTIC_"))}
    return kept | _added(threads)


def _added(threads):
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    package = str(HERE.parents[1])
    return {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
        "GLOO_SOCKET_IFNAME": loopback,
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else torchrun's agent listens on every interface
        "TORCH_FR_BUFFER_SIZE": "2000",  # the flight recorder tells a Trace the sizes of DDP's own collectives
        "MPLBACKEND": "module://pardist_lib.ranks.no_screen",
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
    }
