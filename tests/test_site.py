"""The site is built from the committed notebooks, nothing executed: links lead somewhere, pictures have words."""

import pytest

from pardist_lib import site


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")  # MyST's own
def test_the_site(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("the build wants the network")

    monkeypatch.setattr("socket.create_connection", no_network)
    pages = site.build(tmp_path / "site")  # raises for a broken link, or a picture without alt text
    lessons = sorted((site.ROOT / "notebooks").glob("*.ipynb"))
    assert {p.stem for p in pages} >= {path.stem for path in lessons} | {"index", "search"}
    first = (tmp_path / "site" / "notebooks" / f"{lessons[0].stem}.html").read_text()
    assert 'alt="gradient of the last layer' in first and "pardist-live" not in first
    assert "Run this cell" not in first and "in words</summary>" in first
    assert (tmp_path / "site" / "searchindex.js").is_file()
    for lesson, page in ("12", "slow.html"), ("13", "plans.html"):
        text = next((tmp_path / "site" / "notebooks").glob(f"{lesson}_*.html")).read_text()
        assert f'<iframe src="{page}"' in text and "<script" in (tmp_path / "site" / "notebooks" / page).read_text()
    assert "ring_all_reduce.gif" in (tmp_path / "site" / "index.html").read_text()
    assert "The lessons" in (tmp_path / "site" / "index.html").read_text()


def test_what_is_wrong_with_a_page_is_told(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<img src="a.png" alt="../_images/a.png"><img alt="words" src="page.html"><a href="gone.html#x">x</a>'
        '<a href="page.html">y</a><a href="#here">z</a><a href="https://example.org/a">w</a>'
    )
    said = site.problems(page, tmp_path)
    assert sorted(text.partition(": ")[2][:38] for text in said) == [
        "a link that leads nowhere: a.png",
        "a link that leads nowhere: gone.html#x",
        'a picture without alt text: <img src="',
    ]


def test_a_folder_without_notebooks_is_told(tmp_path):
    with pytest.raises(ValueError, match="there are no notebooks"):
        site.build(tmp_path / "site", root=tmp_path)
