"""check, hint, solution, progress: what a reader can do to them, and what they answer."""

import functools
import inspect
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from pardist_lib.lessons.exercises import bench, check, hint, progress, solution
from pardist_lib.lessons.exercises import reader as exercises
from pardist_lib.lessons.exercises.exercise import Exercise
from pardist_lib.lessons.exercises.reader import blank
from pardist_lib.lessons.exercises.watch import watched
from pardist_lib.lessons.worlds import group_of, in_world

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
    assert inspect.signature(empty) == inspect.signature(exercises._reference(name))
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
    for path in sorted(Path(__file__).parents[2].glob("notebooks/*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code" and "raise NotImplementedError" in text:
                name = re.search(r"^check\(\"(\w+)\", \1\)$", text, re.MULTILINE)[1]
                assert blank(name).strip() in text, f"{path.name}: the blank of {name} differs"
                assert path.name.startswith(exercises.exercises()[name])
                found.append(name)
    assert sorted(found) == sorted(NAMES)


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


def test_half_a_blank_is_an_answer_that_fails():
    def shard_rows(n, rank, world_size):
        start = n * rank // world_size
        if start >= 0:
            raise NotImplementedError

    verdict = check("shard_rows", shard_rows)
    assert verdict.status == "failed" and "`raise NotImplementedError` is still reached" in verdict.diagnosis


# ---- verdicts and files ---------------------------------------------------------------------------------------


def test_a_verdict_shows_itself_the_same_each_time(answers_folder):
    first, second = check("shard_rows", wrong_rows), check("shard_rows", wrong_rows)
    assert repr(first) == repr(second) and first._repr_html_() == second._repr_html_()
    assert repr(first).splitlines()[0] == "✗ shard_rows: failed"
    assert str(answers_folder) not in repr(first) + first._repr_html_()
    assert "<b>✗ shard_rows: failed</b>" in first._repr_html_() and "color:#" not in first._repr_html_()
    assert repr(check("shard_rows", rows)) == "✓ shard_rows: passed\n  Saved in pardist_answers/shard_rows.py."


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
    assert len(progress().rows) == len(NAMES) and check("shard_rows").status == "not tried yet"


def test_progress_is_a_table_by_lesson():
    check("shard_rows", rows), check("exchange", exercises_all_send)
    states = {row["exercise"]: (row["lesson"], row["status"]) for row in progress().rows}
    assert states["shard_rows"] == ("00", "passed") and states["exchange"] == ("01", "failed")
    assert states["ring_bytes"] == ("01", "not tried yet") and list(states) == NAMES
    assert progress().caption == f"1 of {len(NAMES)} exercises passed"


def exercises_all_send(tensor):
    return tensor


def test_hints_come_one_by_one_and_then_the_solution():
    exercises._shown.clear()
    steps = len(exercises._exercise("exchange").hints)
    texts = [hint("exchange").text for _ in range(steps + 1)]
    assert [text.count("\n") for text in texts[:steps]] == list(range(1, steps + 1))
    assert texts[0] in texts[0] and texts[-1] == texts[-2] and "solution('exchange')" in texts[-1]
    assert "```python\ndef exchange(" in solution("exchange")._repr_markdown_()


# ---- answers that misbehave -----------------------------------------------------------------------------------


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
        verdict = check(name, exercises._reference(name))
        assert verdict.status == "failed" and "the course's own" in verdict.diagnosis
    hidden = exercises._reference("shard_rows")
    assert "calls the course's own `shard_rows`" in check("shard_rows", lambda n, r, w: hidden(n, r, w)).diagnosis


def test_an_answer_that_raises():
    def raises(tensor):
        if dist.get_rank() == 2:
            raise ValueError("bad piece")
        dist.recv(tensor, 2)

    verdict = check("my_ring_all_reduce", raises)
    assert verdict.diagnosis == "rank 2 raised ValueError: bad piece"
    assert 'raise ValueError("bad piece")' in verdict.where and "on 4 ranks" in verdict.where
    assert "replaced" in verdict.note


def test_an_answer_that_never_returns():
    def forever(n, rank, world_size):
        while True:
            pass

    began = time.monotonic()
    verdict = check("shard_rows", forever)
    assert verdict.status == "failed" and verdict.diagnosis.startswith("it does not come back")
    assert time.monotonic() - began < 10
    assert check("shard_rows", rows).passed


class SlowToArrive:
    """An answer that takes its time to be unpickled, as a module takes its time to be imported."""

    def __call__(self, n, rank, world_size):
        return rows(n, rank, world_size)

    def __reduce__(self):
        return _after_a_while, ()


def _after_a_while():
    time.sleep(2)  # longer than the patience of these tests
    return SlowToArrive()


def test_slow_imports_are_no_hang():
    assert bench.Bench(SlowToArrive())._prepare("pardist_lib.lessons.lesson00.shard_rows") is None


@pytest.mark.parametrize("end, said", [(lambda: os._exit(3), "exit code 3"),
                                       (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL")])  # fmt: skip
def test_an_answer_that_ends_its_rank(end, said):
    def ends(tensor):
        if dist.get_rank() == 1:
            end()
        dist.recv(tensor, 1)

    verdict = check("exchange", ends)
    assert verdict.status == "failed" and "rank 1" in verdict.diagnosis and said in verdict.diagnosis
    assert check("shard_rows", rows).passed


def test_an_answer_that_exits_politely():
    def leaves(tensor):
        raise SystemExit

    assert "SystemExit" in check("exchange", leaves).diagnosis


def test_ten_megabytes_of_prints():
    def chatter(n, rank, world_size):
        if n == 8 and rank == 0:
            print("x" * 99 * 100_000, *range(1000), sep="\n")
        return rows(n, rank, world_size)

    def wrong_chatter(n, rank, world_size):
        chatter(n, rank, world_size)
        return 7

    assert check("shard_rows", chatter).passed
    verdict = check("shard_rows", wrong_chatter)
    assert "(int): a range is asked for" in verdict.diagnosis and 0 < len(verdict.printed) < 5000


@pytest.mark.parametrize("result", ["threading.Lock()", "(i for i in [1])", "object", "[[[[[[1]]]]]]", "float('nan')",
                                    "b'x' * 10**7", "torch.ones(2).to_sparse()", "{'a': 1}", "1 << 70"])  # fmt: skip
def test_results_that_are_not_asked_for(result):
    def answer(n, rank, world_size):
        return eval(result, {"threading": threading, "torch": torch})

    def numbers(size_in_bytes, n):
        return eval(result, {"threading": threading, "torch": torch})

    assert check("shard_rows", answer).status == check("ring_bytes", numbers).status == "failed"
    assert len(repr(check("shard_rows", answer))) < 2000


def test_an_answer_that_cannot_be_sent_to_the_ranks():
    lock = threading.Lock()

    def locks(n, rank, world_size):
        with lock:
            return rows(n, rank, world_size)

    verdict = check("shard_rows", locks)
    assert verdict.status == "failed" and "`lock`, which `locks` uses, cannot be sent" in verdict.diagnosis


def test_a_check_that_breaks_says_so_and_stops_nothing(monkeypatch):
    broken = Exercise((), lambda run: 1 / 0)
    monkeypatch.setattr(exercises, "_exercise", lambda name: broken)
    verdict = check("shard_rows", rows)
    assert verdict.status == "blocked" and "ZeroDivisionError" in verdict.diagnosis


def test_no_ranks_is_blocked_and_never_passed(monkeypatch, answers_folder):
    def none(n):
        raise RuntimeError("the ranks could not be started: no memory")

    monkeypatch.setattr(bench, "newest", lambda at_least: None)
    monkeypatch.setattr(bench, "Ranks", none)
    verdict = check("shard_rows", rows)
    assert verdict.status == "blocked" and "four ranks are needed" in verdict.diagnosis and not verdict.passed
    assert "range" in (answers_folder / "shard_rows.py").read_text()
    assert {row["exercise"]: row["status"] for row in progress().rows}["shard_rows"] == "saved, not checked"


def test_busy_ranks_are_blocked(ranks):
    busy = threading.Thread(target=lambda: ranks.run(time.sleep, 1.5, timeout=5))
    busy.start()
    time.sleep(0.3)
    verdict = check("shard_rows", rows)
    busy.join()
    assert verdict.status == "blocked" and "busy" in verdict.diagnosis


# ---- how answers are watched ----------------------------------------------------------------------------------


def who_am_i():
    total = torch.ones(1)
    dist.all_reduce(total)
    everyone = dist.get_process_group_ranks(dist.group.WORLD)
    return dist.get_rank(), dist.get_world_size(), total.item(), everyone


def test_smaller_worlds_on_the_same_ranks(ranks):
    for n in (1, 2, 3, 4):
        seen = ranks.run(in_world, n, who_am_i)
        assert seen == [(rank, n, float(n), list(range(n))) for rank in range(n)] + [None] * (4 - n)
    assert ranks.run(who_am_i) == [(rank, 4, 4.0, [0, 1, 2, 3]) for rank in range(4)]


def calls_of_all_kinds():
    half = group_of([0, 2]) if dist.get_rank() % 2 == 0 else group_of([0, 2]) and None
    x = torch.ones(2, dtype=torch.float64)

    def answer():
        dist.all_reduce(x.float() / 2)
        if half:
            functional.all_reduce(x, "sum", half)
            dist.all_reduce(x, group=half)

    return watched(answer)


def test_calls_are_seen_with_their_group_and_dtype(ranks):
    first, second = ranks.run(calls_of_all_kinds)[:2]
    assert [(c.op, c.bytes, c.dtype, c.group) for c in first.calls] == [
        ("all_reduce", 8, "float32", (0, 1, 2, 3)), ("all_reduce", 16, "float64", (0, 2)),
        ("all_reduce", 16, "float64", (0, 2)),
    ]  # fmt: skip
    assert len(second.calls) == 1 and "div" in first.ops and "add" not in first.ops and "float32" in first.dtypes


def test_a_failure_in_a_smaller_world_leaves_the_whole_one(ranks):
    def fails():
        raise KeyError(dist.get_world_size())

    with pytest.raises(bench.RankError):
        ranks.run(in_world, 2, fails)
    assert ranks.run(who_am_i)[3] == (3, 4, 4.0, [0, 1, 2, 3])


def test_a_check_leaves_no_trace_on_the_ranks(ranks):
    import sys

    from torch.distributed import Work

    def state():
        return repr(Work.wait), sys.getprofile(), torch.utils._python_dispatch._get_current_dispatch_mode() is None

    before = ranks.run(state)
    check("exchange", exercises_all_send)
    assert re.sub("0x\\w+", "", repr(ranks.run(state))) == re.sub("0x\\w+", "", repr(before))
