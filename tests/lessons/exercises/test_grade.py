"""A class is graded: right and wrong answers, endless ones, ones that end their process, notebooks; nothing twice."""

import inspect
import json
import os
import subprocess
import sys
import time

import nbformat
import pytest

from pardist_lib.lessons.exercises import grade, reader, solution

RIGHT = "def shard_rows(n, rank, world_size):\n    return range(n * rank // world_size, n * (rank + 1) // world_size)\n"
WRONG = "def shard_rows(n, rank, world_size):\n    return range(n)\n"
CLASS = {
    "ada": RIGHT,
    "bob": WRONG,
    "cem": "while True:\n    pass\n",
    "dan": "import os\n\n\ndef shard_rows(n, rank, world_size):\n    os._exit(0)\n",
    "eve": "print('{}')\nimport os\nos._exit(0)\n",
    "fay": "def shard_rows(:\n",
    "gil": "def something_else():\n    pass\n",
    "hal": WRONG,
    "ida": None,
}


@pytest.fixture
def folder(tmp_path):
    for student, text in CLASS.items():
        (tmp_path / student / "pardist_answers").mkdir(parents=True)
        if text:
            (tmp_path / student / "pardist_answers" / "shard_rows.py").write_text(text)
    cells = [
        "import torch\nparts = 1",
        "%%ranks\nx",
        "def of(a, b, c):\n    return a * (b + c) // d",
        "d = 1",
        "syntax error",
        RIGHT,
        "def average_gradients(model, group=None):\n    raise NotImplementedError",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(notebook, tmp_path / "joe.ipynb")
    return tmp_path


@pytest.mark.timeout(400)
def test_a_class(folder):
    found = grade.grade(folder, "00", limit=30)
    said = {student: (v["shard_rows"]["status"], v["shard_rows"]["diagnosis"]) for student, v in found.items()}
    assert said["ada"] == ("passed", "") and said["joe"] == ("passed", "")
    assert said["bob"] == said["hal"] and "rank is not used" in said["bob"][1]
    assert said["cem"] == ("failed", "it does not end: stopped after 30 seconds")
    assert said["dan"][0] == "failed" and "exit code 0" in said["dan"][1]
    assert said["eve"] == ("failed", "it ends the process that runs it")
    assert "SyntaxError" in said["fay"][1] and said["gil"] == ("failed", "there is no `shard_rows` in it")
    assert said["ida"] == ("not tried yet", "") and found["joe"]["average_gradients"]["status"] == "not tried yet"
    shown = grade.table(found)
    assert shown.column("student") == sorted([*CLASS, "joe"]) and shown.column("passed")[0] == "1 of 3"
    assert shown.column("first that fails")[1].startswith("shard_rows: every rank gets the same rows")
    assert len(json.loads((folder / "grades.json").read_text())) == 8  # hal's is bob's, and not run again


def test_what_is_known_is_not_run_again(folder, monkeypatch):
    class Never:
        def __init__(self, limit):
            pass

        def judge(self, name, text):
            judged.append(text)
            return {"status": "failed", "diagnosis": "x"}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    judged = []
    monkeypatch.setattr(grade, "Worker", Never)
    grade.grade(folder, "00")
    first = len(judged)
    (folder / "ida" / "pardist_answers" / "shard_rows.py").write_text(RIGHT + "# new\n")
    grade.grade(folder, "00")
    assert first == 8 and len(judged) == 9


def test_wrong_input_is_told(tmp_path):
    with pytest.raises(ValueError, match="no folder and no notebook"):
        grade.grade(tmp_path)
    with pytest.raises(ValueError, match="no lesson '99'"):
        grade.grade(tmp_path, "99")


def test_solutions_can_be_locked(monkeypatch):
    monkeypatch.setenv("PARDIST_SOLUTIONS", "locked")
    assert "locked here" in solution("shard_rows").text and not solution("shard_rows").code


def test_the_command(tmp_path):
    (tmp_path / "ada").mkdir()
    command = [sys.executable, "-m", "pardist_lib.lessons.exercises.grade", str(tmp_path), "--lesson", "00"]
    done = subprocess.run([*command, "--csv", str(tmp_path / "t.csv")], capture_output=True, text=True, env=os.environ)
    assert "1 student" in done.stdout, done
    assert (tmp_path / "t.csv").read_text().startswith("student,passed,shard_rows")


ENDLESS = [  # what is wrong with it; what stops it
    ("def shard_rows(n, rank, world_size):\n    while True:\n        pass\n", "it does not come back"),
    ("while True:\n    pass\n", "it does not end: stopped after 30 seconds"),
    (
        "import torch\nimport torch.distributed as dist\n\n\ndef average_gradients(model, group=None):\n"
        "    while True:\n        dist.all_reduce(torch.ones(1), group=group)\n",
        "it makes call after call",
    ),
    ("import time\n\n\ndef average_gradients(model, group=None):\n    time.sleep(10_000)\n", "it does not come back"),
]


@pytest.mark.share(0)  # with --whole: eight minutes
@pytest.mark.timeout(900)
@pytest.mark.parametrize("people", [30])
def test_a_class_of_thirty_with_twenty_endless_answers(tmp_path, people):
    names = [name for name, lesson in reader.exercises().items() if lesson == "00"]
    right = {name: inspect.getsource(reader.reference(name)) for name in names}
    expected = {}
    for i in range(people):
        student = tmp_path / f"student{i:02}" / "pardist_answers"
        student.mkdir(parents=True)
        for name, text in right.items():
            text = f"import torch\nimport torch.distributed as dist\n\n\n{text}"
            (student / f"{name}.py").write_text(f"# {i}\n{text}")
        if i < 20:
            text, said = ENDLESS[i % 4]
            name = "average_gradients" if "average" in text else "shard_rows"
            (student / f"{name}.py").write_text(f"# {i}\n{text}")
            expected[student.parent.name] = name, said
        elif i < 24:
            (student / "shard_rows.py").write_text(["\0", "¿", "def shard_rows", "shard_rows = 3"][i - 20])
            expected[student.parent.name] = "shard_rows", ""
    began = time.monotonic()
    found = grade.grade(tmp_path, "00")
    took = time.monotonic() - began
    for student, verdicts in found.items():
        wrong, said = expected.get(student, ("", ""))
        for name, verdict in verdicts.items():
            assert verdict["status"] == ("failed" if name == wrong else "passed"), (student, name, verdict)
            assert name != wrong or said in verdict["diagnosis"], (student, verdict)
    print(f"{people} people, {len(right)} exercises: {took:.0f} s")
    assert len(found) == people and took < 600
