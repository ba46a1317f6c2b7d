"""The page: one file, readable without its script, on paper, in the dark and aloud."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from html.parser import HTMLParser
from importlib.resources import files

import pyarrow as pa
import pytest

from pipeline.results.html import html
from pipeline.results.palette import TEXT_CONTRAST, contrast
from pipeline.results.report import page
from pipeline.results.row import to_table
from tests.support.synthetic import make, report_of, sweep

CSS = files("pipeline.results").joinpath("page.css").read_text()
VOID = ("meta", "br", "input", "link", "img")


class Element:
    """An element of the page with its attributes and text."""

    def __init__(self, tag: str, attrs: dict[str, str | None], inside: list[str]) -> None:
        self.tag, self.attrs, self.inside, self.text = tag, attrs, inside, ""


class Reader(HTMLParser):
    """Reads a page; AssertionError: its elements are not nested properly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[Element] = []
        self.elements: list[Element] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs), [e.tag for e in self.open])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs), [e.tag for e in self.open]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str) -> list[Element]:
        return [e for e in self.elements if e.tag == tag]


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    methods = ("zero_shot", "logit_head", "craft", "bbt", "taskres")
    return to_table([r for t in sweep(methods=methods, seeds=(1, 2, 3)) for r in t])


@pytest.fixture(scope="module")
def text(rows: pa.Table) -> str:
    return page(report_of(rows, title="Demo <1>", label="A small budget."))


@pytest.fixture(scope="module")
def read(text: str) -> Reader:
    return Reader(text)


def test_the_page_loads_nothing_and_its_policy_allows_nothing(text: str, read: Reader) -> None:
    assert "Demo &lt;1&gt;" in text and "A small budget." in text
    assert not re.search(r"https?:|src=|@import|url\((?!#)|<link|<img", text)
    (script,) = read.all("script")
    (policy,) = [e.attrs["content"] for e in read.all("meta") if "http-equiv" in e.attrs]
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not any(name.startswith("on") for e in read.elements for name in e.attrs)


def test_the_first_screen_has_the_main_figure_and_the_table_and_the_rest_is_collapsed(read: Reader) -> None:
    outside = [e for e in read.elements if "details" not in e.inside]
    assert [e.tag for e in outside if e.tag in ("svg", "table")] == ["svg", "table"]
    assert len(read.all("svg")) > 3 and not any("open" in e.attrs for e in read.all("details"))


def test_without_the_script_every_line_is_shown_and_the_controls_are_hidden(rows: pa.Table, read: Reader) -> None:
    (form,) = read.all("form")
    assert "hidden" in form.attrs
    assert not any("hidden" in e.attrs for e in read.elements if e is not form)
    lines = [e for e in read.all("tr") if "data-data" in e.attrs]
    report = report_of(rows)
    cells = {
        (r["kind"], r["dataset"], r["test_set"], r["shots"], r["budget_requests"], r["label"])
        for table in (report.board, report.summary)
        for r in table.to_pylist()
    }
    assert len(lines) == len(cells)


def test_every_line_is_found_by_the_filters_and_the_start_shows_some(read: Reader) -> None:
    selects = {e.attrs["name"]: e for e in read.all("select")}
    assert set(selects) == {"class", "data", "shots", "budget"}
    lines = [e.attrs for e in read.all("tr") if "data-data" in e.attrs]
    chosen: dict[str, str] = {}
    at = ""
    for e in read.elements:
        at = str(e.attrs["name"]) if e.tag == "select" else at
        if e.tag == "option" and "selected" in e.attrs:
            chosen[at] = str(e.attrs["value"])
    assert chosen == {"class": "", "data": "mean of 3 sets", "shots": "16", "budget": "8,000 requests"}
    kept = [a for a in lines if all(a[f"data-{k}"] == v for k, v in chosen.items() if v)]
    assert len(kept) == 5
    references = [a for a in kept if a.get("class") == "ref"]
    assert [a["data-class"] for a in references] == ["features|scores"] * 2 or {
        frozenset(str(a["data-class"]).split("|")) for a in references
    } == {frozenset(("scores", "features"))}


def test_a_reference_has_one_line_and_keeps_the_rank_of_its_own_class() -> None:
    methods = ("zero_shot", "logit_head", "craft", "bbt", "cbbt", "taskres")
    table = to_table([r for t in sweep(methods=methods, shots=(16,), budgets=((8000, None),)) for r in t])
    report = report_of(table)
    read = Reader(html(report.board, report.summary, report.selection, figures={}))
    head = [e.text for e in read.all("th") if e.attrs.get("scope") == "col"]
    lines = [e.text for e in read.all("tr") if e.attrs.get("data-data") == "mean of 3 sets" and "logit_head" in e.text]
    assert len(lines) == 1 and re.search(r"\d\.\d of 4", lines[0]) and "rank" in head


