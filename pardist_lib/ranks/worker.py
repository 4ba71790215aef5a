"""What torchrun starts, once for each rank: it imports only the standard library.

It tells the notebook what torchrun gave it (RANK, WORLD_SIZE, MASTER_ADDR, ...) and stays until the notebook is
done with it. The rank itself is forked from the host, which has imported torch for all of them (host.py).
With `--plain` (macOS, where forking after an import of torch is not safe) this process becomes the rank.

With `--program` it stands for a rank of a whole program, which guard.py forks: it passes on signals and ends as the
rank ends.
"""

import json
import os
import resource
import signal
import sys
from multiprocessing import connection, reduction


def main(folder, mode, *more):
    if mode == "--program":
        return stand_in(folder, more)
    (generation,) = more
    env = {k: v for k, v in os.environ.items() if k in GIVEN or k.startswith("TORCHELASTIC_")}
    if mode == "--plain":
        with open(os.path.join(folder, "setup.json")) as file:
            sys.path[:] = json.load(file)["path"]
        from pardist_lib.ranks.rank import serve

        serve(folder, env, int(generation))
    notebook = _call_in(folder)
    notebook.send({"role": "worker", "rank": int(env["RANK"]), "pid": os.getpid(), "env": env})
    try:
        notebook.recv()  # nothing is ever sent: this ends when the notebook does
    except (EOFError, OSError):
        pass


def stand_in(folder, program):
    """Have the guard fork the program with this process's environment, folder and output."""
    guard = _call_in(folder)
    guard.send({"program": program, "env": dict(os.environ), "folder": os.getcwd()})
    for fd in (1, 2):
        reduction.send_handle(guard, fd, None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: guard.send(number))
    code = guard.recv()
    if code < 0:  # a signal ended it: let the same one end this process, but one core dump is enough
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _call_in(folder):
    """As transport.call_in, with nothing but the standard library."""
    with open(os.path.join(folder, "key"), "rb") as key:
        return connection.Client(os.path.join(folder, "door"), family="AF_UNIX", authkey=key.read())


GIVEN = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip

if __name__ == "__main__":
    main(*sys.argv[1:])
