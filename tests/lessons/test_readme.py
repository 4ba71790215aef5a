"""The exercise in the README of the lessons works: written into a copy of the library, it passes its tests."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "pardist_lib/lessons/README.md").read_text()
FILES = dict(re.findall(r"^`([\w/.]+)`: .*?\n\n```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
NOTEBOOK, BANK = "notebooks/42_largest.ipynb", "tests/lessons/lesson42/largest.py"
[COMMAND] = re.findall(r"^```sh\n(.*?)\n```", TEXT, re.MULTILINE | re.DOTALL)

THREE_MORE = """

@mistake("largest", "nothing arrived in the result")
def reduces_a_copy(tensor, group=None):
    dist.all_reduce(tensor.clone(), dist.ReduceOp.MAX, group=group)
    return tensor


@mistake("largest", "`tensor` was changed")
def writes_into_its_input(tensor, group=None):
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return tensor


@mistake("largest", "`group` is missing")
def over_all_ranks(tensor, group=None):
    result = tensor.clone()
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return result
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Python in a folder with the library, the tests of the lessons, and the README's files."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "pardist_lib", folder / "pardist_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests/lessons", folder / "tests/lessons", ignore=shutil.ignore_patterns("lesson[0-9]*"))
    for name in ("tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + THREE_MORE * (name == BANK))
    (folder / NOTEBOOK).unlink()  # a cell is no notebook

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(folder), "PARDIST_ANSWERS": str(folder / "answers")}
        return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)

    return run


def test_its_bank_and_its_blank_pass_their_tests(python):
    assert len(FILES) == 5 and BANK in FILES
    first, *rest = shlex.split(COMMAND)
    done = python(*rest, "-vv", "-p", "no:cacheprovider")
    assert first == "python" and done.returncode == 0, done.stdout + done.stderr
    passed = re.findall(r"::(\w+)\[(?:\w+-)?largest[\w-]*\] PASSED", done.stdout)
    assert passed.count("test_a_planted_mistake_is_refused_with_its_own_diagnosis") == 4, done.stdout
    assert {
        "test_the_reference_passes_when_a_reader_writes_it", "test_other_ways_pass_too",
        "test_each_exercise_has_hints_and_a_bank_of_mistakes", "test_a_blank_is_not_tried_yet_and_needs_no_ranks",
        "test_a_blank_is_signature_and_docstring_only",
    } <= set(passed)  # fmt: skip


def test_its_notebook_has_the_blank(python):
    cell = FILES[NOTEBOOK]
    asks = f"from pardist_lib.lessons.exercises.reader import blank\nassert blank('largest').strip() in {cell!r}\n"
    asks += "import torch\nfrom pardist_lib.lessons.exercises import check\n"
    done = python("-c", asks + cell.replace('check("largest", largest)', 'print(check("largest", largest))'))
    assert "○ largest: not tried yet" in done.stdout, done.stderr


def test_every_line_of_it_fits_a_screen():
    assert max(map(len, TEXT.splitlines())) <= 120 and len(TEXT.splitlines()) <= 125
