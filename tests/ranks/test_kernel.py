"""In a real Jupyter kernel: the magic, the stop button, restart, kill, two notebooks at once; nothing stays."""

import os
import signal
import time

import psutil
import pytest
from jupyter_client.manager import start_new_kernel


class Notebook:
    """A kernel, and what running a cell in it gives."""

    def __init__(self):
        self.manager, self.client = start_new_kernel(kernel_name="python3")

    def run(self, source, interrupt_after=None, timeout=90):
        """(all text the cell showed, the error as shown or '')"""
        said, errors = [], []

        def hook(message):
            content = message["content"]
            if message["msg_type"] == "stream":
                said.append(content["text"])
            elif message["msg_type"] in ("display_data", "execute_result", "update_display_data"):
                said.append(content["data"].get("text/plain", ""))
            elif message["msg_type"] == "error":
                errors.append("\n".join(content["traceback"]))

        if interrupt_after:
            import threading

            threading.Timer(interrupt_after, self.manager.interrupt_kernel).start()
        self.client.execute_interactive(source, output_hook=hook, timeout=timeout)
        return "\n".join(said), "\n".join(errors)

    def family(self):
        """Everything this notebook started: its ranks, their host, torchrun and its workers."""
        return psutil.Process(self.manager.provisioner.pid).children(recursive=True)

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def notebook():
    notebook = Notebook()
    yield notebook
    notebook.close()


def plain(text):
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def gone(family, within):
    _, alive = psutil.wait_procs(family, timeout=within)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


START = "from pardist_lib import Ranks\nranks = Ranks(4, timeout=4)"


def test_cells_magic_names_and_errors(notebook):
    said, errors = notebook.run("import pardist_lib")
    assert not errors
    said, errors = notebook.run("%%ranks\nx = rank * 10\nx + 1")  # four are started where there are none
    assert not errors and [line for line in plain(said).splitlines()] == [
        "rank 0 │ 1", "rank 1 │ 11", "rank 2 │ 21", "rank 3 │ 31",
    ]  # fmt: skip
    said, errors = notebook.run("%%ranks --on 0,2\nx")
    assert plain(said).split("\n") == ["rank 0 │ 0", "rank 2 │ 20"]
    said, errors = notebook.run("%%ranks\nprint('same')")
    assert plain(said) == "ranks 0–3 │ same"
    said, errors = notebook.run("import pardist_lib.ranks as r; ranks = r.newest(); ranks.push(y=5); ranks.pull('y')")
    assert "[5, 5, 5, 5]" in said

    said, errors = notebook.run("%%ranks\nz = 1\nif rank == 1:\n    boom()\n")
    assert "rank 1 raised NameError: name 'boom' is not defined" in plain(errors)
    assert "In[6], line 4" in plain(errors) and "boom()" in errors and len(errors.splitlines()) < 15

    notebook.run("in_the_notebook = 3")
    said, errors = notebook.run("%%ranks\nin_the_notebook")
    assert "ranks.push(in_the_notebook=in_the_notebook)" in errors

    said, errors = notebook.run("%%ranks\nif rank:\n  x ==== 1")
    assert "SyntaxError" in errors and "In[9], line 3" in plain(errors)
    for option in ("--only 3", "0,1", "--on", "--on x"):
        said, errors = notebook.run(f"%%ranks {option}\nx")
        assert plain(errors).strip() == "", errors  # a UsageError: one line, no traceback
        assert said.strip().endswith(f"%%ranks {option}: the only option is --on, with rank numbers: %%ranks --on 0,2")
    said, errors = notebook.run("%%ranks --on 7\nx")
    assert "there is no rank 7" in errors


def test_modules_of_the_notebook_are_not_on_the_ranks(notebook):
    notebook.run(START + "\nimport torch.distributed as dist, math")
    said, errors = notebook.run("%%ranks\ndist.get_rank()")
    assert "import torch.distributed as dist in the %%ranks cell" in plain(errors)
    said, errors = notebook.run("%%ranks\nmath.pi")
    assert "not on the ranks: import math in the %%ranks cell" in plain(errors)


