"""The article's data-parallel program (claim C6), written anew as designed, and the smallest changes that make it
right, one file a step: `show` prints a step as the difference to the one before, `run` runs it as its own program.
"""

import difflib
import html
import os
import re
import subprocess
import sys
from pathlib import Path

from pardist_lib.ranks.output import Waiting

# `mp.spawn` starts Python anew in every process. Forked, they share one import of torch, and the rest is the same.
FORKED = """
import functools, runpy, sys, torch._dynamo, torch.multiprocessing as mp
mp.spawn = functools.partial(mp.start_processes, start_method="fork")
runpy.run_path(sys.argv[1], run_name="__main__")
"""
PROGRAMS = [Path(__file__).with_name(f"step{i}.py") for i in range(5)]


def show(step):
    """The program of a step, or what changed in it since the step before, new lines green and old ones red."""
    from IPython.display import HTML, Markdown

    text = PROGRAMS[step].read_text()
    if step == 0:
        return Markdown(f"```python\n{text}```")
    before = PROGRAMS[step - 1].read_text()
    lines = list(difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=1))[2:]
    lines = [line for line in lines if not line.startswith(" import torch.distributed.nn")]  # ours, and no change
    shades = {"+": "rgba(46,160,67,.25)", "-": "rgba(248,81,73,.25)"}  # let the notebook's own colours through
    rows = "".join(
        f'<div style="background:{shades.get(line[0], "none")}">{html.escape(line)}</div>'
        for line in ("…" if line.startswith("@@") else line or " " for line in lines)
    )
    return HTML(
        f'<pre style="background:none;color:inherit;line-height:1.35;white-space:pre;overflow-x:auto">{rows}</pre>'
    )


def run(step, seconds=300):
    """Run a step with `python`, as the article does (its processes forked, to save time), and print what its ranks
    said in rank order (they speak all at once), without the epochs in the middle; of a traceback only its last line.
    After `seconds` it is stopped."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    forked = [] if sys.platform == "darwin" else ["-c", FORKED]
    command = [sys.executable, *forked, str(PROGRAMS[step])]
    try:
        with Waiting() as waiting:
            waiting.say(f"python runs step {step}, in processes of its own …")
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(
            f"It did not end within {seconds:g} seconds, and was stopped: article.run({step}, seconds=…) waits longer."
        )
        return
    said = re.findall(r"rank \d+, .+?(?=rank \d+, |\n)", done.stdout)
    said = [line for line in said if not re.search(r"epoch [1-8],", line)]
    print("\n".join(sorted(said, key=lambda line: line.split(",")[0])), end="\n" if said else "")
    if done.returncode:
        print(next(line for line in reversed(done.stderr.splitlines()) if re.match(r"[\w.]*(Error|Exception)", line)))
