"""python -m pardist_lib.lessons.exercises.grade CLASS: the answers of a class, one table.

CLASS is a folder with one entry a student: a folder of answers (a `pardist_answers`, or one that holds it), or an
answered notebook. For each student: which exercises pass, and the first that fails with its diagnosis. Answers run in
a worker process with ranks of its own, each within a hard limit of time, whatever it does: a worker that does not come
back is ended with all its processes, and the next one goes on. The same text is never run twice; what is known is kept
in CLASS/grades.json, so that a second call runs new answers only.
"""

import argparse
import ast
import csv
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

from pardist_lib.pictures.table import Table

MODULE = "pardist_lib.lessons.exercises.grade"
LIMIT = 30.0  # seconds for one answer, from its first line on; a right one takes a second or two
START = 180.0  # seconds in which a worker has to be ready


def grade(folder, lesson=None, limit=LIMIT, say=lambda text: None):
    """{student: {exercise: {"status", "diagnosis"}}} of the exercises of one lesson, or of all.

    Raises ValueError where there is no such folder, nobody in it, or no such lesson.
    """
    from .reader import exercises

    folder = Path(folder)
    names = [name for name, where in exercises().items() if lesson in (None, where)]
    if not names:
        raise ValueError(f"there is no lesson {lesson!r} with exercises")
    students = sorted(p for p in folder.iterdir() if p.is_dir() or p.suffix == ".ipynb") if folder.is_dir() else []
    if not students:
        raise ValueError(f"{folder} has no folder and no notebook of a student")
    known, found = _known(folder), {}
    with Worker(limit) as worker:
        for student in students:
            texts = answers_in(student, names)
            found[student.stem] = {name: _one(name, texts.get(name), worker, known) for name in names}
            say(f"{student.stem}: {sum(v['status'] == 'passed' for v in found[student.stem].values())} of {len(names)}")
            (folder / "grades.json").write_text(json.dumps(known, indent=1))
    return found


def _one(name, text, worker, known):
    if text is None:
        return {"status": "not tried yet", "diagnosis": ""}
    mark = f"{name} {hashlib.sha256(text.encode()).hexdigest()}"
    if mark not in known:
        known[mark] = worker.judge(name, text)
    return known[mark]


def _known(folder):
    try:
        return json.loads((folder / "grades.json").read_text())
    except (OSError, ValueError):
        return {}


def table(found):
    """The grades as a `Table`: a row for each student."""
    marks = {"passed": "✓", "failed": "✗"}
    rows = []
    for student, verdicts in found.items():
        wrong = next(((n, v) for n, v in verdicts.items() if v["status"] in ("failed", "blocked")), None)
        passed = sum(v["status"] == "passed" for v in verdicts.values())
        rows.append(
            {"student": student, "passed": f"{passed} of {len(verdicts)}"}
            | {name: marks.get(v["status"], "○") for name, v in verdicts.items()}
            | {"first that fails": f"{wrong[0]}: {wrong[1]['diagnosis']}"[:160] if wrong else ""}
        )
    return Table(rows, f"{len(rows)} student" + "s" * (len(rows) != 1))


# ---- what was answered ----------------------------------------------------------------------------------------


def answers_in(place, names):
    """{exercise: text of a module that defines it} of a student's folder or notebook."""
    if place.suffix == ".ipynb":
        return _of_notebook(place, names)
    inner = place / "pardist_answers"
    found = {}
    for file in sorted((inner if inner.is_dir() else place).glob("*.py")):
        if file.stem in names:
            found[file.stem] = file.read_text(encoding="utf-8", errors="replace")
    for notebook in () if found else sorted(place.glob("*.ipynb")):
        found |= _of_notebook(notebook, names)
    return found


