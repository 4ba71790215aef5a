"""check(name, answer), hint(name), solution(name), progress(): the reader's side of the exercises.

An exercise is lessonNN/<name>.py, named as the function that is to be written, with an `Exercise`; its solution is the
function of that name in lessonNN/solutions.py, whose signature and docstring are the blank. How to add one: README.md
of the folder above.
"""

import ast
import difflib
import importlib
import inspect
import os
import pkgutil
import re
import traceback
from dataclasses import dataclass
from html import escape
from pathlib import Path

from pardist_lib import lessons
from pardist_lib.pictures.table import Table
from pardist_lib.pictures.verdict import FAILS, HOLDS
from pardist_lib.ranks.again import notebook_file

from . import answers
from .bench import Bench, Blocked
from .judge import Wrong

MARKS = {"passed": HOLDS, "failed": FAILS}
OTHER_MARK = "○", "#8a8a8a"


@dataclass(frozen=True)
class Verdict:
    """What a check found. `status` is "passed", "failed", "blocked" (the check could not be made: `diagnosis` says
    what is missing) or "not tried yet". Shows itself."""

    exercise: str
    status: str
    diagnosis: str = ""  # the likeliest cause, in one sentence
    where: str = ""  # rank, tensor, case
    expected: str = ""
    got: str = ""
    printed: str = ""  # what the ranks printed while the answer failed
    note: str = ""

    @property
    def passed(self):
        return self.status == "passed"

    def _rows(self):
        rows = [("where", self.where), ("expected", self.expected), ("got", self.got), ("printed", self.printed)]
        return [(name, text) for name, text in rows if text]

    def __repr__(self):
        lines = [f"{MARKS.get(self.status, OTHER_MARK)[0]} {self.exercise}: {self.status}"]
        lines += [f"  {self.diagnosis}"] if self.diagnosis else []
        for name, text in self._rows():
            first, *rest = text.splitlines()
            lines += [f"  {name + ':':<10}{first}", *(f"{'':12}{line}" for line in rest)]
        return "\n".join(lines + ([f"  {self.note}"] if self.note else []))

    def _repr_html_(self):
        mark, colour = MARKS.get(self.status, OTHER_MARK)
        head = f"<b>{mark} {escape(self.exercise)}: {self.status}</b>"
        said = f'<div style="margin:2px 0">{escape(self.diagnosis)}</div>' if self.diagnosis else ""
        rows = "".join(
            f'<div style="display:flex"><span style="min-width:5.5em;opacity:.75">{name}</span>'
            f'<code style="background:none;color:inherit;white-space:pre-wrap">{escape(text)}</code></div>'
            for name, text in self._rows()
        )
        note = f'<div style="opacity:.75">{escape(self.note)}</div>' if self.note else ""
        return f'<div style="border-left:5px solid {colour};padding:2px 0 2px 10px">{head}{said}{rows}{note}</div>'


@dataclass(frozen=True)
class Words:
    """A text that shows itself; code in it is coloured by the notebook's own theme."""

    text: str
    code: str = ""

    def __repr__(self):
        return "\n".join(filter(None, [self.text, self.code]))

    def _repr_markdown_(self):
        return self.text.replace("*", r"\*").replace("_", r"\_").replace("\n", "  \n") + (
            f"\n\n```python\n{self.code}\n```" if self.code else ""
        )


# ---- what a reader calls --------------------------------------------------------------------------------------


def check(name=None, answer=None):
    """Check an answer on real ranks; without one, check again the one that is saved. Returns a `Verdict`.

    Never raises, whatever the answer does. An answer that was tried is kept in pardist_answers/ beside the
    notebooks, with everything that was tried before; a blank (`raise NotImplementedError`) is not.
    """
    if unknown := _unknown(name):
        return Verdict(str(name or "check"), "blocked", unknown)
    _last["lesson"] = exercises()[name]
    if answer is not None:
        text = answers.text_of(answer, name)
        return _not_an_answer(name, answer) or _kept(_judged(name, answer), text)
    try:
        answer = answers.load(name)
        text = answer and answers.file_of(name).read_text(encoding="utf-8")
    except Exception as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        file = answers.spoken(answers.file_of(name))
        return Verdict(name, "failed", f"{file} cannot be used: {type(error).__name__}: {error}", file + line)
    if answer is None:
        note = f"There is no saved answer: call check({name!r}, {name}) with the function you wrote."
        return Verdict(name, "not tried yet", note=note)
    return _not_an_answer(name, answer) or _kept(_judged(name, answer), text)


