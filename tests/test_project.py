"""What holds for the project as a whole: which room imports which, addresses, notebooks that read well."""

import ast
import re
import subprocess
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAY_IMPORT = {  # room: rooms it may use
    "ranks": {"ranks", "measure"},  # Ranks.trace returns a Trace
    "mechanisms": {"mechanisms"},
    "measure": {"measure"},
    "pictures": {"pictures"},
    "lessons": {"ranks", "mechanisms", "measure", "pictures", "lessons"},
}


LIBRARY = ROOT / "pardist_lib"
MECHANISMS = LIBRARY / "mechanisms"
EVERY_ROOM = {path.stem for path in MECHANISMS.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__"}
SIDEWAYS = {  # what a room of mechanisms may use besides group, collectives and itself
    "private": {"averaging"},
    "mesh": EVERY_ROOM,  # these two put the others together
    "checkpoint": EVERY_ROOM,
}


def imports(path):
    """(absolute name of a module, name taken from it or "") of everything a file of the library imports."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + [node.module or ""]).strip(".")
            yield from ((module, alias.name) for alias in node.names)


def file_of(module, name=""):
    """The file of the library that an import runs: a module's own, or the front door that it is taken from."""
    for dotted in filter(None, (name and f"{module}.{name}", module)):
        path = ROOT.joinpath(*dotted.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file() and LIBRARY in file.parents:
                return file
    return None


def files_under(folder):
    return sorted((LIBRARY / folder).rglob("*.py"))


def named(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room):
    assert files_under(room)
    for path in files_under(room):
        for name, _ in imports(path):
            if name.startswith("pardist_lib."):
                assert name.split(".")[1] in MAY_IMPORT[room], f"{named(path)} imports {name}"
            if room == "pictures":
                assert not name.startswith("torch"), f"{named(path)} imports {name}"


# ---- inside mechanisms: group, collectives, rooms, private ----------------------------------------------------


def room_of(path):
    return path.relative_to(MECHANISMS).parts[0].removesuffix(".py")


def test_a_mechanism_imports_the_ground_and_itself():
    for path in files_under("mechanisms"):
        room = room_of(path)
        allowed = {"group"} if room == "group" else {"group", "collectives", room} | SIDEWAYS.get(room, set())
        for module, name in imports(path):
            if module.startswith("pardist_lib."):
                other = room_of(file_of(module, name))
                assert other in allowed, f"{named(path)} imports {module}: {room} may use {sorted(allowed)}"
            elif room == "group":
                assert module.split(".")[0] == "torch", f"{named(path)} imports {module}"


def test_files_of_mechanisms_import_files_and_no_front_door():
    """What stands at a front door (a room's __init__) is for those outside; inside it would bring all of it along."""
    for path in files_under("mechanisms"):
        for module, name in imports(path):
            file = file_of(module, name) if module.startswith("pardist_lib") else None
            assert not file or file.name != "__init__.py", f"{named(path)} imports {name} from {module}"


def test_a_front_door_only_hands_names_on():
    for path in files_under("mechanisms"):
        if path.name == "__init__.py":
            for node in ast.parse(path.read_text()).body:
                docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                listed = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
                assert docstring or listed or isinstance(node, ast.ImportFrom), f"{named(path)}: {ast.unparse(node)}"


def test_mechanisms_are_four_floors_without_a_circle():
    files, rooms = {}, {room: set() for room in EVERY_ROOM}
    for path in files_under("mechanisms"):
        files[path] = {file for import_ in imports(path) if (file := file_of(*import_))} - {path}
        if room_of(path) in rooms:
            rooms[room_of(path)] |= {room_of(file) for file in files[path]} - {room_of(path)}
    TopologicalSorter(files).prepare()  # CycleError where files import each other
    floors = {}
    for room in TopologicalSorter(rooms).static_order():
        floors[room] = 1 + max((floors[other] for other in rooms[room]), default=0)
    assert floors["group"] == 1 and floors["collectives"] == 2 and max(floors.values()) <= 4, floors


# ---- lessons --------------------------------------------------------------------------------------------------


def lesson_of(path):
    return next((part for part in path.relative_to(LIBRARY).parts if re.fullmatch(r"lesson\d\d", part)), None)


def test_no_lesson_imports_another_lesson_or_a_private_name():
    for path in files_under("lessons"):
        for module, name in imports(path):
            file = file_of(module, name) if module.startswith("pardist_lib.lessons") else None
            if file and lesson_of(file):
                assert lesson_of(file) == lesson_of(path), f"{named(path)} imports {module}"
            private = any(part.startswith("_") for part in [*module.split("."), name])
            assert not (module.startswith(("pardist_lib.lessons", "pardist_lib.ranks")) and private), (
                f"{named(path)} imports {name} from {module}"
            )


def test_lessons_use_nothing_private_of_ranks():
    for path in files_under("lessons"):
        tree = ast.parse(path.read_text())
        modules = {  # names by which modules of ranks are known in this file
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
            if f"{getattr(node, 'module', '') or ''}.{alias.name}".strip(".").startswith("pardist_lib.ranks")
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                assert ast.unparse(node.value) not in modules, f"{named(path)} uses {ast.unparse(node)}"


# ---- short files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ["mechanisms", "lessons"])
def test_files_and_classes_are_short(room):
    long = []
    for path in files_under(room):
        text = path.read_text()
        if len(text.splitlines()) > 300:
            long.append(f"{named(path)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and (lines := node.end_lineno - node.lineno + 1) > 160:  # about 150
                long.append(f"{named(path)}: class {node.name}, {lines} lines")
    assert not long, long


# ---- addresses and notebooks ----------------------------------------------------------------------------------


def test_the_repositorys_address_is_the_same_everywhere():
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    name = address.removeprefix("https://github.com/")
    for path in [ROOT / "README.md", *NOTEBOOKS]:
        found = re.findall(r"(?:github\.com|/github|/gh)/([\w-]+/[\w.-]+?)(?=[/\"\\\s)#@]|$)", path.read_text())
        assert found and set(found) == {name}, f"{path.name}: {set(found)}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_read_well(path):
    notebook = nbformat.read(path, 4)
    assert notebook.metadata["kernelspec"]["name"] == "python3" and path.stat().st_size < 3_000_000
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), "not run once, in order"
    for cell in code:
        assert len(cell.source.splitlines()) <= 25
        for output in cell.outputs:
            text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
            assert output.output_type != "error" or "raises-exception" in cell.metadata.get("tags", [])
            assert output.get("name") != "stderr", text
            assert len(text) < 6000
            assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|Users)/", text), text


def test_every_lesson_begins_as_the_first_one_does():
    """The cell that fetches the course on Colab, and looks at the machine: the first lesson most closely."""
    first = [next(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code") for path in NOTEBOOKS]
    fetch, look = zip(*(source.split("from pardist_lib import doctor\n") for source in first), strict=True)
    assert "\n    %pip install " in fetch[0] and set(fetch) == {fetch[0]}
    assert look[0] == "doctor.look()" and set(look[1:]) == {"print(doctor.found())"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_between_lessons_lead_somewhere(path):
    text = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    for name in re.findall(r"\]\(([^)#]+\.ipynb)", text):
        assert (path.parent / name).exists(), name


def test_the_map_of_lessons_names_every_notebook():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in (ROOT / "README.md").read_text()


TOP = {".ci", ".github", ".gitignore", "LICENSE", "README.md", "binder", "notebooks", "pardist_lib", "pyproject.toml",
       "requirements.txt", "tests"}  # fmt: skip


def test_nothing_that_git_tracks_names_a_private_path():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert tracked or not (ROOT / ".git").exists()
    assert {name.partition("/")[0] for name in tracked} <= TOP
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".yml", ".ipynb") and path.exists():
            assert not re.search("file:" + "///|/" + "root/", path.read_text()), name
