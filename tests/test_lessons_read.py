"""What a reader has before them: length of the straight path, width of code, verdicts that say what equals what.

The straight path of a lesson is what is not an exercise (from "## Your turn" to the next "## "), nor behind a fold: a
`<details>`, or a section "### More: …", which is collapsed when the notebook is opened.

    python -m tests.test_lessons_read          the table: lesson × words, cells, minutes
"""

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
WORDS, CELLS, WIDTH = 1600, 30, 100
TWO_PATHS = ("06", "10")  # lessons in two parts, with a rest between them
PACE = 130, 0.6  # words a minute, minutes for a cell: read, run, looked at


def straight_path(path):
    """(words, code cells) of it."""
    words = cells = 0
    skipping = ""  # the heading of the section that is not on it
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown":
            heading = re.match(r"(#+) +(.*)", cell.source)
            if heading and skipping and len(heading[1]) <= len(skipping):
                skipping = ""
            if heading and (heading[2].startswith("More: ") or heading[2].startswith("Your turn")):
                skipping = heading[1]
            if not skipping:
                text = re.sub(r"<details.*?</details>", "", cell.source, flags=re.S)
                words += len(re.findall(r"[\w’'-]+", re.sub(r"\]\([^)]*\)|`[^`]*`", " x ", text)))
        elif not skipping:
            cells += 1
    return words, cells


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name[:2])
def test_the_straight_path_is_short(path):
    times = 2 if path.name[:2] in TWO_PATHS else 1
    words, cells = straight_path(path)
    assert words <= 1.05 * WORDS * times and cells <= CELLS * times, f"{words} words, {cells} cells"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name[:2])
def test_what_is_folded_is_collapsed(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown" and re.match(r"#+ +More: ", cell.source):
            assert cell.metadata.get("jp-MarkdownHeadingCollapsed"), cell.source.splitlines()[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name[:2])
def test_code_fits_a_laptop(path):
    cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    wide = [line for source in cells for line in source.splitlines() if len(line) > WIDTH]
    assert not wide, "\n".join(wide)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name[:2])
def test_no_line_is_a_bare_true(path):
    bare = []
    for cell in nbformat.read(path, 4).cells:
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            bare += [line for line in text.splitlines() if re.search(r"\b(True|False)[)\]}]*\.?$", line)]
    assert not bare, "\n".join(bare)


if __name__ == "__main__":
    print(f"{'lesson':<45}{'words':>7}{'cells':>7}{'minutes':>9}")
    for path in NOTEBOOKS:
        words, cells = straight_path(path)
        print(f"{path.stem:<45}{words:>7}{cells:>7}{words / PACE[0] + cells * PACE[1]:>9.0f}")
