"""%%ranks: a cell whose lines run on every rank."""

import linecache
import re
import traceback

from .again import ALL_ABOVE, cell_to_run, notebook_file
from .ledger import is_readers
from .session import Ranks, close_forgotten, newest, open_ones


def ranks(line, cell):
    """%%ranks [--on 0,2]

    Run the cell on every rank of the notebook's variable `ranks` where there is one, else of the newest Ranks (four
    are started where there are none), or on those named. Where several are open, the first line says which it was.
    Names stay on the ranks from one %%ranks cell to the next; `rank` and `world_size` are set. The value of a last
    expression is printed.
    """
    from IPython.core.error import UsageError  # shown as one line

    given = re.fullmatch(r"\s*(?:--on[ =]\s*(\d+(?:\s*,\s*\d+)*))?\s*", line)
    if not given:
        raise UsageError(f"%%ranks {line}: the only option is --on, with rank numbers: %%ranks --on 0,2")
    on = [int(r) for r in given[1].split(",")] if given[1] else None
    where, doubt = _meant()
    source = "\n" + cell  # the line with %%ranks counts too
    if doubt:
        print(doubt)
    where.run_cell(source, _named(source), on=on)


def _meant():
    """(the Ranks that a reader takes a cell to run on, a line to say which where that could be in doubt)."""
    from IPython import get_ipython

    mine, others = get_ipython().user_ns.get("ranks"), open_ones()
    if isinstance(mine, Ranks) and mine.state != "closed":
        rest = ", ".join(f"Ranks({r.n})" for r in others if r is not mine)
        return mine, f"(on `ranks`, Ranks({mine.n}); open besides: {rest})" if rest else ""
    where = newest() or _started()
    if isinstance(mine, Ranks):
        return where, f"(on Ranks({where.n}), made last: the variable `ranks` holds one that is closed)"
    return where, f"(on Ranks({where.n}), made last of {len(others)} that are open)" if len(others) > 1 else ""


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


def after_cell(result):
    """Once a cell has run: end the sets that it has let go, and say what a rank's own error means in the notebook, and
    which cell sets a name that is not there."""
    close_forgotten()
    if said := _not_a_rank(result.error_in_exec) or _not_set(result.error_in_exec):
        print(said)


def _not_set(error):
    """A hint where a name is missing because its cell has not run since the kernel started, else None."""
    from IPython import get_ipython

    if not isinstance(error, NameError) or not error.name or error.name in get_ipython().user_ns:
        return None
    if error.name in ("ranks", "Ranks") and not notebook_file():
        return f"`{error.name}` is not set in this kernel: run the cell that sets it, {ALL_ABOVE}"
    return cell_to_run(error.name)


def _not_a_rank(error):
    """A hint where a function for ranks was called in the notebook, else None."""
    if error is None or "Default process group has not been initialized" not in str(error):
        return None
    called = [f.name for f in traceback.extract_tb(error.__traceback__) if is_readers(f.filename)]
    name = next((name for name in called if name != "<module>"), None)
    if name is None:
        return "This ran here, in the notebook, which is no rank: begin the cell with %%ranks"
    return f"`{name}` was called here, in the notebook, which is no rank: write ranks.run({name}), without calling it"


def load():
    """Register the magic where there is a notebook."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    if shell := get_ipython():
        shell.register_magic_function(ranks, "cell", "ranks")
        shell.events.register("post_run_cell", after_cell)
