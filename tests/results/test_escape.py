"""A name changes nothing around it, in whichever format a table is written."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.console import plain
from pipeline.files import json_value
from pipeline.results.escape import csv_cell, latex, markdown
from pipeline.results.identity import select
from pipeline.results.latex_tables import to_latex
from pipeline.results.report import page
from pipeline.results.row import to_table
from pipeline.results.tables import raw_records, text_table, to_csv, to_json, to_md
from tests.support.synthetic import make, report_of
from tests.support.tex import assert_compiles

NAMES = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2",
    "@SUM(A1)",
    "a|b`c*d_e_ _f",
    r"\input{x}$y^2_{z}$ 50% & #1 ~",
    "<script>alert(1)</script>&amp;",
    "\x1b[2Jgone\r\n|x|",
    "[link](http://x)",
    "*bold*",
    "$x^{$",
    "数据集 🙂",
    "a--b",
    '"quoted", comma',
    "\u202egnp.exe",
]


def rows(name: str) -> Any:
    """Two methods on a data set of this name; one of the methods has it, too."""
    named = {"dataset": name, "test_set": name, "kind": "source", "accuracy": 50.0, "shots": 4}
    return to_table([make(**named), make(method=name, access="SOFT+SCORES", trial_id="x", **named)])


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_a_name_in_every_format(name: str) -> None:
    table = rows(name)
    board = report_of(table).board
    text = text_table(board, [name])
    assert "\x1b" not in text and "\u202e" not in text and text_table(rows_of("x")).count("\n") == text.count("\n") - 1
    plain_md, md = to_md(rows_of("x")), to_md(board)
    bars = re.compile(r"(?<!\\)\|")
    assert [len(bars.findall(line)) for line in md.splitlines()] == [
        len(bars.findall(line)) for line in plain_md.splitlines()
    ]
    assert [r["test_set"] for r in json.loads(to_json(board))] == [name, name]
    for records in (list(csv.DictReader(io.StringIO(to_csv(board)))), _read(raw_records(select(table)))):
        for r in records:
            assert r["dataset"] in (name, f"'{name}") and not r["dataset"].startswith(("=", "+", "-", "@"))
            assert float(r["accuracy"]) == 50.0
    tex = to_latex(board)
    assert re.sub(r"\\[A-Za-z]+\{\}|\\[_%&#{}$]", "", latex(name)).isprintable()
    assert not re.search(r"(?<!\\)[%#~^]", latex(name).replace(r"\textasciitilde{}", ""))
    assert tex.count(r"\begin{table}") == 1 and r"\input" not in tex


def test_the_latex_tables_of_odd_names_compile(tmp_path: Path) -> None:
    tables = [to_latex(report_of(rows(name)).board) for name in NAMES if latex(name).isascii()]
    assert len(tables) > 10
    assert_compiles("\n".join(tables), tmp_path)


def rows_of(name: str) -> Any:
    """The leaderboard of `rows`."""
    return report_of(rows(name)).board


def _read(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(records))))


@pytest.mark.parametrize("name", NAMES[5:12])
def test_a_name_stays_a_name_on_the_page_and_in_figures(name: str) -> None:
    tags: list[str] = []

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)

    text = page(report_of(rows(name), title=name, label=name))
    Check().feed(text)
    assert tags.count("script") == 1 and "b" not in tags and "\x1b" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report_of(
            to_table([make(accuracy=40.0, dataset=name), make(method=name, dataset=name, accuracy=50.0)])
        ).figures


def test_what_each_format_escapes() -> None:
    assert plain("a\x1b[1m\n\u200b") == r"a\x1b[1m\n\u200b" and plain("abcd", 3) == "ab…" and plain("abc", 3) == "abc"
    assert markdown("zero_shot (ref)|-3.2 ± 0.1 _x_") == r"zero_shot (ref)\|-3.2 ± 0.1 \_x\_"
    assert latex("[1]") == "{}[1]" and latex(r"\_->±") == r"\textbackslash{}\_$\to$$\pm$"
    assert csv_cell("=x") == "'=x" and csv_cell(-1.5) == -1.5 and csv_cell("x=") == "x="
    assert json_value({"a": [math.nan, 1.0], "b": math.inf}) == {"a": [None, 1.0], "b": None}


def test_json_is_valid_whatever_a_row_holds() -> None:
    records = raw_records(select(to_table([make(accuracy=50.0)])))
    records[0] |= {"accuracy": math.nan, "nll": math.inf}

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (record,) = json.loads(to_json(records), parse_constant=refuse)
    assert (record["seed"], record["accuracy"], record["nll"]) == (1, None, None)
