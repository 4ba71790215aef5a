"""`torchrun(...)`: a whole program under torchrun, with the reporting of `Ranks`."""

import itertools
import linecache
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from . import report
from .guard import WHERE
from .host import stop
from .link import HERE, environment
from .output import Live, Printed, Waiting
from .session import seconds
from .transport import private_folder

_TRACEBACK = b"Traceback (most recent call last):"
_FRAME = re.compile(r'^  File "(.+?)", line (\d+)(?:, in (.+))?$', re.M)  # of a SyntaxError the last has no "in"
_FAILED = re.compile(r"time +: (\S+)\n.*\n\s*rank +: \d+ \(local_rank: (\d+)\)\n\s*exitcode +: (-?\d+)")
# torchrun gives the others 30 seconds after a failure, then SIGKILL: who was killed so late did not begin it
SHUTDOWN = 20
_RAISED = re.compile(r"^(\w[\w.]*)(?::? ?(.*))?$", re.S)


class _Process:
    """What one rank of the program printed; to the display it is like a link.Rank."""

    bar, ended = None, False

    def __init__(self, number, folder):
        self.number, self.folder, self.printed = number, folder, Printed()
        self._at, self.error_since = {}, None

    def read(self):
        moved = False
        for path in sorted(Path(self.folder).glob(f"*/attempt_*/{self.number}/std???.log"), key=_attempt_and_name):
            with open(path, "rb") as log:
                log.seek(self._at.get(path, 0))
                if data := log.read():
                    self._at[path] = log.tell()
                    self.printed.add(data)
                    moved = True
                    if _TRACEBACK in data:
                        self.error_since = self.error_since or time.time_ns()
        return moved

    def forget_traceback(self):
        """The error tells the root cause once: the ranks' own tracebacks are not shown again."""
        at = self.printed.data.find(_TRACEBACK)
        if at >= 0:  # torch may have put [rank0]: before it
            del self.printed.data[self.printed.data.rfind(b"\n", 0, at) + 1 :]

    def described(self):
        """The last traceback it printed, as rank.py describes an exception; None where there is none."""
        text = self.printed.text()
        text = re.sub(r"^\[rank\d+\]: ?", "", text, flags=re.M)  # torch may have put it before each line
        at = text.rfind(_TRACEBACK.decode())
        if at < 0:
            return None
        body = [line for line in text[at:].splitlines()[1:] if not re.match(r"\s*[\^~]+\s*$", line)]
        said = next((i for i, line in enumerate(body) if line and not line.startswith(" ")), len(body))
        raised = _RAISED.match("\n".join(body[said:]).strip()) if said < len(body) else None
        return {
            "type": raised[1].rsplit(".", 1)[-1] if raised else "an error",
            "message": re.split(r"\n\[W|\n\[rank\d", (raised[2] or "").strip())[0] if raised else "",
            "frames": [(f, int(n), name or "<module>") for f, n, name in _FRAME.findall("\n".join(body[:said]))],
            "time": self.error_since,
            "earlier": None,
        }


def torchrun(program, *args, nproc=4, timeout=60.0, quiet=False, options=(), env=None, fork=sys.platform != "darwin"):
    """Run a script (`train.py`) or a module (`package.module`) under torchrun, and wait for it.

    torchrun("train.py", "--epochs", 3, nproc=4)

    program  path of a script, or a module's dotted name.
    args     its command line.
    nproc    ranks (--nproc-per-node).
    timeout  seconds without output or an end after which the program is stopped and a RankHang raised.
    options  further options of torchrun itself: options=["--nnodes=2", ...].
    env      further environment variables.
    fork     True: torch is imported once, for torchrun and all ranks, which are forked from there (the default, except
             on macOS); False: each is started anew and imports torch for itself, as on a cluster: slower, more memory.

    Shows what the ranks print, rank by rank, and returns it as a list of strings. Raises RankError, root cause
    first, when a rank fails. The stop button, and the end of the notebook, end the program.
    """
    if not isinstance(nproc, int) or nproc < 1:
        raise ValueError(f"nproc is the number of ranks, at least 1, not {nproc!r}")
    seconds(timeout)
    target = [str(program)] if str(program).endswith(".py") else ["-m", str(program)]
    if target[0] != "-m" and not Path(target[0]).exists():
        raise FileNotFoundError(f"there is no script {program} in the notebook's folder")
    folder = private_folder("pardist-program-")
    command = ["--nproc-per-node", str(nproc)]
    if not any(str(option).startswith(("--rdzv", "--standalone", "--master", "--nnodes")) for option in options):
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{folder}/rdzv", "--rdzv-conf", "store_type=file"]
        command += ["--local-addr", "127.0.0.1"]
    command += ["--log-dir", f"{folder}/log", "--redirects", "3", *map(str, options)]
    if fork:
        command += [str(HERE / "worker.py"), folder, "--program", *(target if target[0] == "-m" else ["", *target])]
    else:
        command += target
    command += map(str, args)
    log = open(Path(folder, "torchrun.log"), "wb")
    guard = subprocess.Popen(
        [sys.executable, str(HERE / "guard.py"), folder, "--fork" if fork else "--plain", *command],
        env=environment(1) | {"PYTHONUNBUFFERED": "1"} | (env or {}),
        stdin=subprocess.PIPE,  # the guard ends the program when the notebook's end of this pipe closes
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    ranks, live, since = [_Process(r, f"{folder}/log") for r in range(nproc)], Live(quiet), time.monotonic()
    try:
        with Waiting() as waiting:  # until the first word of a rank
            while (code := guard.poll()) is None and time.monotonic() - since < timeout:
                time.sleep(0.05)
                if any([r.read() for r in ranks]):
                    since = time.monotonic()
                live.update(ranks)
                waiting.say("" if quiet or any(r.printed.data for r in ranks) else f"torchrun runs {nproc} processes …")
        for r in ranks:
            r.read()
        printed = [r.printed.text() for r in ranks]
        if code is None:
            frames, ended = _where(folder, ranks), _ended(folder)
            over = ended if len(ended) < nproc else ()  # else it is torchrun itself that does not end
            outcomes = {r.number: ("result",) if r.number in over else ("busy", frames[r.number]) for r in ranks}
            ending = f"{_outlives_its_group(frames)}The program was stopped."
            raise report.hang(outcomes, {}, timeout, ending, "torchrun(..., timeout=…)")
        if code:
            said = Path(folder, "torchrun.log").read_text(errors="replace")
            raise _failure(ranks, said, code, _ended(folder))
        return printed
    except KeyboardInterrupt:
        raise report.RanksInterrupted("the program was stopped") from None
    finally:
        guard.stdin.close()
        stop(guard, patience=20)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)
        live.finish(ranks)


