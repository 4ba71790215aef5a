"""Runs a program and takes it down, with everything it started, when the notebook goes away.

torchrun starts each worker in a session of its own, so killing torchrun's process group would leave them behind.
The notebook holds the other end of this process's standard input: its end is the sign.
"""

import os
import signal
import subprocess
import sys
import threading


def main(command):
    import psutil

    program = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    me = psutil.Process()

    def until_the_notebook_goes():
        os.read(0, 1)
        while family := me.children(recursive=True):  # a worker may be starting another process right now
            for process in family:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    pass
            psutil.wait_procs(family, 1)
        os._exit(1)

    threading.Thread(target=until_the_notebook_goes, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = program.wait()
    for process in me.children(recursive=True):
        process.kill()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main(sys.argv[1:])
