"""The page in a browser: sorting, filters, the address, small screens, and no request. Run by `make test-browser`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.results.report import page
from tests.support.synthetic import report_of, sweep
from tools.browser import CHROMIUM, Browser

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

METHODS = "[...document.querySelectorAll('table.board tbody tr:not([hidden]) th')].map(e => e.textContent)"
SORTED = "[...document.querySelectorAll('th[aria-sort]')].map(e => [e.textContent, e.getAttribute('aria-sort')])"
COUNT = "document.querySelector('output').value"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "leaderboard.html"
    methods = ("zero_shot", "logit_head", "craft", "bbt", "taskres")
    rows = [row for trial in sweep(methods=methods, seeds=(1, 2, 3)) for row in trial]
    path.write_text(page(report_of(rows, title="Demo", label="A label.")))
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as one:
        yield one


@pytest.fixture
def tab(browser: Browser, address: str) -> Browser:
    browser.events.clear()
    browser.look(1280, 900)
    browser.open(address)
    return browser


def choose(tab: Browser, name: str, value: str) -> None:
    tab.run(
        f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('input', {{bubbles: true}})) }})"
        f"(document.getElementById('filters').elements['{name}'])"
    )


def numbers(tab: Browser, column: int) -> list[float]:
    cells = (
        f"[...document.querySelectorAll('table.board tbody tr:not([hidden])')].map(r => r.cells[{column}].dataset.v)"
    )
    return [float(v) for v in tab.run(cells)]


def test_it_starts_with_the_means_at_the_most_shots_best_first(tab: Browser) -> None:
    assert tab.run(METHODS) == ["taskres *", "craft *", "logit_head (ref) =", "bbt", "zero_shot (ref)"]
    assert tab.run(SORTED) == [["accuracy", "descending"]] and tab.run("location.hash") == ""
    assert tab.run(COUNT).startswith("5 of ")


def test_a_header_sorts_by_click_and_by_keyboard(tab: Browser) -> None:
    at = tab.run("[...document.querySelectorAll('thead th')].findIndex(e => e.textContent === 'requests')")
    tab.run(f"document.querySelectorAll('thead th')[{at}].firstChild.click()")
    assert tab.run(SORTED) == [["requests", "descending"]]
    assert numbers(tab, at) == sorted(numbers(tab, at), reverse=True)
    tab.run(f"document.querySelectorAll('thead th')[{at}].firstChild.focus()")
    tab.press("Enter", 13, "\r")
    assert tab.run(SORTED) == [["requests", "ascending"]]
    assert numbers(tab, at) == sorted(numbers(tab, at)) and tab.run("location.hash") == "#sort=requests&order=ascending"


def test_filters_and_order_are_in_the_address_and_come_back(tab: Browser, address: str) -> None:
    choose(tab, "method", "C")
    choose(tab, "class", "scores")
    choose(tab, "data", "digits")
    choose(tab, "shots", "4")
    choose(tab, "budget", "")
    assert tab.run(METHODS) == ["craft *", "craft ="]
    found = tab.run("location.hash")
    for part in ("method=C", "class=scores", "data=digits", "shots=4", "budget="):
        assert part in found
    tab.open(address + found)
    assert (
        tab.run(METHODS) == ["craft *", "craft ="] and tab.run("document.getElementById('filters').shots.value") == "4"
    )
    tab.run("document.querySelector('button[type=reset]').click()")
    assert tab.run(COUNT).startswith("5 of ") and tab.run("location.hash") == ""


def test_an_unknown_address_shows_the_start(tab: Browser, address: str) -> None:
    for odd in ("#shots=999&sort=<b>&order=up", "#table", "#=", "#%E0%A4%A=1"):
        tab.open(address + odd)
        assert tab.run(COUNT).startswith("5 of "), odd
    assert errors(tab) == []


def test_it_makes_no_request_and_no_error(tab: Browser, address: str) -> None:
    choose(tab, "data", "")
    tab.run("document.querySelectorAll('details').forEach(e => { e.open = true })")
    requests = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert set(requests) <= {address, "about:blank"} and errors(tab) == []
    assert tab.run("fetch('https://example.org').then(() => 'sent', () => 'refused')") == "refused"


def errors(tab: Browser) -> list[Any]:
    kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    return [e["params"] for e in tab.events if e["method"] in kinds]


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_only_boxes_scroll(tab: Browser, dark: bool) -> None:
    tab.look(390, 844, dark)
    tab.run("document.querySelectorAll('details').forEach(e => { e.open = true })")
    choose(tab, "data", "")
    assert tab.run("document.documentElement.scrollWidth") <= 390
    assert tab.run("document.querySelector('.wide').scrollWidth > document.querySelector('.wide').clientWidth")
    background = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark


def test_figure_and_table_are_on_the_first_screen(tab: Browser) -> None:
    for what in ("figure svg", "table.board"):
        box = tab.run(f"document.querySelector('{what}').getBoundingClientRect().toJSON()")
        assert box["top"] < 300 and box["left"] >= 0


def test_on_paper_everything_is_open_and_controls_are_gone(tab: Browser) -> None:
    tab.look(800, 1000, media="print")
    assert tab.run("getComputedStyle(document.getElementById('filters')).display") == "none"
    tab.run("dispatchEvent(new Event('beforeprint'))")
    assert tab.run("document.querySelectorAll('details:not([open])').length") == 0
    tab.run("dispatchEvent(new Event('afterprint'))")
    assert tab.run("document.querySelectorAll('details[open]').length") == 0


def test_pictures_have_the_size_of_the_window(tab: Browser, tmp_path: Path) -> None:
    tab.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes()[16:24] == (1280).to_bytes(4, "big") + (900).to_bytes(4, "big")
