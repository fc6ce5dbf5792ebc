"""The pages that `make demo` left, in headless Chromium; skipped where the demo was not run or Chromium is absent.

Run: `make demo && python -m pytest tests/training/test_demo_pages.py`. `L2D_DEMO` names another folder than `demo`;
`L2D_SCREENSHOTS` one to keep the pictures in.
"""

import json
import os
from pathlib import Path

import pytest

from tests.browser.chromium import Browser, find_chromium

DEMO = Path(os.environ.get("L2D_DEMO") or Path(__file__).parents[2] / "demo")
pytestmark = [
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine"),
    pytest.mark.skipif(not (DEMO / "leaderboard.html").is_file(), reason=f"no finished demo in {DEMO}: run make demo"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One browser for all tests here."""
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["leaderboard", "trace"])
def test_opens_without_errors_and_fits(browser, name, width, tmp_path):
    browser.open(DEMO / f"{name}.html", width)
    shots = Path(os.environ.get("L2D_SCREENSHOTS") or tmp_path)
    assert browser.screenshot(shots / f"demo-{name}-{width}.png").stat().st_size > 10_000
    assert browser.messages == [] and len(browser.requests) == 1
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def visible(browser, attribute: str) -> list[str]:
    """Values of a column's visible rows, from top to bottom."""
    rows = "[...document.querySelectorAll('#board tbody tr:not([hidden])')]"
    return browser.run(f"{rows}.map(row => row.querySelector('[data-label=\"{attribute}\"]').dataset.value)")


def test_leaderboard_shows_every_result_sorts_and_filters(browser):
    browser.open(DEMO / "leaderboard.html")
    rows = json.loads((DEMO / "leaderboard.json").read_text())["rows"]
    values = [float(value) for value in visible(browser, "l2d_demo_products")]
    assert sorted(values) == sorted(row["scores"]["l2d_demo_products"]["value"] for row in rows)
    heading = "[...document.querySelectorAll('#board th')].find(th => th.textContent.includes('l2d_demo_products'))"
    browser.run(f"({heading}.querySelector('button') || {heading}).click()")
    ordered = [float(value) for value in visible(browser, "l2d_demo_products")]
    assert ordered in (sorted(values), sorted(values, reverse=True))
    browser.run("(s => { s.value = 'LoRA'; s.dispatchEvent(new Event('input', {bubbles: true})) })"
                "(document.querySelector('input[type=search]'))")  # fmt: skip
    assert len(visible(browser, "l2d_demo_products")) == 2


def test_a_drill_down_opens(browser):
    browser.open(DEMO / "leaderboard.html")
    browser.run("[...document.querySelectorAll('#board button, #board a')]"
                ".find(b => b.textContent.trim() === 'samples').click()")  # fmt: skip
    browser.wait("document.getElementById('drill').open")
    assert browser.run("document.querySelectorAll('#drill .sample').length") > 0
    assert "^" in browser.run("document.getElementById('drill-list').textContent")