def test_functions_of_cells_and_their_lines(notebook):
    notebook.run(START)
    notebook.run("def helper(x):\n    return x / 0\n")
    source = (
        "import torch.distributed as dist\ndef fn():\n    if dist.get_rank() == 3:\n        helper(1)\nranks.run(fn)"
    )
    said, errors = notebook.run(source)
    shown = plain(errors)
    assert "rank 3 raised ZeroDivisionError: division by zero" in shown
    assert "In[2], line 2, in helper" in shown and "In[3], line 4, in fn" in shown and "ipykernel" not in shown
    notebook.run("def helper(x):\n    return x + 1\n")  # a cell edited and run again
    said, errors = notebook.run("def fn():\n    return helper(dist.get_rank())\nranks.run(fn)")
    assert "[1, 2, 3, 4]" in said


def test_classes_of_cells_keep_their_identity(notebook):
    notebook.run(START)
    said, errors = notebook.run(
        "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int\n"
        "def fn():\n    return Point(1)\nall(isinstance(p, Point) for p in ranks.run(fn))"
    )
    assert "True" in said, errors


def test_the_stop_button(notebook):
    notebook.run(START)
    began = time.monotonic()
    said, errors = notebook.run("%%ranks\nimport time\ntime.sleep(60)", interrupt_after=1)
    assert time.monotonic() - began < 20  # and not 60; how fast it is, test_faults says
    assert "Interrupted" in errors and "time.sleep(60)" in errors
    said, errors = notebook.run("%%ranks\nrank")
    assert not errors and "rank 3 │ 3" in plain(said)


def test_running_the_cell_again_does_not_pile_up_processes(notebook):
    notebook.run(START)
    before = len(notebook.family())
    notebook.run("first = ranks\n" + START)
    notebook.run(START)
    assert len(notebook.family()) == before
    said, errors = notebook.run("first.run(print)")
    assert "these ranks are closed, because a newer Ranks(4) was made: make new ones" in plain(errors)


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_nothing_stays_when_the_kernel_goes(notebook, how):
    notebook.run(START)
    said, _ = notebook.run("ranks._link.folder")
    folder = said.strip().strip("'")
    assert os.path.isdir(folder)
    family = notebook.family()
    assert len(family) >= 10  # host, torchrun, four workers, four ranks
    notebook.client.execute("ranks.run(lambda: __import__('time').sleep(60))")  # in the middle of a call
    time.sleep(1)
    if how == "restart":
        notebook.manager.restart_kernel(now=True)
    else:
        os.kill(notebook.manager.provisioner.pid, signal.SIGKILL)
    assert gone(family, within=15)
    assert not os.path.exists(folder)


def test_a_program_goes_with_its_kernel(notebook, tmp_path):
    (tmp_path / "forever.py").write_text("import time\nwhile True: print('on', flush=True); time.sleep(0.2)\n")
    notebook.client.execute(f"import pardist_lib\npardist_lib.torchrun({str(tmp_path / 'forever.py')!r}, nproc=2)")
    deadline = time.monotonic() + 30
    while len(notebook.family()) < 6 and time.monotonic() < deadline:
        time.sleep(0.2)
    family = notebook.family()
    assert len(family) >= 6  # guard, torchrun, two workers, two ranks
    folder = next(p.cmdline()[2] for p in family if p.cmdline()[1].endswith("guard.py"))
    assert os.path.isdir(folder)
    os.kill(notebook.manager.provisioner.pid, signal.SIGKILL)
    assert gone(family, within=15)
    assert not os.path.exists(folder)


