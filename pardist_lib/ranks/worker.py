"""What torchrun starts, once for each rank: it imports only the standard library.

It tells the notebook what torchrun gave it (RANK, WORLD_SIZE, MASTER_ADDR, ...) and stays until the notebook is
done with it. The rank itself is forked from the host, which has imported torch for all of them (host.py).
With `--plain` (macOS, where forking after an import of torch is not safe) this process becomes the rank.
"""

import json
import os
import sys
from multiprocessing import connection


def main(folder, mode, generation):
    env = {k: v for k, v in os.environ.items() if k in _GIVEN or k.startswith("TORCHELASTIC_")}
    if mode == "--plain":
        with open(os.path.join(folder, "setup.json")) as file:
            sys.path[:] = json.load(file)["path"]
        from pardist_lib.ranks.rank import serve

        serve(folder, env, int(generation))
    with open(os.path.join(folder, "key"), "rb") as key:
        notebook = connection.Client(os.path.join(folder, "door"), family="AF_UNIX", authkey=key.read())
    notebook.send({"role": "worker", "rank": int(env["RANK"]), "pid": os.getpid(), "env": env})
    try:
        notebook.recv()  # nothing is ever sent: this ends when the notebook does
    except (EOFError, OSError):
        pass


_GIVEN = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip

if __name__ == "__main__":
    main(*sys.argv[1:])
