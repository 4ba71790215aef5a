"""python -m tests.benchmarks.between OLD_TREE [PAIRS]: this checkout of the repository against an older one, OLD_TREE.

Each tree has a driver, a process of its own with its own warm ranks, which waits until it is told to do one measured
thing. So only one of the two works at any moment, both meet the same spells of the machine, and the order within a
pair alternates. The table goes to RESULTS.md.
"""

import json
import os
import select
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

NEW = Path(__file__).parents[2]
STEPS = {
    "DataParallel": "step of a 16 MB model",
    "stage 3": "step of a 16 MB model",
    "ZeRO-1": "step of a 16 MB model",
    "block": "step of a tensor-parallel transformer block, hidden 512",
}
PATIENCE = 300  # seconds for one answer


# ---- both trees, turn about -----------------------------------------------------------------------------------


def main(old, pairs):
    from .__main__ import HEAD, keep, line

    title = f"{date.today()}, {commit(NEW)} (new) / {commit(old)} (old), {pairs} interleaved pairs"
    lines = []
    with Driver(NEW) as a, Driver(old) as b:
        for row in rows(a, b, pairs):
            lines.append(line(row))
            print(lines[-1], end="", flush=True)
    keep("between", f"{title}\n\n{HEAD}{''.join(lines)}")


def rows(new, old, pairs):
    """One dict for each figure: name, ranks, median, low, high, unit, target. new, old: `Driver`s."""
    both = new, old
    for n in (2, 4):
        for driver in both:
            driver.tell("open", n)
        for kind, what in STEPS.items():
            for driver in both:
                driver.tell("prepare", kind)
            yield compared(f"{kind}, {what}", n, new, old, "step", pairs)
        yield compared("ten warm ranks.run of a small function", n, new, old, "call", pairs)
        yield compared("ranks.trace of a hundred all_reduces", n, new, old, "trace", pairs)
        for driver in both:
            driver.tell("close")
    yield compared("start of Ranks(4)", 4, new, old, "start", pairs)


def compared(name, n, new, old, command, pairs):
    from .paired import interleave, paired_ratio

    a, b = interleave(lambda: new.tell(command), lambda: old.tell(command), pairs)
    median, low, high = paired_ratio(a, b)
    name = f"{name}, new / old ({sorted(b)[len(b) // 2] * 1e3:.0f} ms)"
    return {"name": name, "ranks": n, "median": median, "low": low, "high": high, "target": "interval reaches 1.0"}


class Driver:
    """This file, run by its path with another tree's pardist_lib; ended by the end of its input."""

    def __init__(self, tree):
        self.tree = Path(tree).resolve()
        env = os.environ | {"PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", __file__, "drive", str(self.tree)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=self.tree, env=env, **pipes)

    def tell(self, *command):
        """What the driver answers to a command: seconds, or None."""
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            raise TimeoutError(f"{self.tree}: no answer to {command} within {PATIENCE} s")
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"{self.tree}: the driver ended at {command}; its error is above")
        return json.loads(answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its ranks end with it


def commit(tree):
    """The short hash of what is checked out there, with "-dirty" where files differ from it."""
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "no commit"


# ---- in one tree ----------------------------------------------------------------------------------------------


def drive(tree):
    """Do what the lines of the standard input say, one after the other, and answer each with a line of JSON."""
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the ranks shall neither read commands …
    os.dup2(2, 1)  # … nor print among the answers

    import pardist_lib
    from pardist_lib import Ranks

    assert Path(pardist_lib.__file__).is_relative_to(tree), f"{pardist_lib.__file__} is not of {tree}"
    ranks = None
    try:
        for line in commands:
            what, *values = json.loads(line)
            seconds = None
            if what == "open":
                ranks = Ranks(values[0])
            elif what == "prepare":
                ranks.run(prepare, values[0], quiet=True)
            elif what == "step":
                seconds = max(ranks.run(step, quiet=True))
            elif what == "call":
                began = time.perf_counter()
                for _ in range(10):
                    ranks.run(int, quiet=True)
                seconds = time.perf_counter() - began
            elif what == "trace":
                began = time.perf_counter()
                ranks.trace(hundred_sums)
                seconds = time.perf_counter() - began
            elif what == "start":
                with Ranks(4) as started:
                    seconds = started.start_seconds
            elif what == "close":
                ranks.close()
            print(json.dumps(seconds), file=answers, flush=True)
    finally:
        if ranks is not None:
            ranks.close()


def prepare(kind):
    """On a rank: keep a function that does one training step, warm."""
    import __main__

    __main__.one_step = make_step(kind)
    for _ in range(2):
        __main__.one_step()


def step():
    """On a rank: the seconds of a step, from barrier to barrier."""
    import torch.distributed as dist

    import __main__

    dist.barrier()
    began = time.perf_counter()
    __main__.one_step()
    dist.barrier()
    return time.perf_counter() - began


def hundred_sums():
    import torch
    import torch.distributed as dist

    for _ in range(100):
        dist.all_reduce(torch.ones(10))


def make_step(kind):
    import torch
    from torch import nn

    torch.manual_seed(0)
    x = torch.randn(4, 64, 512) if kind == "block" else torch.randn(64, 1024)
    if kind == "block":
        try:
            from pardist_lib.mechanisms.tensor_parallel import ParallelTransformerBlock, TransformerBlock
        except ImportError:  # where it was before each kind of parallelism had a folder
            from pardist_lib.mechanisms.parallel_transformer import ParallelTransformerBlock, TransformerBlock
        model = ParallelTransformerBlock.from_module(TransformerBlock(512, 8))
    else:
        layers = [m for _ in range(4) for m in (nn.Linear(1024, 1024, bias=False), nn.ReLU())]
        model = nn.Sequential(*layers)
    if kind == "DataParallel":
        from pardist_lib.mechanisms.data_parallel import DataParallel

        model = DataParallel(model)
    elif kind == "stage 3":
        from pardist_lib.mechanisms.sharded import ShardedDataParallel

        model = ShardedDataParallel(model, 3)
    if kind == "ZeRO-1":
        from pardist_lib.mechanisms.sharded import ShardedOptimizer

        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW)
    else:
        optimizer = torch.optim.AdamW(model.parameters())

    def one_step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return one_step


if __name__ == "__main__":
    if sys.argv[1:2] == ["drive"]:
        drive(sys.argv[2])
    elif len(sys.argv) < 2 or not (Path(sys.argv[1]) / "pardist_lib").is_dir():
        sys.exit(__doc__)
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 30)
