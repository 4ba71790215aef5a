"""The reader's files: nothing is ever lost."""

import json
import multiprocessing
import os
import stat

import pytest

from pardist_lib.lessons.exercises import answers

GOOD, BAD, WORSE = "def f():\n    return 1\n", "def f():\n    return 2\n", "def f():\n    return 3\n"


@pytest.fixture(autouse=True)
def folder(answers_folder):
    return answers_folder


def history(folder, name="f"):
    return [p.read_text() for p in sorted(folder.joinpath("history").glob(f"{name}.*.py"))]


def test_the_newest_answer_is_kept_until_one_passes(folder):
    for text in (BAD, WORSE):
        answers.save("f", text, False)
        assert (folder / "f.py").read_text() == text and answers.status("f") == "failed"
    answers.save("f", GOOD, True)
    assert (folder / "f.py").read_text() == GOOD and answers.status("f") == "passed"
    assert history(folder) == [BAD, WORSE, GOOD]


def test_a_passing_answer_outlives_a_later_failing_one(folder):
    answers.save("f", GOOD, True)
    answers.save("f", BAD, False)
    answers.save("f", WORSE, None)
    assert (folder / "f.py").read_text() == GOOD and answers.status("f") == "passed"
    assert history(folder) == [GOOD, BAD, WORSE]


def test_a_kept_answer_that_fails_later_is_no_longer_passed(folder):
    answers.save("f", GOOD, True)
    answers.save("f", GOOD, False)  # the course's check has become stricter
    assert answers.status("f") == "failed" and history(folder) == [GOOD]


def test_an_edit_by_hand_is_kept_and_not_believed(folder):
    answers.save("f", GOOD, True)
    (folder / "f.py").write_text(WORSE)
    assert answers.status("f") == "saved, not checked"
    answers.save("f", BAD, False)
    assert (folder / "f.py").read_text() == WORSE
    answers.save("f", GOOD, True)
    assert (folder / "f.py").read_text() == GOOD and set(history(folder)) == {GOOD, WORSE, BAD}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"f": 3}', '{"f": {"status": "won", "text": ""}}', "\0\0"])
def test_a_damaged_progress_file_is_put_aside(folder, damage):
    answers.save("f", GOOD, True)
    for number in (1, 2):
        (folder / "progress.json").write_text(damage)
        assert answers.status("f") == "saved, not checked"
        assert (folder / f"progress.damaged-{number}.json").read_text() == damage
    answers.save("f", BAD, False)
    assert (folder / "f.py").read_text() == GOOD  # it may have passed
    answers.save("f", GOOD, True)
    assert answers.status("f") == "passed"


def _save_many(folder, who):
    os.environ["PARDIST_ANSWERS"] = folder
    for i in range(20):
        answers.save(f"f{who}", f"def f{who}():\n    return {i}\n", True)
        answers.save("shared", f"def shared():\n    return {who}, {i}\n", True)


def test_two_notebooks_at_once(folder):
    context = multiprocessing.get_context("spawn")
    notebooks = [context.Process(target=_save_many, args=(str(folder), who)) for who in (1, 2)]
    for notebook in notebooks:
        notebook.start()
    for notebook in notebooks:
        notebook.join(60)
        assert notebook.exitcode == 0
    book = json.loads((folder / "progress.json").read_text())
    assert sorted(book) == ["f1", "f2", "shared"] and all(e["status"] == "passed" for e in book.values())
    assert len(history(folder, "f1")) == len(history(folder, "f2")) == 20 and len(history(folder, "shared")) == 40
    assert not list(folder.glob("*.damaged*")) and not list(folder.glob(".f*.py.*"))


def test_a_notebook_that_holds_the_lock_for_ever_does_not_stop_another(folder):
    folder.mkdir()
    with answers._locked(), answers._locked(patience=0.1):
        pass


def test_a_crash_in_the_middle_of_writing_leaves_the_old_file(folder, monkeypatch):
    answers.save("f", BAD, False)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        answers.save("f", GOOD, True)
    assert (folder / "f.py").read_text() == BAD
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "f.py", "history", "progress.json"]


def test_the_folder_stays_where_the_notebook_started(monkeypatch, tmp_path):
    monkeypatch.delenv("PARDIST_ANSWERS")
    before = answers.folder()
    monkeypatch.chdir(tmp_path)
    assert answers.folder() == before and before.name == "pardist_answers"


def test_files_can_be_read_by_others(folder):
    answers.save("f", GOOD, True)
    assert stat.S_IMODE((folder / "f.py").stat().st_mode) == 0o644


# ---- the text of an answer ------------------------------------------------------------------------------------

CELL = '''
import math as m
import torch.distributed as dist
from collections import Counter
from os.path import join as put

factor, words = 3, ("a", "b")
things = [1, 2]

def helper(x):
    return inner(x) * factor

def inner(x):
    return helper(x - 1) if x > 3 else m.floor(x) + len(words)

alias = helper

def answer(x):
    """Doc."""
    return alias(x), Counter([x]), put("a", "b"), dist.ReduceOp.SUM is not None

def loose(x):
    return things

short = lambda x: x * factor
pair = (lambda x: x, lambda x: -x)

def outer(k):
    def nested(x):
        return x + k + factor
    return nested

nested = outer(5)


def mine(x):
    other = x + 1
    return other


other = mine
'''


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """The names that a notebook has after a cell; their source is known as a cell's is."""
    path = tmp_path / "In[1]"
    path.write_text(CELL)
    names = {"__name__": "__main__"}
    exec(compile(CELL, str(path), "exec"), names)
    return names


def run_alone(text, name):
    names = {"__name__": "elsewhere"}
    exec(text, names)
    return names[name]


def test_an_answer_is_saved_with_what_it_uses(cell):
    text = answers.text_of(cell["answer"], "task")
    assert run_alone(text, "task")(5) == cell["answer"](5)
    assert "import torch.distributed as dist" in text and " import join as put" in text
    assert '"""Doc."""' in text and "def loose" not in text


def test_lambdas_and_closures(cell):
    assert run_alone(answers.text_of(cell["short"], "task"), "task")(2) == 6
    assert answers.text_of(cell["pair"][0], "task") is None  # which of the two?
    assert run_alone(answers.text_of(cell["nested"], "task"), "task")(2) == 10
    assert run_alone(answers.text_of(cell["other"], "task"), "task")(2) == 3  # its own `other` is not the notebook's


def test_what_cannot_be_saved_is_said_in_the_file(cell):
    assert "# things: a list of the notebook" in answers.text_of(cell["loose"], "task")


def test_no_source():
    names = {}
    exec("def f(x):\n    return x", names)
    assert answers.text_of(names["f"], "f") is None
    assert answers.text_of(len, "f") is None


def test_a_saved_answer_is_loaded_from_its_file(folder):
    assert answers.load("f") is None
    answers.save("f", GOOD, True)
    f = answers.load("f")
    assert f() == 1 and f.__code__.co_filename == str(folder / "f.py")
    (folder / "f.py").write_text("def g():\n    pass\n")
    with pytest.raises(NameError, match="no `f`"):
        answers.load("f")