def test_tables_are_read_aloud_with_caption_and_headers_and_every_control_has_a_label(read: Reader) -> None:
    assert len(read.all("caption")) == len(read.all("table")) > 0
    assert all(e.attrs.get("scope") in ("col", "row") for e in read.all("th"))
    for e in (*read.all("input"), *read.all("select")):
        assert "label" in e.inside and e.attrs["name"]
    (root,) = read.all("html")
    assert root.attrs["lang"] == "en" and "width=device-width" in str(
        next(e.attrs["content"] for e in read.all("meta") if e.attrs.get("name") == "viewport")
    )
    assert [len(read.all(tag)) for tag in ("header", "main", "footer", "h1")] == [1, 1, 1, 1]
    ids = [e.attrs["id"] for e in read.elements if "id" in e.attrs]
    assert len(ids) == len(set(ids))
    for e in read.all("svg"):
        assert e.attrs["role"] == "img" and set(str(e.attrs["aria-labelledby"]).split()) <= set(ids)
    assert all("#" not in str(e.attrs.get("href")) or str(e.attrs["href"])[1:] in ids for e in read.all("a"))


def test_bold_type_and_every_mark_is_explained_beside_the_table(text: str, read: Reader) -> None:
    key = text.split("<ul class=key>")[1].split("</ul>")[0]
    for mark in ("bold", "±", "*: best", "=: tied", "(ref)", "▲", "▼", "(a to b)", "grey"):
        assert mark in key, mark
    bold = read.all("b")
    assert bold and all("±" in e.text for e in bold)
    head = {e.text for e in read.all("th") if e.attrs.get("scope") == "col"}
    assert head <= {e.text for e in read.all("dt")}


def test_a_reference_that_leads_its_class_is_marked_as_such() -> None:
    rows = [make(seed=seed, accuracy=40.0) for seed in (1, 2, 3)]
    for method, access, accuracy in (("logit_head", "TEXT+SCORES", 60.0), ("craft", "SOFT+SCORES", 50.0)):
        rows += [make(method=method, access=access, seed=s, accuracy=accuracy + s) for s in (1, 2, 3)]
    shown = page(report_of(rows))
    assert "logit_head (ref) *<" in shown and "craft *" not in shown


def test_numbers_of_two_seeds_are_neither_bold_nor_intervals() -> None:
    rows = [make(accuracy=40.0)]
    rows += [make(method="craft", access="SOFT+SCORES", seed=s, accuracy=a) for s, a in ((1, 50.0), (2, 50.2))]
    read = Reader(page(report_of(rows)))
    (line,) = [e for e in read.all("tr") if e.attrs.get("data-data") == "icons" and "craft" in e.text]
    assert "50.1 (50.0 to 50.2)" in line.text and "±" not in line.text and read.all("b") == []


def test_a_page_about_nothing_says_so() -> None:
    text = page(report_of([]))
    assert "0 trials (none)" in text and "No finished trials." in text and "No figure" in text
    assert Reader(text).all("script") == []
    failed = page(report_of([make(status="failed", error="lost")]))
    assert "1 failed" in failed and "No figure" in failed


# --- colours ---------------------------------------------------------------------------------------------------------

TEXT, BACKGROUND = ("text", "muted", "link"), ("page", "stripe", "note")


def themes() -> dict[str, dict[str, str]]:
    light, dark = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    return {
        name: dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for name, part in (("light", light), ("dark", dark))
    }


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_on_every_background(theme: str) -> None:
    colours = themes()[theme]
    assert set(colours) == {*TEXT, *BACKGROUND, "line", "mark"}
    for one, other in itertools.product(TEXT, BACKGROUND):
        assert contrast(colours[one], colours[other]) >= TEXT_CONTRAST, (theme, one, other)


def test_every_colour_of_the_style_sheet_is_one_of_the_checked_ones() -> None:
    rules = re.sub(r":root \{.*?\}", "", CSS, flags=re.DOTALL)
    assert set(re.findall(r"#[0-9a-fA-F]{3,8}\b", rules)) == {"#ffffff"}  # behind figures, whose text is checked apart
    assert {value.strip() for value in re.findall(r"[; {]color: ([^;}]+)", rules)} <= {
        f"var(--{name})" for name in TEXT
    }
    backgrounds = {value.strip() for value in re.findall(r"background: ([^;}]+)", rules)}
    assert backgrounds <= {*(f"var(--{name})" for name in BACKGROUND), "none", "#ffffff"}


def test_the_page_fits_a_phone_and_paper() -> None:
    assert ".wide { overflow-x: auto" in CSS and ".plot { overflow-x: auto" in CSS
    printed = CSS.split("@media print")[1]
    assert "form, .skip { display: none }" in printed and "details::details-content" in printed
