"""Write the leaderboard as one HTML file that loads nothing else.

The first screen has the main figure and the table; the rest is collapsed. The script of the page (`page.js`) filters
and sorts the table and keeps what is selected in the address. Without it, the page shows every line. The page's own
content policy allows this script and no request to any address.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.console import plain
from pipeline.results.comparison import HARMONIC
from pipeline.results.identity import Selection
from pipeline.results.page_table import Filter, columns_of, filters, records_of, table
from pipeline.results.row import STATUSES
from pipeline.results.tables import LEGEND

if TYPE_CHECKING:
    from pipeline.results.drawing import Drawing

Record = dict[str, Any]

MAIN_FIGURES = ("main_gain_over_zero_shot", "gain_over_zero_shot", "accuracy_by_shots", "accuracy_by_budget")
"""Figures for the first screen; the first one that was drawn is taken."""
MARKS = (
    "± is the half-width of the 95% confidence interval over three or more seeds (Student's t). For two seeds, "
    "(a to b) is their range; one seed has neither.",
    "A gain in bold: its confidence interval excludes 0. Gains are paired by data set and seed.",
    "*: best of its access class. =: tied with it, as their paired 95% confidence interval contains 0.",
    "(ref), grey line: reference method, shown in every access class.",
    "▲ ▼: the column by which the lines are sorted. -: no value.",
)
"""Explanations of bold type, signs and marks."""
NO_FIGURE = "No figure: no method has a score."


def html(
    board: pa.Table,
    summary: pa.Table,
    selection: Selection,
    figures: Mapping[str, Drawing],
    title: str = "Leaderboard",
    label: str = "",
    notes: Sequence[str] = (),
    printed: str = "",
) -> str:
    """Return the page.

    Args:
        board: The leaderboard by test set.
        summary: The leaderboard over data sets.
        selection: The rows of both.
        figures: Figures by name.
        title: Title of the page.
        label: Description shown above the table.
        notes: Lines shown below the table.
        printed: HTML section of printed numbers.
    """
    title = plain(title)
    records = records_of(summary, board)
    main = next((figures[name] for name in MAIN_FIGURES if name in figures), None)
    rest = {name: figure for name, figure in figures.items() if figure is not main}
    note = f"<p class=note>{escape(plain(label))}</p>" if label else ""
    parts = [
        "<a class=skip href=#table>Skip to the table</a>",
        f"<header><h1>{escape(title)}</h1><p>{escape(_facts(selection.everything))}</p>{note}</header>",
        "<main><div class=first>",
        f"<section aria-label=Figure>{_figure(main) if main else f'<p>{NO_FIGURE}</p>'}</section>",
        f"<section id=table aria-label=Table>{_board(records)}{_notes(notes)}</section>",
        "</div>",
        *(_details(name, figure.title, _figure(figure)) for name, figure in rest.items()),
        _details("printed", "Comparison with printed numbers", printed) if printed else "",
        _details("terms", "Columns and terms", _terms(records)),
        f"</main><footer><p>{escape(_environment(selection.rows))}</p></footer>",
        f"<script>{_resource('page.js')}</script>" if records else "",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">{_policy()}'
        f"<title>{escape(title)}</title><style>{_resource('page.css')}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


@cache
def _resource(name: str) -> str:
    return files("pipeline.results").joinpath(name).read_text(encoding="utf-8")


def _policy() -> str:
    """Return the content policy: the page's script and styles, and nothing from any address."""
    digest = base64.b64encode(hashlib.sha256(_resource("page.js").encode()).digest()).decode()
    rules = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f'<meta http-equiv="Content-Security-Policy" content="{rules}">'


def _board(records: Sequence[Record]) -> str:
    if not records:
        return "<p>No finished trials.</p>"
    kinds = ([r for r in records if r["kind"] != HARMONIC], [r for r in records if r["kind"] == HARMONIC])
    captions = ("Accuracy and bill of every method", "Base-to-new: fitted and remaining classes, and their mean H")
    tables = [table(some, caption) for some, caption in zip(kinds, captions, strict=True) if some]
    sort = "accuracy" if kinds[0] else "H"
    key = f"<ul class=key>{''.join(f'<li>{escape(mark)}</li>' for mark in MARKS)}</ul>"
    return _controls(filters(records), sort) + "".join(tables) + key


def _controls(some: Sequence[Filter], sort: str) -> str:
    """Return the filters; they are hidden until the script runs."""
    fields = ['<label>Method <input type=search name=method placeholder="part of a name"></label>']
    for one in some:
        options = "".join(_option(value, value == one.start) for value in ("", *one.options))
        fields.append(f"<label>{one.label} <select name={one.key}>{options}</select></label>")
    fields.append("<label class=box><input type=checkbox name=more> More columns</label>")
    fields.append("<button type=reset>Reset</button><output aria-live=polite></output>")
    return f'<form id=filters data-sort="{sort}" aria-label="Filter the table" hidden>{"".join(fields)}</form>'


def _option(value: str, selected: bool) -> str:
    return f'<option value="{escape(value)}"{" selected" * selected}>{escape(value or "all")}</option>'


def _figure(figure: Drawing) -> str:
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
    return f"<figure><div class=plot tabindex=0 role=group aria-label=Figure>{figure.svg}</div>{caption}</figure>"


def _details(name: str, summary: str, content: str) -> str:
    return f'<details id="{escape(name)}"><summary>{escape(summary)}</summary>{content}</details>'


def _notes(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(plain(line))}</li>" for line in lines)
    return f"<ul class=note>{items}</ul>" if items else ""


def _terms(records: Sequence[Record]) -> str:
    kinds = ([r for r in records if r["kind"] != HARMONIC], [r for r in records if r["kind"] == HARMONIC])
    terms = LEGEND | {c.name: c.meaning for some in kinds if some for c in columns_of(some)}
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in terms.items())}</dl>"


def _facts(rows: pa.Table) -> str:
    records = {r["trial_id"]: r for r in rows.select(["trial_id", "status", "requests", "images"]).to_pylist()}.values()
    states = {text: sum(r["status"] == status for r in records) for status, text in STATUSES.items()}
    counted = ", ".join(f"{n:,} {text}" for text, n in states.items() if n)
    bill = f"{sum(r['requests'] for r in records):,} requests and {sum(r['images'] for r in records):,} image rows"
    return f"{len(records):,} trials ({counted or 'none'}); {bill} billed for fitting."


def _environment(rows: pa.Table) -> str:
    def all_of(column: str) -> str:
        return ", ".join(sorted({str(v) for v in rows[column].to_pylist() if v not in (None, "")})) or "unknown"

    weights = ", ".join(sorted({d[:12] for d in rows["model_digest"].to_pylist()}))
    newest = max(rows["created"].to_pylist(), default="")
    return (
        f"Farebox {all_of('farebox_version')}, torch {all_of('torch_version')}, Python {all_of('python_version')}; "
        f"CPU {all_of('cpu')}, replicas on {all_of('device')} (threads of each: {all_of('threads')}); "
        f"weights {weights}; newest row {newest}."
    )
