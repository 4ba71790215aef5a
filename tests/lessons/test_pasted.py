"""No function of a lesson's cells is, pasted, the answer to one of its exercises."""

import ast
import inspect
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from pardist_lib.lessons.exercises import reader

pytestmark = pytest.mark.usefixtures("ranks", "answers_folder")
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def functions_of(lesson):
    """The functions that a lesson's cells define, but for the blanks."""
    notebook = nbformat.read(next(NOTEBOOKS.glob(f"{lesson}_*.ipynb")), 4)
    names = {"__name__": f"cells_of_{lesson}"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for node in ast.parse(TransformerManager().transform_cell(cell.source)).body:
                if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
                    with suppress(Exception):  # a default may be a name of another cell
                        exec(compile(ast.Module([node], []), f"<cell of {lesson}>", "exec"), names)
    found = {n: f for n, f in names.items() if inspect.isfunction(f) and f.__module__ == names["__name__"]}
    return {n: f for n, f in found.items() if n not in reader.exercises()}


def takes(function):
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)


@pytest.mark.parametrize("lesson", sorted(set(reader.exercises().values())))
def test_a_cell_is_no_answer(lesson):
    passed = []
    for exercise in [name for name, where in reader.exercises().items() if where == lesson]:
        for name, function in functions_of(lesson).items():
            if takes(function) == takes(reader.reference(exercise)):
                if reader.check(exercise, function).passed:
                    passed.append(f"{name} passes as {exercise}")
    assert not passed, passed
