"""%%ranks: a cell whose lines run on every rank."""

import linecache
import re

from .session import Ranks, newest


def ranks(line, cell):
    """%%ranks [--on 0,2]

    Run the cell on every rank of the newest Ranks (four are started where there are none), or on those named.
    Names stay on the ranks from one %%ranks cell to the next; `rank` and `world_size` are set. The value of a last
    expression is printed.
    """
    from IPython.core.error import UsageError  # shown as one line

    given = re.fullmatch(r"\s*(?:--on[ =]\s*(\d+(?:\s*,\s*\d+)*))?\s*", line)
    if not given:
        raise UsageError(f"%%ranks {line}: the only option is --on, with rank numbers: %%ranks --on 0,2")
    on = [int(r) for r in given[1].split(",")] if given[1] else None
    started = newest() or _started()
    source = "\n" + cell  # the line with %%ranks counts too
    started.run_cell(source, _named(source), on=on)


_kept = []  # the Ranks that a cell started by itself lives until the kernel ends


def _started():
    _kept[:] = [Ranks(4)]
    return _kept[0]


def _named(source):
    """A file name under which tracebacks find the cell's lines: In[7]."""
    from IPython import get_ipython

    name = f"In[{len(get_ipython().user_ns['In']) - 1}]"  # execution_count is one ahead in some versions
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    return name


def load():
    """Register the magic where there is a notebook."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    if shell := get_ipython():
        shell.register_magic_function(ranks, "cell", "ranks")
