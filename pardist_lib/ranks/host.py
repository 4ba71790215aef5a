"""The host: one process that imports torch once and forks every rank from itself.

The notebook starts it; it starts torchrun, imports torch meanwhile, and then does what the notebook asks:
`fork` a set of ranks with what torchrun gave their workers, `kill` a set. It tells the notebook when a rank dies.
It holds no process group, no GPU context and no second thread, so that forking it is safe. When the notebook
goes away, for whatever reason, it takes everything with it: ranks, torchrun, the private folder.
"""

import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import connection, process, util

PRELOADED = (  # what lessons need: imported once, shared by all ranks
    "numpy",
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch._dynamo",  # the first DistributedDataParallel imports it
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.profiler",
    "pardist_lib.ranks.rank",
)


def main(folder, mode):
    with open(os.path.join(folder, "setup.json")) as file:
        setup = json.load(file)
    sys.path[:] = setup["path"]
    torchrun = start_torchrun(folder, setup, generation=0)
    children, envs = {}, None  # pid: (rank, generation)
    try:
        from pardist_lib.ranks.ledger import Ledger
        from pardist_lib.ranks.transport import call_in

        ledger = Ledger(os.path.join(folder, "ledger"), setup["ranks"])
        notebook = call_in(folder, role="host", pid=os.getpid(), torchrun=torchrun.pid)
        alarm, ring = os.pipe()
        os.set_blocking(ring, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
        if mode == "--fork":
            for module in PRELOADED:
                importlib.import_module(module)
            gc.collect()
            gc.freeze()  # objects of the imports are never collected, so their pages stay shared
        while True:
            ready = connection.wait([notebook, alarm], timeout=1)
            if os.getppid() != setup["notebook"]:
                break
            if alarm in ready:
                os.read(alarm, 4096)
            for pid, (rank, generation) in list(children.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    end_group(pid)
                    del children[pid]
                    notebook.send(("died", rank, generation, os.waitstatus_to_exitcode(status)))
            if torchrun and torchrun.poll() is not None:
                notebook.send(("torchrun ended", torchrun.returncode))
                torchrun = None
            if notebook in ready:
                order = notebook.recv()
                if order[0] == "envs":
                    envs = order[1]
                elif order[0] == "fork":
                    for env in envs:
                        pid = fork_rank(folder, env, order[1], close=(alarm, ring, notebook))
                        children[pid] = int(env["RANK"]), order[1]
                elif order[0] == "kill":
                    kill(children)
                    ledger.clear()  # only now: until it is dead, a rank notes what it calls
                elif order[0] == "restart torchrun":  # plain mode: the workers are the ranks
                    stop(torchrun, patience=0)
                    ledger.clear()
                    torchrun = start_torchrun(folder, setup, order[1])
    except (EOFError, OSError):
        pass  # the notebook has gone, perhaps before this process could call in
    finally:
        kill(children)
        shutil.rmtree(folder, ignore_errors=True)  # before torchrun: nobody can come back in
        stop(torchrun)
        shutil.rmtree(folder, ignore_errors=True)  # its store may have written one more file


def start_torchrun(folder, setup, generation):
    """torchrun as on a cluster, in a session of its own, with its own store in a file: it listens nowhere."""
    log = open(os.path.join(folder, "torchrun.log"), "w")
    command = [part.replace("{generation}", str(generation)) for part in setup["torchrun"]]
    return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)


def fork_rank(folder, env, generation, close):
    pid = os.fork()
    if pid:
        with suppress(OSError):  # it does so itself, but may be killed before
            os.setpgid(pid, pid)
        return pid
    try:
        as_its_own_process(folder)
        for end in close:  # the rank has its own connections: the host's must end with the host
            os.close(end) if isinstance(end, int) else end.close()
        from pardist_lib.ranks.rank import serve

        serve(folder, env, generation)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


def as_its_own_process(folder):
    """Undo, in a forked process, what only its parent needs; numpy's generator would draw alike in all of them. A
    process group of its own: what the reader's code starts there ends with it; where multiprocessing keeps its sockets,
    a folder that the notebook removes."""
    os.setpgid(0, 0)
    process.current_process()._config["tempdir"] = folder
    util.spawnv_passfds = _tracker_apart
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules["numpy"].random.seed()


def _tracker_apart(path, args, passfds):
    """multiprocessing.util.spawnv_passfds, with a process group of its own for the resource tracker: see family_of.
    That it finds something to clean up is no news where ranks are killed as a rule."""
    if _TRACKER not in args[-1]:
        return _spawnv_passfds(path, args, passfds)
    command = [args[0], "-W", "ignore", *args[1:]]
    _trackers.append(subprocess.Popen(command, executable=path, pass_fds=passfds, process_group=0))
    return _trackers[-1].pid


_TRACKER = "multiprocessing.resource_tracker import main"
_spawnv_passfds, _trackers = util.spawnv_passfds, []  # a Popen that nobody holds would complain


def kill(children):
    for pid in children:
        end_group(pid)
    for pid in children:
        os.waitpid(pid, 0)
    children.clear()


def end_group(pid):
    """Kill a forked process, or what is left of it: all that it has started (and that made no session of its own)."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def stop(torchrun, patience=0.3):
    """End torchrun, a program's guard or a host, and all below it: they leave by themselves when the notebook's
    connection closes, and are killed where they have not after `patience` seconds."""
    if torchrun is None:
        return
    import psutil

    family, deadline = family_of(torchrun.pid), time.monotonic() + patience
    while torchrun.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if torchrun.poll() is None:
        family += family_of(torchrun.pid)  # and what it has started meanwhile
    torchrun.kill()  # first: then it starts nothing more
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()  # psutil checks that the number still belongs to the same process
    torchrun.wait()


def family_of(pid):
    """All processes below one, but for multiprocessing's resource trackers: each ends by itself after those that it
    serves, and takes their semaphores and shared memory along, which nobody else does."""
    import psutil

    try:
        return [p for p in psutil.Process(pid).children(recursive=True) if not _is_tracker(p)]
    except psutil.NoSuchProcess:
        return []


def _is_tracker(one):
    try:
        return any(_TRACKER in part for part in one.cmdline())
    except Exception:  # it has ended, or is not ours to look at
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