def _of_notebook(path, names):
    """Each answer with the imports, functions, classes and plain values of the notebook's cells; blanks left out."""
    try:
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    except (OSError, ValueError, KeyError):
        return {}
    parts, answered = [], set()
    for cell in cells:
        text = "".join(cell["source"])
        lines = [line for line in text.splitlines() if not line.lstrip().startswith(("%", "!"))]
        try:
            nodes = ast.parse("\n".join(lines)).body
        except SyntaxError:
            continue
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and node.name in names and not _is_blank(node):
                answered.add(node.name)
            plain = isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            if plain or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
                parts.append(ast.unparse(node))
    text = "\n\n".join(parts) + "\n"
    return dict.fromkeys(answered, text)


def _is_blank(node):
    last = node.body[-1]
    return isinstance(last, ast.Raise) and "NotImplementedError" in ast.unparse(last) and len(node.body) <= 2


# ---- the worker -----------------------------------------------------------------------------------------------


class Worker:
    """A process that judges answers; ended and started anew when one of them does not let it."""

    def __init__(self, limit):
        self.limit, self.process = limit, None
        self.folder = tempfile.TemporaryDirectory(prefix="pardist-grade-")

    def judge(self, name, text):
        """{"status", "diagnosis"} of an answer; "failed" where it does not end in time, or ends its process."""
        if self.process is None:
            self._start()
        self.process.stdin.write(json.dumps([name, text]) + "\n")
        self.process.stdin.flush()
        line = self._line(self.limit)
        if line:
            return json.loads(line)
        self._stop()
        why = f"it does not end: stopped after {self.limit:.0f} seconds"
        return {"status": "failed", "diagnosis": why if line is None else "it ends the process that runs it"}

    def _start(self):
        env = os.environ | {"PARDIST_ANSWERS": self.folder.name, "PARDIST_LIVE": "0"}
        command = [sys.executable, "-c", f"from {MODULE} import serve; serve()"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env,
            start_new_session=True,
        )  # fmt: skip
        if not self._line(START):
            self._stop()
            raise RuntimeError("a worker with four ranks could not be started: python -m pardist_lib.doctor says why")

    def _line(self, seconds):
        """The next line of the worker; None where none comes in time, "" where it has ended."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else None

    def _stop(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # its ranks end with it: their connections close
        except ProcessLookupError:
            pass
        self.process.wait()
        self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process is not None:
            self._stop()
        self.folder.cleanup()


def serve():
    """In the worker: one line in, one line out."""
    from .bench import four_ranks
    from .reader import check

    out, sys.stdout = os.fdopen(os.dup(1), "w", buffering=1), sys.stderr  # what answers print is not a verdict
    os.dup2(2, 1)
    four_ranks()
    out.write("ready\n")
    for line in sys.stdin:
        name, text = json.loads(line)
        try:
            module = types.ModuleType(f"answer_to_{name}")  # known to nobody, so it travels to the ranks by value
            exec(compile(text, f"{name}.py", "exec"), module.__dict__)
            verdict = check(name, module.__dict__[name])
            found = {"status": verdict.status, "diagnosis": "" if verdict.passed else verdict.diagnosis}
        except KeyError:
            found = {"status": "failed", "diagnosis": f"there is no `{name}` in it"}
        except BaseException as error:
            found = {"status": "failed", "diagnosis": f"it cannot be loaded: {type(error).__name__}: {error}"[:300]}
        out.write(json.dumps(found) + "\n")


def main():
    written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__, formatter_class=written)
    parser.add_argument("folder", help="the class: a folder or a notebook for each student in it")
    parser.add_argument("--lesson", help="of which lesson: 00, 01, …; all where it is left out")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one answer (%(default)g)")
    parser.add_argument("--csv", help="write the table to this file, too")
    given = parser.parse_args()
    found = table(grade(given.folder, given.lesson, given.limit, lambda text: print(text, file=sys.stderr)))
    print(found)
    if given.csv:
        with open(given.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, found.columns)
            writer.writeheader()
            writer.writerows(found.rows)


if __name__ == "__main__":
    main()