def _where(folder, ranks):
    """The frames of every rank as report.py has them, asked for by a signal that guard.py has prepared; [] for a rank
    that does not answer: every one where nothing was forked."""
    paths = [sorted(Path(folder).glob(f"where-{r.number}-*"), key=os.path.getmtime)[-1:] for r in ranks]
    for path in itertools.chain.from_iterable(paths):
        with suppress(ProcessLookupError):
            os.kill(int(path.name.rsplit("-", 1)[1]), WHERE)
    time.sleep(0.5)
    return [report.native_frames(path[0].read_text()) if path else [] for path in paths]


def _outlives_its_group(frames):
    """What to say of torch 2.13's trap, where the ranks' stacks may be in it: the last owner of a gloo group is a
    DistributedDataParallel, which ends the group's thread as it is freed, and holds Python's lock meanwhile; if the
    thread wants that for the last message that it has carried, both wait for ever."""
    for filename, *_ in (stack[-1] for stack in frames if stack):
        if "DistributedDataParallel" in "".join(linecache.getlines(filename)):
            return _FREED_LATE
    return ""


def _ended(folder):
    """{rank: exit code} of those that ended by themselves, as guard.py has noted; {} where nothing was forked."""
    return {int(path.name.removeprefix("ended-")): int(path.read_text()) for path in Path(folder).glob("ended-*")}


def _attempt_and_name(path):
    return int(path.parts[-3].removeprefix("attempt_")), path.name != "stdout.log"


def _failure(ranks, said, code, noted=()):
    """The RankError for a program. said: torchrun's log; noted: as of `_ended`."""
    times = {
        int(rank): (datetime.fromisoformat(at.replace("_", "T")), int(code)) for at, rank, code in _FAILED.findall(said)
    }
    first, outcomes = min((at for at, _ in times.values()), default=None), {}
    for r in ranks:
        by_itself = dict(noted).get(r.number)
        described, (at, ended) = r.described(), times.get(r.number, (first, by_itself or 0))
        # torchrun ends those who outlived the first failure: SIGTERM, and after a while SIGKILL
        by_torchrun = ended == -signal.SIGTERM or ended == -signal.SIGKILL and (at - first).seconds >= SHUTDOWN
        if ended < 0 and not by_torchrun:
            outcomes[r.number] = "died", ended, r.error_since or 0, r.printed.lines()[-3:]
        elif by_itself == 0:
            outcomes[r.number] = "left", "ended"
        elif described:
            outcomes[r.number] = "error", described
        elif ended > 0:
            outcomes[r.number] = "died", ended, 0, r.printed.lines()[-3:]
        else:
            outcomes[r.number] = ("stopped",)
        r.forget_traceback()
    others = [r for r, outcome in outcomes.items() if outcome[0] == "stopped"]
    if report.second_hand_only(outcomes) and not any(outcome[0] == "left" for outcome in outcomes.values()):
        for rank in others:  # nobody else can have closed the connection
            outcomes[rank] = "left", "left the group", len(others) > 1
    nobody, ending = [None] * len(ranks), "torchrun stopped the whole program."
    if report.root_cause(outcomes) is None:
        return report.RankError(f"torchrun ended with exit code {code}:\n{said.strip()[-1500:]}", cause="torchrun")
    if any(outcome[:2] == ("died", -signal.SIGABRT) and _AT_ITS_END in outcome[3] for outcome in outcomes.values()):
        ending = f"{_OUTLIVED}\n{ending}"
    return report.failure(outcomes, {}, nobody, [], ending)


_FREED_LATE = (
    "If its work was done: a DistributedDataParallel that is freed after destroy_process_group() can wait for ever for "
    "the group's thread. `del model` before that call.\n"
)

# torch 2.13: a gloo thread that wants Python's lock when Python is shutting down takes the process with it. The
# thread should have ended with its group, but torch.distributed.nn holds the group where that is imported after it.
_AT_ITS_END = "terminate called without an active exception"
_OUTLIVED = (
    "That is how it looks when Python ends before gloo's threads do. The group keeps them alive if "
    "torch.distributed.nn is imported after init_process_group (the first optimizer does it): import it at the top of "
    "the program, and end the program with dist.destroy_process_group()."
)
