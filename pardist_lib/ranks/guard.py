"""Runs a program and takes it down, with everything it started and its folder, when the notebook goes away.

torchrun starts each worker in a session of its own, so killing torchrun's process group would leave them behind.
The notebook holds the other end of this process's standard input: its end is the sign.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading


def main(folder, *command):
    import psutil

    program = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    me, gone = psutil.Process(), threading.Event()

    def until_the_notebook_goes():
        os.read(0, 1)
        gone.set()
        while family := me.children(recursive=True):  # a worker may be starting another process right now
            for process in family:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    pass
            psutil.wait_procs(family, 1)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    watch = threading.Thread(target=until_the_notebook_goes, daemon=True)
    watch.start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = program.wait()
    if gone.is_set():
        watch.join()  # which ends this process
    for process in me.children(recursive=True):
        process.kill()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main(*sys.argv[1:])
