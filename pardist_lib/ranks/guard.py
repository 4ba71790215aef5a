"""Runs a program under torchrun and takes it down, with everything it started and its folder, when the notebook goes
away: torchrun starts each worker in a session of its own, so killing torchrun's process group would leave them behind.
The notebook holds the other end of this process's standard input: its end is the sign.

With `--fork` this process also imports torch, once for all: torchrun and every rank are forked from it. What torchrun
starts for a rank is worker.py, which asks here for a fork with its own environment and output, passes on the signals
it gets, and ends as that fork ends: to torchrun it *is* the rank. It starts no thread, so that forking is safe.
"""

import atexit
import faulthandler
import gc
import importlib
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing import connection, reduction

WHERE = getattr(signal, "SIGRTMAX", None)  # a signal that no program uses; macOS has none, and does not fork


def main(folder, mode, *command):
    """command: torchrun's own arguments. Returns what to do in a forked process; the guard itself exits in here."""
    from pardist_lib.ranks.host import PRELOADED, as_its_own_process, end_group
    from pardist_lib.ranks.transport import Door

    notebook, door = os.dup(0), Door(folder)
    workers, notes = {}, {}  # connection of a worker: pid of its rank; where to note how it ended by itself
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    alarm, ring = os.pipe()
    os.set_blocking(ring, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if mode == "--fork":
        for module in (*PRELOADED, "torch.distributed.run"):
            importlib.import_module(module)
        gc.collect()
        gc.freeze()  # objects of the imports are never collected, so their pages stay shared
        program = os.fork()
        if not program:
            as_its_own_process(folder)
            return lambda: importlib.import_module("torch.distributed.run").main(list(command))
    else:
        program = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *command]).pid
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    ends, code = [notebook, alarm, ring], None
    while code is None:
        for ready in connection.wait([notebook, alarm, door, *workers]):
            if ready == notebook:
                _end_all()
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(1)
            elif ready == alarm:
                os.read(alarm, 4096)
            elif ready is door:
                if not (arrived := door.accept()):
                    continue
                worker, job = arrived
                try:
                    job["output"] = [reduction.recv_handle(worker) for _ in (1, 2)]
                except (EOFError, OSError):  # torchrun has killed it in the middle
                    worker.close()
                    continue
                note = os.path.join(folder, f"ended-{job['env']['LOCAL_RANK']}")
                with suppress(FileNotFoundError):
                    os.unlink(note)  # torchrun starts it again
                notes[worker], workers[worker] = note, os.fork()
                if not workers[worker]:
                    as_its_own_process(folder)
                    door.listener._listener._socket.close()  # the guard's ends must end with the guard
                    for end in (*ends, *(w.fileno() for w in workers)):
                        os.close(end)
                    return lambda: _be(job, folder)
                for fd in job["output"]:
                    os.close(fd)
            else:
                notes.pop(ready, None)  # from here on it does not end by itself
                try:
                    os.kill(workers[ready], ready.recv())  # a signal that it was sent, for its rank
                except (EOFError, OSError):  # torchrun has killed it
                    os.kill(workers.pop(ready), signal.SIGKILL)
        while (ended := _ended()) is not None:
            pid, status = ended
            end_group(pid)
            if pid == program:
                code = status
            for worker in [w for w, rank in workers.items() if rank == pid]:
                del workers[worker]
                if note := notes.pop(worker, None):
                    with open(note, "w") as file:
                        file.write(str(status))
                with suppress(OSError):  # it may have been killed meanwhile
                    worker.send(status)
                worker.close()
    _end_all()
    sys.exit(code if code >= 0 else 128 - code)


def _ended():
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def _end_all():
    import psutil

    from pardist_lib.ranks.host import family_of

    while family := family_of(os.getpid()):  # a worker may be starting another process right now
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, 1)


def _be(job, folder):
    """Be the program that torchrun's worker was asked to be."""
    os.environ.clear()
    os.environ.update(job["env"])
    where = open(os.path.join(folder, f"where-{os.environ['LOCAL_RANK']}-{os.getpid()}"), "w")
    faulthandler.register(WHERE, where, all_threads=False)  # program.py asks; it answers from inside gloo, too
    os.chdir(job["folder"])
    for here, there in zip((1, 2), job["output"], strict=True):
        os.dup2(there, here)
        os.close(there)
    from pardist_lib.ranks.surroundings import let_spawned_workers_find_main

    is_module, target, *args = job["program"]
    sys.argv[:] = [target, *args]
    let_spawned_workers_find_main()
    if is_module == "-m":
        sys.path[0] = job["folder"]
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(target))
        runpy.run_path(target, run_name="__main__")


def _to_its_end(run):
    """Run it and leave as Python leaves, but without taking down the modules: that would copy all their pages."""
    code = 1
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 255)


if __name__ == "__main__":
    _to_its_end(main(*sys.argv[1:]))
