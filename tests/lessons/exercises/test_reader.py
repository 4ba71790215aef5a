"""check, hint, solution, progress: what a reader can do to them, and what they answer."""

import functools
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pardist_lib.lessons.exercises import bench, check, hint, progress, solution
from pardist_lib.lessons.exercises import reader as exercises
from pardist_lib.lessons.exercises.exercise import Exercise
from pardist_lib.lessons.exercises.reader import blank

pytestmark = pytest.mark.usefixtures("ranks", "answers_folder")
NAMES = list(exercises.exercises())


def rows(n, rank, world_size):  # a right answer to shard_rows
    return range(n * rank // world_size, n * (rank + 1) // world_size)


def wrong_rows(n, rank, world_size):
    return range(n)


def made_from(text, name, path="<cell>"):
    names = {"torch": torch, "dist": dist}
    exec(compile(text, path, "exec"), names)
    return names[name]


# ---- blanks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_blank_is_not_tried_yet_and_needs_no_ranks(name, answers_folder, monkeypatch):
    monkeypatch.setattr(bench, "four_ranks", lambda: pytest.fail("a blank needs no ranks"))
    empty = made_from(blank(name), name)
    assert inspect.signature(empty) == inspect.signature(exercises.reference(name))
    verdict = check(name, empty)
    assert verdict.status == "not tried yet" and not verdict.passed
    assert not answers_folder.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_blank_is_signature_and_docstring_only(name):
    text = blank(name)
    assert text.endswith('"""\n    raise NotImplementedError\n') and text.startswith(f"def {name}(")
    body = solution(name).code
    assert body.startswith(text.removesuffix("    raise NotImplementedError\n")) and body.count("\n") <= 40
    assert max(map(len, body.splitlines())) <= 120


def test_the_notebooks_blanks_are_the_solutions_signatures():
    found = []
    for path in sorted(Path(__file__).parents[3].glob("notebooks/*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code" and "raise NotImplementedError" in text:
                name = re.search(r"^check\(\"(\w+)\", \1\)$", text, re.MULTILINE)[1]
                assert blank(name).strip() in text, f"{path.name}: the blank of {name} differs"
                assert path.name.startswith(exercises.exercises()[name])
                found.append(name)
    assert sorted(found) == sorted(NAMES), f"no notebook has the blank of {set(NAMES) - set(found)}"
    assert found == NAMES, "progress() lists exercises in another order than the notebooks"


def test_a_blank_with_words_is_a_blank():
    def shard_rows(n, rank, world_size):
        """Mine."""
        # what comes here?
        raise NotImplementedError("not yet")

    assert check("shard_rows", shard_rows).status == "not tried yet"


def test_a_blank_after_an_answer_points_to_it(answers_folder):
    assert check("shard_rows", rows).passed
    verdict = check("shard_rows", made_from(blank("shard_rows"), "shard_rows"))
    assert verdict.status == "not tried yet" and "pardist_answers/shard_rows.py (passed)" in verdict.note
    assert check("shard_rows").passed


# ---- verdicts and files ---------------------------------------------------------------------------------------


def test_a_verdict_shows_itself_the_same_each_time(answers_folder):
    first, second = check("shard_rows", wrong_rows), check("shard_rows", wrong_rows)
    assert repr(first) == repr(second) and first._repr_html_() == second._repr_html_()
    assert repr(first).splitlines()[0] == "✗ shard_rows: failed"
    assert str(answers_folder) not in repr(first) + first._repr_html_()
    assert "<b>✗ shard_rows: failed</b>" in first._repr_html_() and "color:#" not in first._repr_html_()
    passed, why, saved = repr(check("shard_rows", rows)).splitlines()
    assert (passed, saved) == ("✓ shard_rows: passed", "  Saved in pardist_answers/shard_rows.py.")
    assert why.strip() == exercises.exercise_of("shard_rows").why


def test_html_shows_what_an_answer_printed_as_text():
    def answer(n, rank, world_size):
        print("<script>x</script>")
        return "<b>"

    verdict = check("shard_rows", answer)
    assert verdict.printed and "<script>" not in verdict._repr_html_() and "&lt;script&gt;" in verdict._repr_html_()


def test_answers_survive_and_are_checked_again(answers_folder):
    assert check("shard_rows", rows).passed
    verdict = check("shard_rows", wrong_rows)
    assert verdict.status == "failed"
    assert verdict.note == "Your earlier answer, which passed, is kept in pardist_answers/shard_rows.py."
    assert check("shard_rows").passed  # the one that passed is still there
    assert "wrong_rows" in (answers_folder / "history" / "shard_rows.2.py").read_text()
    file = answers_folder / "shard_rows.py"
    file.write_text("def shard_rows(n, rank, world_size):\n    return range(rank, n, world_size)\n")
    assert check("shard_rows").passed
    file.write_text("def shard_rows(n, rank, world_size)\n    return range(n)\n")
    verdict = check("shard_rows")
    assert verdict.status == "failed" and "SyntaxError" in verdict.diagnosis and "line 1" in verdict.where


def test_nothing_saved_yet():
    verdict = check("exchange")
    assert verdict.status == "not tried yet" and "check('exchange', exchange)" in verdict.note


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARDIST_ANSWERS", str(tmp_path / "file" / "below"))
    verdict = check("shard_rows", rows)
    assert verdict.passed and "could not be saved" in verdict.note
    assert len(progress("all").rows) == len(NAMES) and check("shard_rows").status == "not tried yet"


def gives_itself(tensor):
    return tensor


def test_progress_is_a_table_by_lesson():
    check("shard_rows", rows), check("exchange", gives_itself)
    states = {row["exercise"]: (row["lesson"], row["status"]) for row in progress("all").rows}
    assert states["shard_rows"] == ("00", "passed") and states["exchange"] == ("01", "failed")
    assert states["ring_bytes"] == ("01", "not tried yet") and list(states) == NAMES
    assert progress().caption == f"1 of {len(NAMES)} exercises passed"
    *these, others = progress().rows  # of the lesson whose exercise was checked last
    assert {row["lesson"] for row in these} == {"01"} and others["status"] == f"1 of {len(NAMES) - len(these)} passed"
    assert progress(0).rows[0]["exercise"] == "shard_rows" and len(progress(0).rows) == 4
    with pytest.raises(ValueError, match="no lesson '99'"):
        progress(99)


def test_hints_come_one_by_one_and_then_the_solution():
    exercises._shown.clear()
    steps = len(exercises.exercise_of("exchange").hints)
    texts = [hint("exchange").text for _ in range(steps + 1)]
    assert [text.count("\n") for text in texts[:steps]] == list(range(1, steps + 1))
    assert texts[0] in texts[0] and texts[-1] == texts[-2] and "solution('exchange')" in texts[-1]
    assert "```python\ndef exchange(" in solution("exchange")._repr_markdown_()


# ---- what is no answer, and a check that breaks -----------------------------------------------------------------


def test_an_unknown_name():
    verdict = check("my_ring_all_reduse", rows)
    assert verdict.status == "blocked" and "did you mean 'my_ring_all_reduce'?" in verdict.diagnosis
    assert "did you mean 'exchange'" in hint("exchnge").text and "did you mean" in solution("shard_row").text
    assert "check('rows', rows)" in check(rows).diagnosis
    assert check(None).status == check("").status == check(3, rows).status == "blocked"


@pytest.mark.parametrize("answer", [3, torch.ones(2), range(4), "text"])
def test_an_answer_that_is_no_function(answer):
    assert "give check the function itself" in check("shard_rows", answer).diagnosis


def test_a_wrong_signature():
    verdict = check("average_gradients", lambda model: None)
    assert verdict.status == "failed" and "has to take (model, group)" in verdict.diagnosis
    assert (verdict.expected, verdict.got) == ("(model, group)", "(model)")


def test_other_spellings_of_a_signature_are_welcome():
    assert check("shard_rows", lambda *args: rows(*args)).passed
    assert check("shard_rows", functools.partial(rows)).passed

    class Callable:
        def __call__(self, n, rank, world_size):
            return rows(n, rank, world_size)

    verdict = check("shard_rows", Callable())
    assert verdict.passed and "not saved" in verdict.note


def test_generators_and_coroutines():
    def gives(n, rank, world_size):
        yield n

    async def later(n, rank, world_size):
        return range(n)

    assert all("calling it runs nothing" in check("shard_rows", f).diagnosis for f in (gives, later))


def test_the_courses_own_function():
    for name in NAMES:
        verdict = check(name, exercises.reference(name))
        assert verdict.status == "failed" and "the course's own" in verdict.diagnosis
    hidden = exercises.reference("shard_rows")
    assert "calls the course's own `shard_rows`" in check("shard_rows", lambda n, r, w: hidden(n, r, w)).diagnosis


def test_a_check_that_breaks_says_so_and_stops_nothing(monkeypatch):
    broken = Exercise((), lambda run: 1 / 0)
    monkeypatch.setattr(exercises, "exercise_of", lambda name: broken)
    verdict = check("shard_rows", rows)
    assert verdict.status == "blocked" and "ZeroDivisionError" in verdict.diagnosis
