"""The reader's own files: answers and progress, in a folder beside the notebooks.

    pardist_answers/my_ring_all_reduce.py            the answer that counts: the newest that passed, else the newest
    pardist_answers/history/my_ring_all_reduce.1.py  every different answer ever checked, in order
    pardist_answers/progress.json                    which answers passed

A file is written beside its place and then moved into it, under a lock, so that two notebooks at once and a crash
in the middle do no harm. An update of the course touches none of this. PARDIST_ANSWERS names another folder.
"""

import ast
import hashlib
import importlib
import inspect
import json
import os
import sys
import tempfile
import textwrap
import time
import types
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there the files are still written whole, but without a lock
    fcntl = None

_START = Path.cwd()  # the notebook's folder, wherever it may change to later


def folder():
    return Path(os.environ.get("PARDIST_ANSWERS") or _START / "pardist_answers")


def file_of(name):
    return folder() / f"{name}.py"


def spoken(path):
    """The path as a reader sees it: from the answers' folder on."""
    return f"{folder().name}/{path.relative_to(folder())}"


def save(name, text, passed):
    """Keep an answer that was checked. passed: True, False, or None where the check could not be made.

    The answer takes the place of `<name>.py` if it passed, or if the one there is known not to pass. Whatever is
    there, also what the reader wrote into it by hand, goes into the history first. Raises OSError.
    """
    folder().joinpath("history").mkdir(parents=True, exist_ok=True)
    with _locked():
        book, kept = _read_book(), _read(file_of(name))
        for one in filter(None, (kept, text)):
            _remember(name, one)
        if passed or kept in (None, text) or _status(book, name, kept) == "failed":
            _write(file_of(name), text)
            book.pop(name, None)
            if passed is not None:
                book[name] = {"status": "passed" if passed else "failed", "text": _mark(text)}
            _write(folder() / "progress.json", json.dumps(book, indent=1, sort_keys=True) + "\n")


def status(name):
    """ "passed", "failed", "saved, not checked", or "not tried yet", of the answer in `<name>.py`."""
    return _status(_read_book(), name, _read(file_of(name)))


def load(name):
    """The answer in `<name>.py` as a function, or None where there is no such file. What running the file raises
    passes through."""
    path = file_of(name)
    text = _read(path)
    if text is None:
        return None
    module = types.ModuleType(f"pardist_answers.{name}")  # known to nobody, so it travels to the ranks by value
    exec(compile(text, str(path), "exec"), module.__dict__)
    if name not in module.__dict__:
        raise NameError(f"there is no `{name}` in it")
    return module.__dict__[name]


def _status(book, name, kept):
    if kept is None:
        return "not tried yet"
    entry = book.get(name)
    return entry["status"] if entry and entry["text"] == _mark(kept) else "saved, not checked"


def _mark(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _remember(name, text):
    earlier = folder().joinpath("history").glob(f"{name}.*.py")
    known = {int(path.name.split(".")[1]): _read(path) for path in earlier if path.name.split(".")[1].isdigit()}
    if text not in known.values():
        _write(folder() / "history" / f"{name}.{max(known, default=0) + 1}.py", text)


def _read(path):
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_book():
    """What progress.json says; a file that cannot be understood is put aside, and all answers count as unchecked."""
    path = folder() / "progress.json"
    text = _read(path)
    if text is None:
        return {}
    try:
        book = json.loads(text)
        for entry in book.values():
            if entry["status"] not in ("passed", "failed") or not isinstance(entry["text"], str):
                raise ValueError
        return book
    except (ValueError, TypeError, KeyError, AttributeError):
        number = 1 + len(list(folder().glob("progress.damaged-*.json")))
        try:
            path.rename(folder() / f"progress.damaged-{number}.json")
        except OSError:
            pass  # another notebook was faster, or nothing may be written here
        return {}


def _write(path, text):
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def _locked(patience=5.0):
    """One notebook at a time; after `patience` seconds of waiting for a stuck one, or where the file system has no
    locks, without."""
    with open(folder() / ".lock", "w") as file:
        deadline = time.monotonic() + patience
        while fcntl and time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
        yield


# ---- the text of an answer ------------------------------------------------------------------------------------


def text_of(answer, name):
    """The source of an answer, with what it uses from the notebook (imports, helpers, numbers), as a module that
    stands by itself and defines `name`. None where Python does not know the source."""
    try:
        parts = {"imports": set(), "constants": {}, "functions": {}}
        written = _gather(inspect.unwrap(answer), name, parts)
        rest = [*parts["constants"].values(), *parts["functions"].values()]
        text = "\n".join(sorted(parts["imports"])) + "\n\n\n" + "\n\n\n".join(rest) + "\n"
        text = text.lstrip("\n") + (f"\n{name} = {written}\n" if written != name else "")
        compile(text, "<answer>", "exec")
        return text
    except (OSError, TypeError, ValueError, SyntaxError, AttributeError, RecursionError):
        return None


def _gather(fn, name, parts):
    """Add a function and all it uses to `parts`; returns the name under which it is written there."""
    source = textwrap.dedent(inspect.getsource(fn))
    tree = ast.parse(source)
    if fn.__name__ == "<lambda>":
        lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
        if len(lambdas) != 1:
            raise ValueError("which of them is it?")
        source, written = f"{name} = {ast.get_source_segment(source, lambdas[0])}", name
    else:
        written = fn.__name__
    used = inspect.getclosurevars(fn)
    scope = fn.__globals__ | used.nonlocals
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words -= {*fn.__code__.co_varnames, *fn.__code__.co_cellvars}  # its own, whatever the notebook calls so, too
    parts["functions"][written] = None  # its place: a recursive function comes once
    for word in sorted(words & scope.keys() - {written}):
        if word not in parts["functions"] and word not in parts["constants"]:
            _gather_name(word, scope[word], parts)
    parts["functions"][written] = parts["functions"].pop(written) or source.rstrip("\n")
    return written


def _gather_name(word, value, parts):
    home = getattr(value, "__module__", None)
    if isinstance(value, types.ModuleType):
        parts["imports"].add(f"import {value.__name__}" + (f" as {word}" if value.__name__ != word else ""))
    elif home and _found(home, getattr(value, "__qualname__", "?")) is value:
        short = value.__qualname__
        parts["imports"].add(f"from {home} import {short}" + (f" as {word}" if short != word else ""))
    elif isinstance(value, types.FunctionType):
        if (written := _gather(value, word, parts)) != word:
            parts["functions"][word] = f"{word} = {written}"
    elif isinstance(value, (int, float, str, bool, tuple, type(None))) and len(repr(value)) < 1000:
        parts["constants"][word] = f"{word} = {value!r}"
    else:
        parts["constants"][word] = f"# {word}: a {type(value).__name__} of the notebook, not kept here"


def _found(home, qualname):
    """What `from home import qualname` would give in a fresh Python, or None."""
    if home == "__main__" or home not in sys.modules or "." in qualname:
        return None
    return getattr(importlib.import_module(home), qualname, None)
