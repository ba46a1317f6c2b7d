"""The table of the page: one line per method and test set, with the values by which the page filters and sorts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.console import plain
from pipeline.results.comparison import FULL, GAINS, HARMONIC, answers_order, is_native
from pipeline.results.spread import estimate, excludes_zero
from pipeline.results.tables import budget, count, limits, rank_text, sections, state

Record = dict[str, Any]


class Column(NamedTuple):
    """A column of the table."""

    name: str
    """Heading."""
    cell: Callable[[Record], str]
    """Returns the cell of a record as HTML."""
    value: Callable[[Record], float | str | None] | None = None
    """Returns what the column is sorted by; None sorts by the text."""
    css: str = ""
    """Class of the cells: `l` for text, `c-KEY` for what a filter selects, `more` for details."""
    meaning: str = ""
    """Explanation, shown beside the table."""


def _accuracy(name: str, part: str = "", meaning: str = "") -> Column:
    def of(r: Record) -> Record:
        return r[part] if part else r

    return Column(name, lambda r: estimate(of(r), "accuracy"), lambda r: of(r).get("accuracy"), meaning=meaning)


def _gain(name: str, reference: str, part: str = "", meaning: str = "") -> Column:
    column = f"gain_{reference}"

    def cell(r: Record) -> str:
        record = r[part] if part else r
        text = estimate(record, column, "+")
        return f"<b>{text}</b>" if excludes_zero(record, column) else text

    return Column(name, cell, lambda r: (r[part] if part else r).get(column), meaning=meaning)


def _by_image(reference: str) -> Column:
    low, high = f"gain_{reference}_low", f"gain_{reference}_high"

    def cell(r: Record) -> str:
        return "-" if r[low] is None else f"[{r[low]:+.1f}, {r[high]:+.1f}]"

    meaning = "95% bootstrap confidence interval of the gain over test images (1,000 resamples)"
    return Column(f"{reference}, by image", cell, lambda r: r[low], "more", meaning)


def _count(name: str, column: str, css: str = "", meaning: str = "") -> Column:
    return Column(name, lambda r: count(r[column]), lambda r: r[column], css, meaning)


def _method(r: Record) -> str:
    mark = " *" if r["leader"] else " =" if r["tied"] else ""
    return escape(plain(r["label"])) + " (ref)" * r["reference"] + mark


METHOD = Column(
    "method",
    _method,
    None,
    "l",
    "*: best of its access class; =: tied with it (their paired 95% confidence interval contains 0); (ref): reference",
)
CELLS = (
    Column("test set", lambda r: escape(test_set(r)), None, "l c-data", "mean of N sets: average over data sets"),
    Column("shots", lambda r: str(r["shots"]), lambda r: r["shots"], "c-shots", "labelled images per class"),
    Column("budget", lambda r: escape(budget(limits(r))), None, "l c-budget", "what a trial may spend on fitting"),
    Column("answers", lambda r: escape(plain(r["answers"])), None, "l c-answers", "what the endpoint answered"),
    Column("model", lambda r: escape(model(r)), None, "l c-model", "model and precision of the endpoint"),
)
"""What a line is about; each is a filter. A column is hidden while its filter selects one value."""
NUMBERS = (
    _accuracy("accuracy", meaning="correct test images in percent"),
    _gain("over zero_shot", "zero_shot", meaning="accuracy minus that of zero_shot in percentage points"),
    _gain("over logit_head", "logit_head", meaning="accuracy minus that of logit_head in percentage points"),
    _gain("over score_ridge", "score_ridge", meaning="accuracy minus that of score_ridge in percentage points"),
)
HALVES = (
    _accuracy("base", "base", "accuracy on the fitted classes in percent"),
    _accuracy("new", "new", "accuracy on the classes that were not fitted in percent"),
    _accuracy("H", meaning="harmonic mean of base and new, per data set and seed"),
    _gain("base gain", "zero_shot", "base", "base minus that of zero_shot in percentage points"),
    _gain("new gain", "zero_shot", "new", "new minus that of zero_shot in percentage points"),
    _gain("H gain", "zero_shot", meaning="H minus that of zero_shot in percentage points"),
)
BILLS = (
    Column(
        "rank",
        lambda r: "-" if r["rank"] is None else f"{rank_text(r, 1)} of {r['ranked_among']}",
        lambda r: r["rank"],
        "",
        "average over data sets within the access class, among methods with five or more seeds, and its 95% bootstrap "
        "interval over seeds and test images",
    ),
    _count("requests", "requests", "", "requests billed for fitting"),
    _count("images", "images", "", "image rows billed for fitting"),
    Column("state", lambda r: escape(state(r)), None, "l", "what limits a line, such as failed trials"),
    Column("seeds", lambda r: str(r["seeds"]), lambda r: r["seeds"], "more", "finished seeds"),
    Column("access", lambda r: escape(r["access"]) or "none", None, "l more", "what a method may send and receive"),
)
DETAILS = (
    _count("eval requests", "evaluate_requests", "more", "requests billed for predicting the test set"),
    _count("paper queries", "paper_queries", "more", "number of queries as the paper counts them"),
    _count("params", "trainable_params", "more", "number of learned parameters"),
    _count("client bytes", "client_bytes", "more", "size of the fitted method on the client"),
    Column(
        "seconds",
        lambda r: "-" if r["seconds"] is None else f"{r['seconds']:,.1f}",
        lambda r: r["seconds"],
        "more",
        "wall-clock time; trials that run at the same time slow each other down",
    ),
)
ALWAYS = ("method", "test set", "shots", "budget", "accuracy", "H")
"""Columns that are shown even if they are empty."""


class Filter(NamedTuple):
    """A filter of the page."""

    key: str
    label: str
    options: tuple[str, ...]
    start: str
    """The option selected at the start; empty for all."""


def records_of(summary: pa.Table, board: pa.Table) -> list[Record]:
    """Return the records of the table: means over data sets first, then single test sets.

    A reference appears in the sections of several access classes. It has one line here, and `classes` names them.
    """
    merged: dict[tuple[Any, ...], Record] = {}
    for table in (summary, board):
        for record in (r for section in sections(table) for r in section):
            about = record["answers"], model(record), record["label"]
            key = (test_set(record), record["shots"], budget(limits(record)), *about)
            numbers = (*(record[k] for k in ("accuracy", "seeds", "requests", "images")), state(record))
            same = merged.get((*key, numbers))
            native = is_native(record, record["access_class"])
            classes = [*(same["classes"] if same else []), record["access_class"]]
            merged[(*key, numbers)] = (record if same is None or native else same) | {"classes": classes}
    return sorted(merged.values(), key=_order)


def _order(r: Record) -> tuple[Any, ...]:
    kind = ("source", HARMONIC, "shift", "transfer").index(r["kind"])
    first = r["dataset"] != "all", kind, test_set(r), -r["shots"], *(-limit for limit in limits(r).size)
    first = *first, *answers_order(r["answers"]), model(r)
    return *first, r["accuracy"] is None, -(r["accuracy"] or 0.0), r["label"]


def test_set(r: Record) -> str:
    """Return the test set of a record in words."""
    kind = {"shift": "shift ", "transfer": "transfer "}.get(r["kind"], "")
    several = r["datasets_of"]
    if r["dataset"] == "all":
        words = f"mean of {several} {kind}set{'s' * (several > 1)}"
    else:
        words = f"{r['test_set']} ({kind}of {r['dataset']})" if kind else r["dataset"]
    return plain(words + ", base-to-new" * (r["kind"] == HARMONIC))


def model(r: Record) -> str:
    """Return the model of a record in words."""
    return plain(f"{r['model']} {r['precision']}")


def _alike(records: Sequence[Record]) -> set[str]:
    """Return the columns that are not shown: the model if there is one only, and answers if all are full."""
    alike = {"model"} if len(set(map(model, records))) == 1 else set[str]()
    return alike | ({"answers"} if {r["answers"] for r in records} == {FULL} else set[str]())


def filters(records: Sequence[Record]) -> list[Filter]:
    """Return the filters of these records: access class, test set, shots, budget, and answers and model if several.

    They start with one test set (a mean, if there is one), the most shots, the largest budget and the fullest answers.
    """
    first = records[0]
    options = {
        "class": ("Access class", sorted({c for r in records for c in r["classes"]}), ""),
        "data": ("Data set", list(dict.fromkeys(map(test_set, records))), test_set(first)),
        "shots": ("Shots", [str(n) for n in sorted({r["shots"] for r in records})], str(first["shots"])),
        "budget": ("Budget", list(dict.fromkeys(budget(limits(r)) for r in records)), budget(limits(first))),
        "answers": ("Answers", list(dict.fromkeys(r["answers"] for r in records)), first["answers"]),
        "model": ("Model", list(dict.fromkeys(map(model, records))), model(first)),
    }
    several = {key: o for key, o in options.items() if key not in _alike(records)}
    return [Filter(key, label, tuple(values), start) for key, (label, values, start) in several.items()]


def columns_of(records: Sequence[Record]) -> list[Column]:
    """Return the columns that have a value in a record, and those that are always shown."""
    halves = records[0]["kind"] == HARMONIC
    by_image = () if halves else tuple(map(_by_image, GAINS))
    every = (METHOD, *CELLS, *(HALVES if halves else NUMBERS), *BILLS, *by_image, *DETAILS)
    used = [c for c in every if c.name in ALWAYS or any(c.cell(r) not in ("", "-") for r in records)]
    return [c for c in used if c.name not in _alike(records)]


def table(records: Sequence[Record], caption: str) -> str:
    """Return the records as a table of the page."""
    columns = columns_of(records)
    head = "".join(f'<th scope=col class="{c.css}">{escape(c.name)}</th>' for c in columns)
    body = "\n".join(_line(r, columns) for r in records)
    return (
        f"<div class=wide tabindex=0 role=region aria-label={_quoted(caption)}><table class=board>"
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _line(r: Record, columns: Iterable[Column]) -> str:
    values = {
        "class": "|".join(r["classes"]),
        "data": test_set(r),
        "shots": r["shots"],
        "budget": budget(limits(r)),
        "answers": r["answers"],
        "model": model(r),
    }
    data = "".join(f" data-{key}={_quoted(str(value))}" for key, value in values.items())
    cells = "".join(_cell(c, r) for c in columns)
    return f"<tr{' class=ref' if r['reference'] else ''}{data}>{cells}</tr>"


def _cell(column: Column, r: Record) -> str:
    value = column.value(r) if column.value else None
    sort = (
        ""
        if value is None
        else f' data-v="{value:g}"'
        if isinstance(value, float)
        else f" data-v={_quoted(str(value))}"
    )
    kind = f' class="{column.css}"' if column.css else ""
    tag, end = ("th scope=row", "th") if column is METHOD else ("td", "td")
    return f"<{tag}{kind}{sort}>{column.cell(r)}</{end}>"


def _quoted(text: str) -> str:
    return f'"{escape(text)}"'