def hint(name=None):
    """The next hint for an exercise, with those before it; without a name, which exercises this lesson has."""
    if unknown := _unknown(name):
        return Words(unknown)
    hints = exercise_of(name).hints
    shown = _shown[name] = min(_shown.get(name, 0) + 1, len(hints))
    lines = [f"Hint {i + 1} of {len(hints)}: {text}" for i, text in enumerate(hints[:shown])]
    more = "The next hint: run this again." if shown < len(hints) else f"That was all; solution({name!r}) has the code."
    return Words("\n".join([*lines, more]))


def solution(name=None):
    """One solution of an exercise, as readable code; without a name, which exercises this lesson has.

    A teacher can lock them: PARDIST_SOLUTIONS=locked."""
    if unknown := _unknown(name):
        return Words(unknown)
    if os.environ.get("PARDIST_SOLUTIONS") == "locked":
        return Words(f"Solutions are locked here (PARDIST_SOLUTIONS=locked). hint({name!r}) still helps.")
    return Words(f"One way to write {name}:", inspect.getsource(reference(name)).rstrip())


def progress(lesson=None):
    """Which exercises are passed: those of a lesson, by default of the one whose exercises were checked last, and one
    line for the others; progress("all") has all of them. A table."""
    names, lesson = exercises(), f"{lesson:02}" if isinstance(lesson, int) else lesson or _last.get("lesson")
    states = {name: answers.status(name) for name in names}
    if lesson not in (None, "all", *names.values()):
        raise ValueError(f"there is no lesson {lesson!r} with exercises: {', '.join(sorted(set(names.values())))}")
    rows = [
        {"lesson": where, "exercise": name, "": MARKS.get(states[name], OTHER_MARK)[0], "status": states[name]}
        for name, where in names.items()
        if lesson in ("all", where)
    ]
    others = [n for n, where in names.items() if lesson not in ("all", where)]
    if others:
        passed = f"{sum(states[n] == 'passed' for n in others)} of {len(others)} passed"
        more = "all the others" if rows else "all"
        rows.append({"lesson": more, "exercise": 'progress("all") has them', "": "", "status": passed})
    return Table(rows, f"{sum(s == 'passed' for s in states.values())} of {len(names)} exercises passed")


_shown = {}  # hints so far; a new kernel begins with the first
_last = {}  # "lesson": whose exercise was checked last


def exercises():
    """{name: number of its lesson as text}, in the order of the lessons and of their notebooks."""
    folders = sorted(m.name for m in pkgutil.iter_modules(lessons.__path__) if re.fullmatch(r"lesson\d\d", m.name))
    return {name: folder[6:] for folder in folders for name in _module(folder).EXERCISES}


def blank(name):
    """The text of an exercise's blank: signature, docstring, raise NotImplementedError."""
    source = inspect.getsource(reference(name))
    body = ast.parse(source).body[0].body
    return "\n".join(source.splitlines()[: body[0].end_lineno]) + "\n    raise NotImplementedError\n"


def _module(name):
    return importlib.import_module(f"{lessons.__name__}.{name}")


def exercise_of(name):
    return _module(f"lesson{exercises()[name]}.{name}").exercise


def reference(name):
    return getattr(_module(f"lesson{exercises()[name]}.solutions"), name)


def _unknown(name):
    """A sentence where there is no such exercise, else None."""
    names = exercises()
    if name is None:
        file = notebook_file()
        here = [known for known, lesson in names.items() if file and file.name.startswith(f"{lesson}_")]
        which = f"this lesson has {', '.join(map(repr, here))}" if here else f"there are {', '.join(map(repr, names))}"
        return f"Which exercise? Its name goes between the brackets, in quotes: {which}"
    if isinstance(name, str) and name in names:
        return None
    if callable(name):
        given = getattr(name, "__name__", "…")
        return f"check takes the exercise's name first: check({given!r}, {given})"
    near = difflib.get_close_matches(str(name).lower(), names, 1, 0.5)
    advice = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
    return f"there is no exercise {str(name)[:60]!r} in any lesson's EXERCISES: {advice}"


