"""Ranked plans as a picture, and as a page whose numbers are Python's in a browser that has no network."""

import os
import shutil
from itertools import product

import pytest

from pardist_lib import pictures
from pardist_lib.measure.planner import Estimate, best_plans
from pardist_lib.measure.published import H100, MODELS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PLAN = {"plan": "dp4", "parts": {"compute": 2.0, "data": 0.5}, "memory": 4e9}


def test_a_picture_says_what_it_shows():
    seen = pictures.plans([PLAN, PLAN | {"plan": "tp4", "why": "slower"}], title="four")
    assert seen.alt == "four: 1. dp4, 2.5 s, 4 GB; 2. tp4, 2.5 s, 4 GB (slower)."
    assert [row["seconds"] for row in seen.rows] == [2.5, 2.5] and seen.rows[0]["data"] == 0.5


@pytest.mark.parametrize(
    "wrong, told",
    [
        ([], "at least one"),
        ([{"plan": "dp4"}], "expected {'plan'"),
        ([PLAN | {"parts": {"compute": -1}}], "in 'dp4' there are negative seconds"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        pictures.plans(wrong)


def test_a_page_needs_every_combination(tmp_path):
    with pytest.raises(ValueError, match="there is no result for a, 2"):
        pictures.plans_page(tmp_path / "x.html", {"k": ["a"], "n": ["1", "2"]}, {("a", "1"): [PLAN]})
    with pytest.raises(ValueError, match="must end in .html"):
        pictures.plans_page(tmp_path / "x.txt", {"k": ["a"]}, {("a",): [PLAN]})


def ranked(found):
    return [
        {"plan": str(r.plan), "parts": {p: getattr(r.estimate, p) for p in Estimate.PARTS}, "why": r.why,
         "memory": r.estimate.memory["total"], "mfu": r.estimate.mfu}
        for r in found
    ]  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.skipif(not CHROMIUM and not os.environ.get("CI"), reason="no Chromium on this machine")
def test_the_pages_numbers_are_pythons(tmp_path):
    from playwright.sync_api import sync_playwright

    knobs, results = {"model": ["Llama 3 8 B", "GPT-3 175 B"], "GPUs": ["8", "64"]}, {}
    for model, gpus in product(*knobs.values()):
        try:
            found = ranked(best_plans(MODELS[model], H100, int(gpus), 64, most=3))
        except ValueError as error:
            found = str(error)
        results[model, gpus] = found
    path = pictures.plans_page(tmp_path / "plans.html", knobs, results, title="Plans <b>", note="computed")
    assert "http" not in path.read_text().replace("http-equiv", "")
    with sync_playwright() as p:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
        browser = p.chromium.launch(executable_path=CHROMIUM, args=flags)
        page, errors, asked = browser.new_page(), [], []
        page.on("pageerror", lambda error: errors.append(error))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        assert page.title() == "Plans <b>"
        for key, expected in results.items():
            for name, choice in zip(knobs, key, strict=True):
                page.select_option(f"select[name={name}]", choice)
            if isinstance(expected, str):
                assert page.text_content("#none") == expected
                continue
            items = page.eval_on_selector_all(
                "li", "all => all.map(i => [+i.dataset.seconds, +i.dataset.memory, i.querySelector('b').textContent,"
                "i.querySelector('.why').textContent])"
            )  # fmt: skip
            assert items == [[sum(r["parts"].values()), r["memory"], r["plan"], r["why"]] for r in expected]
            titles = page.eval_on_selector_all("li:first-child .bar span", "all => all.map(s => s.title)")
            assert len(titles) == sum(1 for v in expected[0]["parts"].values() if v > 0)
        assert not errors and len(asked) == 1
        browser.close()
    assert any(isinstance(found, str) for found in results.values())
