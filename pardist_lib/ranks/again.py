"""Which cell to run again: a restart of the kernel takes all names along, and the page goes on showing what they were.

Before the first cell has imported this package nothing of it can speak (`%%ranks` itself is unknown then); from there
on the notebook's file tells which cell sets a missing name.
"""

import ast
import json
import os
from pathlib import Path

ALL_ABOVE = "or all cells above this one (menu Run: Run All Above Selected Cell)"


def notebook_file():
    """The path of the notebook that runs here, None where Jupyter or VS Code has not told it."""
    shell = _shell()
    told = os.environ.get("JPY_SESSION_NAME") or shell and shell.user_ns.get("__vsc_ipynb_file__")
    return Path(told) if told and Path(told).is_file() else None


def cell_to_run(name, on_ranks=False):
    """A sentence about the first cell of the notebook's file that sets `name`; None where there is none, or one that
    does has run in this kernel. on_ranks: %%ranks cells, not the others."""
    shell, file = _shell(), notebook_file()
    if shell is None or file is None:
        return None
    try:
        cells = [c for c in json.loads(file.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    except (OSError, ValueError, KeyError):
        return None
    sources = ["".join(c["source"]).strip() for c in cells]
    setting = [s for s in sources if s.startswith("%%ranks") == on_ranks and name in names_set_in(_plain(s))]
    if not setting or {s.strip() for s in shell.user_ns.get("In", ())} & set(setting):
        return None
    line = next(line for line in _plain(setting[0]).splitlines() if line.strip())
    kind, run = ("%%ranks cell", "run it again") if on_ranks else ("cell", f"run it again, {ALL_ABOVE}")
    return (
        f"`{name}` is set in the {kind} that begins with `{line[:60]}`, which has not run since the kernel started "
        f"(a restart takes all names along): {run}"
    )


def names_set_in(source):
    """The names that a cell gives values to, those inside of its functions and classes left out."""
    try:
        nodes, names = [ast.parse(source)], set()
    except SyntaxError:
        return set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(name.asname or name.name).split(".")[0] for name in node.names}
        elif not isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            names |= {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
            nodes += ast.iter_child_nodes(node)
    return names


def _plain(source):
    """A cell without the lines that only a notebook understands."""
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))


def _shell():
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return get_ipython()
