"""The lessons as a reader changes them: on another number of ranks, with other sizes, every widget moved after Run All.

    python -m pytest tests/test_changed_lessons.py --whole        all of them
    python -m pytest "tests/test_changed_lessons.py::test_on_other_numbers_of_ranks[06-3]"

A lesson runs to its end; what a cell finds true on four ranks is true on the others, or the cell says why not, in a
line that begins with `MADE_FOR`. A CI run takes a share of the cases, chosen by the commit (see conftest.py).
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MADE_FOR = "made for four ranks"
# Sizes that a reader may change: (lesson, what its cells say, what they say instead).
CHANGES = [
    ("00", "256", "250"),
    ("00", "lr=0.2", "lr=0.1"),
    ("01", "size=1_000_003", "size=5"),
    ("01", "size = 4_000_000", "size = 400_004"),
    ("02", "m=50, k=37, w=23", "m=7, k=5, w=3"),
    ("02", "torch.arange(1, 9)", "torch.arange(1, 11)"),
    ("03", "torch.randn(2, 32, 10", "torch.randn(2, 30, 10"),
    ("03", "steps=40", "steps=25"),
    ("04", "windows.split(8)", "windows.split(6)"),
    ("04", "(16 if", "(8 if"),
    ("05", "DigitsMLP(32", "DigitsMLP(30"),
    ("05", "lr=0.3", "lr=0.2"),
    ("06", "256 // ranks.n", "250 // ranks.n"),
    ("06", "lr=0.2", "lr=0.1"),
    ("07", "BATCH = 64 //", "BATCH = 50 //"),
    ("07", "DigitsMLP(512)", "DigitsMLP(300)"),
    ("08", "64 // n", "50 // n"),
    ("08", "EACH = 10 ", "EACH = 11 "),
    ("09", "8 * WORLD", "8 * WORLD - 3"),
    ("09", "4 * M", "4 * M - 3"),
    ("12", "WIDTH, ROWS = 64, 8", "WIDTH, ROWS = 48, 6"),
    ("12", "width=64", "width=50"),
    ("13", "width=128", "width=96"),
    ("13", "length=64", "length=48"),
    ("15", "[40, 80, 120", "[30, 90, 120"),
    ("15", "lr=0.1", "lr=0.08"),
]
NUMBERS = re.compile(r"\d[\d.,e-]*|\b(one|two|three|four|five|six|seven|eight)\b")
MOVE = '''
def _move_all():
    import ipywidgets

    registry = getattr(ipywidgets.widgets.widget, "_instances", None)
    everything = list((ipywidgets.Widget.widgets if registry is None else registry).values())
    problems, moved = [], 0
    for box in [w for w in everything if "pardist-live" in getattr(w, "_dom_classes", ())]:
        controls = [c for c in getattr(box, "children", ())[:-1] if isinstance(c, ipywidgets.ValueWidget)]
        for control in controls:
            page, seen, first = box.children[-1], set(), control.value
            for value in _others(control):
                control.value = value
                moved += 1
                seen.add(page.value)
                if "<img" not in page.value:
                    problems.append(f"{control.description} = {value!r}: {page.value[:300]}")
            control.value = first
            if len(seen | {page.value}) < 2:
                problems.append(f"{control.description}: the picture stays the same")
        for inner in [w for w in getattr(box, "children", ()) if isinstance(w, ipywidgets.HBox)]:
            slider = next(w for w in inner.children if isinstance(w, ipywidgets.SelectionSlider))
            before = slider.index
            inner.children[-1].click()
            moved += 1
            if slider.index == before and len(slider.options) > 1:
                problems.append("the stepper's button does not step")
            pages = [p.value for p in box.children[-1].children]
            if not all("<img" in p for p in pages):
                problems.append("the stepper has a page without a picture")
    return moved, problems


def _others(control):
    if hasattr(control, "_options_full"):
        values = [value for _, value in control._options_full]
    elif isinstance(control.value, bool):
        return [not control.value]
    else:
        values = [control.min, control.max]
    others = [v for v in values if v != control.value]
    return others[:1] + others[1:][-1:]


print(_move_all())
'''


@pytest.mark.share(2)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name[:2])
def test_on_other_numbers_of_ranks(path, n, tmp_path, monkeypatch):
    runs_and_says_the_same(path, tmp_path, monkeypatch, {"Ranks(4": f"Ranks({n}"})


@pytest.mark.share(1)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lesson, old, new", CHANGES)
def test_with_other_sizes(lesson, old, new, tmp_path, monkeypatch):
    runs_and_says_the_same(next(p for p in NOTEBOOKS if p.name[:2] == lesson), tmp_path, monkeypatch, {old: new})


@pytest.mark.share(1)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name[:2])
def test_every_widget_moves_after_run_all(path, tmp_path, monkeypatch):
    *_, last = executed(path, tmp_path, monkeypatch, {}, MOVE)
    moved, problems = eval(text_of(last))
    assert not problems, "\n".join(problems)
    assert moved or "pictures.knobs" not in path.read_text()


def runs_and_says_the_same(path, tmp_path, monkeypatch, changes):
    before = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    after = executed(path, tmp_path, monkeypatch, changes)
    wrong = []
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        for output in new.outputs:
            if output.output_type == "error":
                wrong.append(f"code cell {i}: {output.ename}: {output.evalue[:500]}\n{new.source[:200]}")
        was, now = verdicts(old), verdicts(new)
        if MADE_FOR not in text_of(new):
            wrong += [f"code cell {i}: “{k}”: {was[k]} → {now[k]}" for k in was.keys() & now.keys() if was[k] != now[k]]
            wrong += [f"code cell {i}: “{k}” is not said" for k in was.keys() - now.keys()]
    assert not wrong, "\n".join(wrong)


def executed(path, tmp_path, monkeypatch, changes, *more):
    """The code cells of a lesson, run with replacements in their text (each must be found), and with further ones."""
    monkeypatch.setenv("PARDIST_LIVE", "0")
    monkeypatch.setenv("PARDIST_ANSWERS", str(tmp_path / "answers"))
    notebook = nbformat.read(path, 4)
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    for old, new in changes.items():
        assert any(old in c.source for c in cells), f"{path.name} has no {old!r} any more"
        for cell in cells:
            cell.source = cell.source.replace(old, new)
    notebook.cells = cells + [nbformat.v4.new_code_cell(source) for source in more]
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=120, allow_errors=True, resources=resources).execute()
    return notebook.cells


def text_of(cell):
    """What a cell printed and, on lines of its own, what it showed."""
    return "".join(o.get("text") or f"\n{o.get('data', {}).get('text/plain', '')}\n" for o in cell.outputs)


def verdicts(cell):
    """{what is claimed, without its numbers: {True, False}} of a cell's text: lines with “… True”, “✓ …” or “✗ …”, and
    the rows of tables with “yes” or “no”."""
    found = {}
    for line in text_of(cell).splitlines():
        words = NUMBERS.sub("#", line)
        row = re.split(r" {2,}", words.strip())
        if claims := re.findall(r"([^:,;=]*?)[\s:=[(]*\b(True|False)\b", words):
            for claim, verdict in claims:
                found.setdefault(claim.strip(), set()).add(verdict == "True")
        elif match := re.match(r"\W*([✓✗]) (.*)", words):
            found.setdefault(match[2].strip(), set()).add(match[1] == "✓")
        for i, verdict in enumerate(row[1:], 1):
            if verdict in ("yes", "no"):
                found.setdefault(f"{row[0]}, column {i}", set()).add(verdict == "yes")
    return found
