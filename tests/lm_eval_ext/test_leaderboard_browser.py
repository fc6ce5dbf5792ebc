"""The leaderboard's page in headless Chromium: sorting, filters, samples, keyboard, size; skipped where it is absent.

Run: `python -m pytest tests/lm_eval_ext/test_leaderboard_browser.py` (about 15 seconds). Screenshots at 390 and
1440 pixels are
kept in pytest's temporary folder, or in the folder that `L2D_SCREENSHOTS` names.
"""

import os
import time
from pathlib import Path

import pytest

from lm_eval_ext.leaderboard.__main__ import write_leaderboard
from tests.browser.chromium import Browser, find_chromium
from tests.conftest import JUDGE_SECONDS
from tests.lm_eval_ext.test_leaderboard import NASTY, coins, write_demo, write_run

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One browser for all tests here."""
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report with every kind of row, an incomparable one and a file left out."""
    folder = tmp_path_factory.mktemp("leaderboard")
    runs = write_demo(folder / "runs")
    shots = {"n-shot": {"gsm8k": 5, "humaneval": 0}}
    odd = {task: coins(40, 0.9, 5) for task in ("gsm8k", "humaneval")}
    write_run(runs / "odd", odd, model="l2d", l2d={"sampler": {"budget": 31}}, **shots)
    (runs / f"results_{NASTY.replace('/', '')[:40]}.json").write_text("{")
    write_leaderboard([runs], folder)
    return folder / "leaderboard.html"


def screenshots(tmp_path_factory) -> Path:
    """Where pictures are kept."""
    return Path(os.environ.get("L2D_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))


def column(browser: Browser, name: str) -> list[str]:
    """Values of the visible rows of a column, from top to bottom."""
    return browser.run(
        f"[...document.querySelectorAll('#board tbody tr:not([hidden])')].map(row => "
        f"row.querySelector('[data-label=\"{name}\"]').dataset.value)"
    )


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_opens_without_errors_or_network_and_fits(browser, page, width, dark, tmp_path_factory):
    browser.open(page, width, dark=dark)
    name = f"leaderboard-{width}{'-dark' if dark else ''}.png"
    picture = browser.screenshot(screenshots(tmp_path_factory) / name)
    assert picture.stat().st_size > 20_000
    assert browser.messages == []
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("window.hacked === undefined && document.querySelectorAll('img').length === 0")
    assert browser.run("document.querySelectorAll('figure svg').length") >= 6
    if width == 390:
        assert browser.run("getComputedStyle(document.querySelector('#board thead')).display") == "none"


def test_sorts_by_click_and_by_the_phone_menu(browser, page):
    browser.open(page)
    budgets = column(browser, "Budget T")
    head = "[...document.querySelectorAll('#board thead th')].find(th => th.textContent.includes('gsm8k'))"
    browser.run(f"{head}.querySelector('button').click()")
    scores = [float(value) for value in column(browser, "gsm8k")]
    assert scores == sorted(scores, reverse=True) and len(scores) == 8
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "descending"
    browser.run(f"{head}.querySelector('button').click()")
    assert [float(value) for value in column(browser, "gsm8k")] == sorted(scores)
    browser.run("sorter.value = '0 0'; sorter.dispatchEvent(new Event('change'))")
    assert column(browser, "Budget T") == budgets


def test_missing_values_sort_last_both_ways(browser, page):
    browser.open(page)
    for _ in range(2):
        browser.run(
            "[...document.querySelectorAll('#board thead button')].find(b => b.textContent === 'Tokens / s').click()"
        )
        assert column(browser, "Tokens / s")[-2:] == ["", ""]


def test_filters(browser, page):
    browser.open(page)
    browser.run("search.value = 'T = 7'; search.dispatchEvent(new Event('input', {bubbles: true}))")
    assert column(browser, "Budget T") == ["7"]
    assert browser.run("document.getElementById('count').textContent") == "1 of 8"
    browser.run(
        "search.value = ''; method.value = 'LoRA finetuning'; method.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert len(column(browser, "Budget T")) == 1
    browser.run("method.value = ''; comparable.click()")
    assert "31" not in column(browser, "Budget T") and len(column(browser, "Budget T")) == 7


def test_samples_changed_answers_first(browser, page, tmp_path_factory):
    browser.open(page, height=1000)
    browser.run("document.querySelector('#row-4 button.open[data-task=gsm8k]').click()")
    browser.wait("document.getElementById('drill').open")
    browser.screenshot(screenshots(tmp_path_factory) / "leaderboard-samples.png", whole=False)
    kinds = browser.run("[...document.querySelectorAll('.sample')].map(card => card.className.split(' ')[1])")
    order = ["gained", "lost", "changed", "same"]
    assert kinds == sorted(kinds, key=order.index) and len(kinds) == 40 and {"gained", "lost"} <= set(kinds)
    assert NASTY in browser.run("document.getElementById('drill-list').textContent")
    assert browser.run("window.hacked === undefined && document.querySelectorAll('#drill img').length === 0")
    show = "document.getElementById('drill-show')"
    browser.run(f"{show}.value = 'lost'; {show}.dispatchEvent(new Event('input'))")
    assert browser.run("document.querySelectorAll('.sample').length") == kinds.count("lost")
    assert browser.messages == []


def test_keyboard_reaches_table_and_samples(browser, page):
    browser.open(page)
    browser.press("Tab")
    assert browser.run("document.activeElement.textContent") == "Skip to the table"
    browser.run("document.querySelector('#board thead button').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('#board thead th').getAttribute('aria-sort')") == "ascending"
    browser.run("document.querySelector('#row-3 button.open').focus()")
    browser.press("Enter")
    browser.wait("document.getElementById('drill').open")
    browser.press("Escape")
    browser.wait("!document.getElementById('drill').open")
    assert browser.run("document.activeElement.classList.contains('open')")  # focus is back where it was


def test_a_row_links_to_its_provenance(browser, page):
    browser.open(page)
    browser.run("document.querySelector('#row-3 th a').click()")
    browser.wait("document.getElementById('from-3').open")
    assert "lm_eval --model l2d" in browser.run("document.getElementById('from-3').textContent")


def test_prints_on_paper(browser, page, tmp_path_factory):
    browser.open(page)
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.screenshot(screenshots(tmp_path_factory) / "leaderboard-print.png")
    assert browser.run("getComputedStyle(document.getElementById('filters')).display") == "none"
    browser.call("Emulation.setEmulatedMedia", media="")


def test_200_files_with_20000_samples(browser, tmp_path):
    write_run(tmp_path / "runs" / "base", {"gsm8k": coins(100, 0.4, 0)})
    for number in range(199):
        sampler = {"budget": 2 * (number % 15) + 3, "seed": number // 15}
        scores = {"gsm8k": coins(100, 0.4 + number / 500, number)}
        write_run(tmp_path / "runs" / f"{number}", scores, model="l2d", l2d={"sampler": sampler})
    start = time.monotonic()
    board = write_leaderboard([tmp_path / "runs"], tmp_path / "out")
    built = time.monotonic() - start
    opened = browser.open(tmp_path / "out" / "leaderboard.html")
    print(f"built in {built:.1f} s, opened in {opened:.2f} s")
    assert len(board.rows) == 200 and sum(len(c.samples) for r in board.rows for c in r.cells.values()) == 20_000
    assert browser.messages == [] and (not JUDGE_SECONDS or (built < 60 and opened < 2))
    browser.run("document.querySelectorAll('button.open')[150].click()")
    browser.wait("document.getElementById('drill').open")