def test_two_notebooks_at_once():
    first, second = Notebook(), Notebook()
    try:
        for notebook in (first, second):
            notebook.run(START)
        for notebook, x in ((first, 1), (second, 2)):
            notebook.run(f"ranks.push(x={x})")
        for notebook, x in ((first, 1), (second, 2)):
            said, errors = notebook.run("ranks.pull('x')")
            assert f"[{x}, {x}, {x}, {x}]" in said, errors
        os.kill(first.manager.provisioner.pid, signal.SIGKILL)
        time.sleep(0.5)
        said, errors = second.run("ranks.pull('x')")
        assert "[2, 2, 2, 2]" in said, errors
    finally:
        first.close()
        second.close()


def test_cells_run_on_the_variable_ranks_and_say_so_where_there_are_several(notebook):
    notebook.run("from pardist_lib import Ranks\nranks = Ranks(2)")
    assert "(on" not in notebook.run("%%ranks\nworld_size")[0]
    notebook.run("more = Ranks(3)")
    said, _ = notebook.run("%%ranks\nworld_size")
    assert "(on `ranks`, Ranks(2); open besides: Ranks(3))" in said and "│ 2" in plain(said)
    notebook.run("ranks.close()")
    said, _ = notebook.run("%%ranks\nworld_size")
    assert "(on Ranks(3), made last: the variable `ranks` holds one that is closed)" in said and "│ 3" in plain(said)


def test_an_interrupted_start_leaves_things_as_they_were(notebook):
    notebook.run("from pardist_lib import Ranks")
    _, error = notebook.run("ranks = Ranks(2)", interrupt_after=0.7)
    assert (
        plain(error)
        == "Interrupted: Ranks(2) was still starting; nothing of it is left. Run the cell again to have ranks."
    )
    assert gone(notebook.family(), within=5)
    notebook.run("ranks = Ranks(2)")
    _, error = notebook.run("ranks = Ranks(2)", interrupt_after=0.7)
    assert plain(error).endswith("nothing of it is left. Ranks(2), made before, is still there.")
    assert notebook.run("print(ranks.run(lambda: 7))") == ("[7, 7]\n", "")
    assert "│ 2" in plain(notebook.run("%%ranks\nworld_size")[0])


def test_sets_that_no_variable_holds_are_closed(notebook):
    notebook.run("from pardist_lib import Ranks\nfrom pardist_lib.ranks.session import open_ones")
    notebook.run("Ranks(1)")  # only the notebook's own memory of outputs holds it
    assert notebook.run("print([r.n for r in open_ones()])")[0] == "[1]\n"
    notebook.run("ranks = Ranks(2)\nkept = [Ranks(3)]")
    assert notebook.run("print([r.n for r in open_ones()])")[0] == "[2, 3]\n"
    notebook.run("ranks = Ranks(4)")  # its name is taken over
    assert notebook.run("print([r.n for r in open_ones()])")[0] == "[3, 4]\n"


def test_a_function_for_ranks_that_was_called_in_the_notebook(notebook):
    notebook.run("import torch, torch.distributed as dist\nfrom pardist_lib import Ranks\nranks = Ranks(2)")
    notebook.run("def first_sum():\n    t = torch.ones(1)\n    dist.all_reduce(t)\n    return t")
    for call in ("first_sum()", "ranks.run(first_sum())"):
        said, error = notebook.run(call)
        assert "Default process group has not been initialized" in plain(error)
        assert "`first_sum` was called here, in the notebook, which is no rank: write ranks.run(first_sum)" in said
    assert "begin the cell with %%ranks" in notebook.run("dist.get_rank()")[0]


def test_a_line_stands_there_while_ranks_start(notebook):
    live = "import os\nos.environ['PARDIST_LIVE'] = '1'\n"
    said, error = notebook.run(f"{live}from pardist_lib import Ranks\nranks = Ranks(2)\nprint('there')")
    assert not error and said.index("2 ranks are starting …") < said.index("there")
    assert said.endswith("there\n") and said.splitlines()[-2] == ""  # the line has gone
