"""After a restart of the kernel: which cell to run again."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from pardist_lib.ranks.again import names_set_in
from tests.ranks.test_kernel import Notebook, plain

CELLS = [
    "import pardist_lib",
    "%matplotlib inline\nfrom pardist_lib import Ranks as R\nranks = R(2)",
    "%%ranks\nx = [rank] * 3\nimport torch.distributed as dist",
    "import math as m\n\ndef first_sum(t):\n    only_inside = t\n    return m.fsum(t)",
    "for step in range(2):\n    loss, (a, *b) = step, (1, 2)",
]


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """A kernel as Jupyter's server starts it for a notebook that has these cells."""
    file = tmp_path / "01_lesson.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("words"), *map(new_code_cell, CELLS)]), file)
    monkeypatch.setenv("JPY_SESSION_NAME", str(file))
    notebook = Notebook()
    yield notebook
    notebook.close()


def test_names_of_cells_that_have_not_run_since_the_restart(notebook):
    assert "UsageError: Cell magic `%%ranks` not found" in notebook.run(CELLS[2])[0]  # nothing of ours is there yet
    notebook.run(CELLS[0])
    for cell, line, names in [
        (1, "from pardist_lib import Ranks as R", ["ranks", "R"]),
        (3, "import math as m", ["first_sum", "m"]),
        (4, "for step in range(2):", ["loss", "step", "b"]),
    ]:
        for name in names:
            said, error = notebook.run(name)
            assert f"name '{name}' is not defined" in plain(error)
            assert f"`{name}` is set in the cell that begins with `{line}`, which has not run since the kernel" in said
            assert "Run All Above Selected Cell" in said
        notebook.run(CELLS[cell])
    for mistyped in ("rnaks", "only_inside", "del loss\nloss"):  # no cell sets it, or one that has run
        said, error = notebook.run(mistyped)
        assert "NameError" in plain(error) and "run it again" not in said
    _, error = notebook.run("%%ranks\nx")
    assert "`x` is set in the %%ranks cell that begins with `x = [rank] * 3`, which has not run since" in plain(error)
    notebook.run(CELLS[2])
    assert not notebook.run("%%ranks\nx, dist")[1]
    assert "run it again" not in plain(notebook.run("%%ranks\ny")[1])


def test_without_the_notebooks_file(notebook):
    notebook.run("import os, pardist_lib\nos.environ.pop('JPY_SESSION_NAME')")
    assert (
        "`ranks` is not set in this kernel: run the cell that sets it, or all cells above" in notebook.run("ranks")[0]
    )
    assert "run" not in notebook.run("loss")[0]


def test_exercises_without_a_name(notebook):
    notebook.run("from pardist_lib.lessons.exercises import check, hint, solution")
    for call in ("hint()", "solution()", "check()"):
        said, error = notebook.run(call)
        assert not error and "Which exercise?" in said and "this lesson has" in said
        assert "'exchange'" in said and "'shard_rows'" not in said  # lesson 00's
    notebook.run("import os\nos.environ.pop('JPY_SESSION_NAME')")
    assert "there are 'shard_rows'" in notebook.run("hint()")[0]


def test_names_that_a_cell_sets():
    assert names_set_in("a = b.c = 1\nwith f() as (g, h): i: int = 2") == {"a", "g", "h", "i"}
    assert names_set_in("async def f(): x = 1\nclass C: y = 2\nz = [q for q in a]\n(w := 3)") == {"f", "C", "z", "w"}
    assert names_set_in("import a.b, c as d\nfrom e import f as g") == {"a", "d", "g"} and names_set_in("1 +") == set()
