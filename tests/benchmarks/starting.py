"""Starting ranks, calling them, getting large results back, replacing them, their memory: against torchrun itself,
accelerate's notebook_launcher and ipyparallel's %%px."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch

from pardist_lib import RankError, Ranks

from .paired import interleave, paired_ratio

JOIN = """
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
dist.destroy_process_group()
"""
LAUNCHER = """
import sys, time
from accelerate import notebook_launcher
def nothing(): pass
for line in sys.stdin:
    began = time.perf_counter()
    notebook_launcher(nothing, num_processes=4)
    print("took", time.perf_counter() - began, flush=True)
"""


def rows(pairs=30):
    """One dict for each figure: name, ranks, median, low, high, unit, target."""
    return [*start(pairs), *calls(pairs), *large_results(pairs), replacement(pairs), *memory()]


def timed(fn, *args):
    began = time.perf_counter()
    fn(*args)
    return time.perf_counter() - began


def ratio(name, ranks, a_times, b_times, target):
    median, low, high = paired_ratio(a_times, b_times)
    return {"name": name, "ranks": ranks, "median": median, "low": low, "high": high, "unit": "×", "target": target}


def start(pairs):
    with tempfile.TemporaryDirectory() as folder:
        script = os.path.join(folder, "join.py")
        with open(script, "w") as file:
            file.write(JOIN)
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", script]

        def bare():
            return timed(lambda: subprocess.run(command, env=env, check=True, capture_output=True))

        def ours(n):
            with Ranks(n) as ranks:
                return ranks.start_seconds

        a, b = interleave(lambda: ours(4), bare, pairs)
        yield ratio(
            "first start of Ranks(4), everything imported / bare torchrun of a script that joins", 4, a, b, "≤ 0.6"
        )
        a, b = interleave(lambda: ours(8), lambda: ours(4), pairs)
        yield ratio("first start of Ranks(8) / of Ranks(4)", 8, a, b, "hardly above 1")


def calls(pairs):
    with Ranks(4) as ranks:
        ranks.run(int, quiet=True)

        def ours():
            return timed(ranks.run, int)

        alone = sorted(ours() for _ in range(200))
        yield {
            "name": "warm ranks.run of an empty function", "ranks": 4,
            "median": alone[100] * 1e3, "low": alone[5] * 1e3,
            "high": alone[194] * 1e3, "unit": "ms", "target": "≤ 5",
        }  # fmt: skip
        if importlib.util.find_spec("accelerate"):
            launcher = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

            def theirs():
                launcher.stdin.write("go\n")
                launcher.stdin.flush()
                while not (line := launcher.stdout.readline()).startswith("took"):
                    pass
                return float(line.split()[1])

            theirs()
            a, b = interleave(ours, theirs, pairs)
            launcher.kill()
            yield ratio("warm ranks.run / accelerate.notebook_launcher", 4, a, b, "≤ 0.05")
        if importlib.util.find_spec("ipyparallel"):
            import ipyparallel

            with ipyparallel.Cluster(n=4, log_level=40) as client:
                view = client[:]
                view.execute("pass", block=True)
                a, b = interleave(ours, lambda: timed(lambda: view.execute("pass", block=True)), pairs)
            yield ratio("warm ranks.run / ipyparallel's %%px", 4, a, b, "≤ 0.2")


def large_results(pairs):
    x = torch.randn(16 << 20)  # 64 MB
    for n in (1, 4):
        with Ranks(n) as ranks:
            ranks.run_cell("import torch; big = torch.randn(16 << 20)")
            ranks.pull("big")

            def ours(ranks=ranks):
                return timed(ranks.pull, "big")

            a, b = interleave(ours, lambda: timed(x.clone), pairs)
        yield ratio(f"getting a 64 MB tensor from each of {n} rank(s) / copying one", n, a, [n * t for t in b], "≤ 3")


def replacement(pairs):
    seconds = []
    with Ranks(4) as ranks:
        for _ in range(pairs):
            try:
                ranks.run(os.kill, os.getpid(), 0)
                pid = ranks.run(os.getpid)[1]
                os.kill(pid, signal.SIGKILL)
                ranks.run(int)
            except RankError:
                pass
            seconds.append(timed(ranks.run, int))
    seconds.sort()
    return {
        "name": "next run after a rank was killed", "ranks": 4, "median": seconds[pairs // 2], "low": seconds[0],
        "high": seconds[-1], "unit": "s", "target": "≤ 1",
    }  # fmt: skip


NOTEBOOK = """
import torch, torch.nn as nn, torch.distributed as dist
from pardist_lib import Ranks
ranks = Ranks({n})
def step():
    from torch.nn.parallel import DistributedDataParallel as DDP
    model = DDP(nn.Linear(64, 10))
    for _ in range(3):
        model(torch.randn(32, 64)).sum().backward()
ranks.run(step)
"""


def memory():
    """Proportional set size of real kernels and all they started, after a DDP step: of one, and of a class."""
    for n, target in ((4, "< 900"), (8, "< 1000")):
        _, pss = kernels(1, n)
        yield amount("memory (PSS) of kernel, torchrun, host and ranks", n, pss, pss, "MB", target)
    for many in (1, 6, 12):
        seconds, pss = kernels(many, 4)
        about = f"{many} such notebooks at once:"
        yield amount(f"{about} from the kernel's start to the step's end", 4, seconds[-1], seconds[0], "s")
        yield amount(f"{about} memory (PSS) of each", 4, pss, pss, "MB")


def amount(name, ranks, value, low, unit, target="stated"):
    return {"name": name, "ranks": ranks, "median": value, "low": low, "high": value, "unit": unit, "target": target}


def kernels(many, n):
    """(sorted seconds from the start of a kernel to the end of NOTEBOOK, MB of each) of so many at once."""
    from jupyter_client.manager import start_new_kernel

    def open_one(_):
        began = time.perf_counter()
        manager, client = start_new_kernel(startup_timeout=300)
        client.execute_interactive(NOTEBOOK.format(n=n), timeout=600, output_hook=lambda _: None)
        return time.perf_counter() - began, manager, client

    with ThreadPoolExecutor(many) as pool:
        opened = list(pool.map(open_one, range(many)))
    roots = [psutil.Process(manager.provisioner.pid) for _, manager, _ in opened]
    everything = [p for root in roots for p in [root, *root.children(recursive=True)]]
    pss = sum(p.memory_full_info().pss for p in everything) / 1e6
    for _, manager, client in opened:
        client.stop_channels()
        manager.shutdown_kernel()
    return sorted(seconds for seconds, *_ in opened), pss / many
