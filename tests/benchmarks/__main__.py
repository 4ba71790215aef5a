"""python -m tests.benchmarks [PAIRS] [NAME …]: every comparison in one run, as one table in RESULTS.md. With names
(`sharded`, …) only those files' rows are taken anew; the others stay as they were.

python -m tests.benchmarks.between OLD_TREE [PAIRS]: another checkout of the repository against this one.
"""

import os
import platform
import re
import sys
from datetime import date
from importlib import import_module
from pathlib import Path

import torch

FILES = (
    "starting", "collectives", "tracing", "tensor_parallel", "overlapping", "data_parallel", "sharded", "pipeline",
    "context_parallel", "predicting",
)  # fmt: skip
RESULTS = Path(__file__).with_name("RESULTS.md")
HEAD = "| what | ranks | median | low | high | target |\n|---|---|---|---|---|---|\n"


def main(pairs, names):
    for name in names:
        rows = []
        for row in import_module(f"tests.benchmarks.{name}").rows(pairs):
            rows.append(line(row))
            print(rows[-1], end="", flush=True)
        if rows:
            keep(name, f"{date.today()}, {pairs} interleaved pairs\n\n{HEAD}{''.join(rows)}")


def line(row):
    row = {"unit": "×"} | row
    numbers = " | ".join(f"{row[k]:.3g} {row['unit']}" for k in ("median", "low", "high"))
    return f"| {row['name']} | {row['ranks']} | {numbers} | {row['target']} |\n"


def keep(name, table):
    """Put a file's table into RESULTS.md, beside those of the others."""
    text = RESULTS.read_text() if RESULTS.exists() else ""
    tables = dict(re.findall(r"^## (\w+)\n\n(.*?)(?=\n## |\Z)", text, re.S | re.M)) | {name: table}
    parts = [
        "# Benchmarks\n\nA ratio is the median of the pairs' ratios with its 95 % bootstrap interval; absolute times "
        f"say little on a shared machine. {platform.system()}, {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}.\n"
    ]
    parts += [f"## {file}\n\n{tables[file].rstrip()}\n" for file in (*FILES, "between", "whole") if file in tables]
    RESULTS.write_text("\n".join(parts))


if __name__ == "__main__":
    numbers = [int(a) for a in sys.argv[1:] if a.isdigit()]
    named = [a for a in sys.argv[1:] if not a.isdigit()]
    if unknown := set(named) - set(FILES):
        sys.exit(f"there is no benchmark {', '.join(unknown)}: there are {', '.join(FILES)}")
    main(numbers[0] if numbers else 30, named or FILES)
