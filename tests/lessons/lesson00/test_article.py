"""The article's programs as the lesson shows and runs them."""

import html
import re

import pytest

from pardist_lib.lessons.lesson00 import article


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_step_is_shown_as_what_changed(step):
    shown = article.show(step).data
    lines = re.findall(r'<div style="background:(.+?)">(.*?)</div>', shown)
    old, new = (article.PROGRAMS[i].read_text().splitlines() for i in (step - 1, step))
    for shade, line in lines:
        assert (line[0] == "+") == shade.startswith("rgba(46") and (line[0] == "-") == shade.startswith("rgba(248")
    added = [html.unescape(line[1:]) for _, line in lines if line[0] == "+"]
    assert added and [line for line in added if line and line not in old] == [line for line in new if line not in old]
    assert "distributed.nn" not in shown and max(len(html.unescape(line)) for _, line in lines) <= 110


def test_the_first_step_marks_what_is_ours():
    assert article.show(0).data.count("# ours") == 6


def test_a_program_that_takes_too_long_says_so_in_one_line(capsys):
    article.run(0, seconds=0.01)
    assert capsys.readouterr().out == (
        "It did not end within 0.01 seconds, and was stopped: article.run(0, seconds=…) waits longer.\n"
    )
