"""python -m tests.benchmarks [PAIRS]: every comparison in one run, as one table in RESULTS.md."""

import platform
import sys
from datetime import date
from pathlib import Path

import torch

from . import collectives, data_parallel, sharded, starting, tensor_parallel, tracing


def main(pairs):
    lines = [
        f"# Benchmarks\n\n{date.today()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {pairs} interleaved pairs. A ratio is the median of the pairs' ratios with its 95 % "
        "bootstrap interval; absolute times say little on a shared machine.\n",
        "| what | ranks | median | low | high | target |",
        "|---|---|---|---|---|---|",
    ]
    for bench in (starting, collectives, tracing, tensor_parallel, data_parallel, sharded):
        for row in bench.rows(pairs):
            row = {"unit": "×"} | row
            numbers = " | ".join(f"{row[k]:.3g} {row['unit']}" for k in ("median", "low", "high"))
            lines.append(f"| {row['name']} | {row['ranks']} | {numbers} | {row['target']} |")
            print(lines[-1], flush=True)
    Path(__file__).with_name("RESULTS.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
