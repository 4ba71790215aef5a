import re

import pytest

from pardist_lib.pictures import Table


def test_text_and_html_have_every_value():
    table = Table([{"rank": 0, "bytes": 1572864, "ms": 0.123456}, {"rank": 1, "note": "<late>"}], "traffic")
    assert repr(table) == "\n".join(
        [
            "traffic",
            "rank      bytes     ms  note",
            "────  ─────────  ─────  ──────",
            "   0  1,572,864  0.123",
            "   1                    <late>",
        ]
    )
    html = table._repr_html_()
    assert "1,572,864" in html and "&lt;late&gt;" in html and "<late>" not in html and "traffic" in html


def test_column():
    table = Table([{"a": 1}, {"b": 2}])
    assert table.column("a") == [1, None] and len(table) == 2
    with pytest.raises(KeyError, match="there are a, b"):
        table.column("c")


def test_rows_must_be_dicts():
    with pytest.raises(ValueError, match="dict"):
        Table([(1, 2)])


def test_an_empty_table_shows_itself():
    assert "<table>" in Table([])._repr_html_() and repr(Table([], "nothing")).startswith("nothing")


def test_fractions_of_a_column_have_the_same_decimals():
    assert repr(Table([{"s": 0.5613}, {"s": 12.3}, {"s": 5}])).split() == ["s", "──────", "0.561", "12.300", "5.000"]
    assert repr(Table([{"s": 1e-9}, {"s": 12.3}])).split() == ["s", "─────", "1e-09", "12.3"]  # too far apart
    assert repr(Table([{"n": 1}, {"n": 2000}])).split() == ["n", "─────", "1", "2,000"]


def test_numbers_stand_to_the_right_also_as_texts_with_a_unit():
    rows = [{"n": "1,813", "part": "67%", "off": "+5%", "size": "100 MB", "plan": "dp4", "kept": None, "sum": "2 + 2"}]
    sides = re.findall(r'<th scope="col" style="text-align:(\w+)">(\w+)</th>', Table(rows)._repr_html_())
    assert dict((name, side) for side, name in sides) == {
        "n": "right", "part": "right", "off": "right", "size": "right", "plan": "left", "kept": "left", "sum": "left"
    }  # fmt: skip
