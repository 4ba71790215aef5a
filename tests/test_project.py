"""What holds for the project as a whole: which room imports which, addresses, notebooks that read well."""

import ast
import re
import subprocess
import tomllib
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


def imports(path):
    """Absolute names of everything a file of the library imports."""
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield ".".join(base + [node.module or ""]).strip(".")


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room):
    files = sorted((ROOT / "pardist_lib" / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            if name.startswith("pardist_lib."):
                assert name.split(".")[1] in MAY_IMPORT[room], f"{path.name} imports {name}"
            if room == "pictures":
                assert not name.startswith("torch"), f"{path.name} imports {name}"


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
    """The cell that fetches the course on Colab."""
    first = [next(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code") for path in NOTEBOOKS]
    assert "\n    %pip install " in first[0] and set(first) == {first[0]}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_between_lessons_lead_somewhere(path):
    text = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    for name in re.findall(r"\]\(([^)#]+\.ipynb)", text):
        assert (path.parent / name).exists(), name


def test_the_map_of_lessons_names_every_notebook():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in (ROOT / "README.md").read_text()


def test_nothing_that_git_tracks_names_a_private_path():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert tracked or not (ROOT / ".git").exists()
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".yml", ".ipynb") and path.exists():
            assert not re.search("file:" + "///|/" + "root/", path.read_text()), name