def _expected(name):
    """How long an exercise takes, and how hard it is."""
    exercise = exercise_of(name)
    return f"About {exercise.minutes} minutes, {exercise.level}. hint({name!r}) helps." if exercise.minutes else ""


def _blank():
    raise NotImplementedError


def _blank_with_words():
    raise NotImplementedError("…")


_BLANK = {_blank.__code__.co_code, _blank_with_words.__code__.co_code}  # what they compile to, docstring or not


# ---- judging --------------------------------------------------------------------------------------------------


def _not_an_answer(name, answer):
    """The verdict on what cannot be run at all, or None: blanks, things that are no functions, wrong arguments."""
    if not callable(answer):
        why = f"the answer is of type {type(answer).__name__}: give check the function itself, without calling it"
        return Verdict(name, "failed", why)
    if str(getattr(answer, "__module__", "")).startswith("pardist_lib."):
        return Verdict(name, "failed", f"`{answer.__name__}` is the course's own: write it yourself")
    code = getattr(answer, "__code__", None)
    if code and code.co_code in _BLANK and code.co_names == ("NotImplementedError",):
        saved = answers.status(name)
        file = answers.spoken(answers.file_of(name))
        note = f"Your answer in {file} ({saved}): check({name!r}) looks at it again."
        return Verdict(name, "not tried yet", note=note if saved != "not tried yet" else _expected(name))
    if inspect.isgeneratorfunction(answer) or inspect.iscoroutinefunction(answer):
        why = "calling it runs nothing: a function with yield, or async def, only makes an object"
        return Verdict(name, "failed", why)
    asked = inspect.signature(reference(name))
    try:
        given = inspect.signature(answer)
    except (TypeError, ValueError):
        return None  # built in: it will tell when it is called
    required = [p for p in asked.parameters.values() if p.default is p.empty]
    try:
        given.bind(*required, **{p: None for p in asked.parameters if asked.parameters[p] not in required})
    except TypeError as error:
        right, got = (f"({', '.join(signature.parameters)})" for signature in (asked, given))
        return Verdict(name, "failed", f"it has to take {right}: {error}", expected=right, got=got)
    return None


def _judged(name, answer):
    bench = None
    try:
        bench = Bench(answer)
        exercise_of(name).check(bench)
        return Verdict(name, "passed", exercise_of(name).why)
    except Blocked as error:
        return Verdict(name, "blocked", str(error))
    except Wrong as wrong:
        said, printed = wrong.diagnosis, bench.printed
        if bench.printed and ("without a return" in said or "returns nothing" in said):
            said = f"{said.partition(': does the function')[0]}: did you print it instead of returning it?"
            printed = "\n".join(printed.splitlines()[:3]) + "\n…"
        return Verdict(name, "failed", said, wrong.where, wrong.expected, wrong.got, printed, wrong.note)
    except Exception as error:  # a check must not stop a notebook
        last = traceback.extract_tb(error.__traceback__)[-1]
        spot = f"{Path(last.filename).name}, line {last.lineno}"
        said = f"the check itself failed on this answer ({spot}: {type(error).__name__}: {error}); please report it"
        return Verdict(name, "blocked", said)


def _kept(verdict, text):
    """Save the answer; the verdict, with a note where there is something to say about that."""
    name, passed = verdict.exercise, None if verdict.status == "blocked" else verdict.passed
    note = f"Saved in {answers.spoken(answers.file_of(name))}." if passed else ""
    if text is None:
        note = "Its source is not known to Python, so it is not saved: write it with def in a cell."
    else:
        try:
            answers.save(name, text, passed)
        except OSError as error:
            note = f"It could not be saved ({error.strerror}): PARDIST_ANSWERS=… names another folder."
        else:
            if passed is False and answers.status(name) == "passed":
                kept = answers.spoken(answers.file_of(name))
                note = f"Your earlier answer, which passed, is kept in {kept}."
    notes = " ".join(filter(None, [verdict.note, note]))
    return Verdict(**{**vars(verdict), "note": notes})
