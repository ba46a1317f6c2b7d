"""The leaderboard for people and for scripts: text, csv, json, markdown, latex, and the files of a whole report.

Tables come from `leaderboard.leaderboard` (one section for each test set) or `leaderboard.summary` (over data sets);
every format takes either. `raw_records` are the trials themselves, before any averaging.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa

from pipeline.budget import Limits
from pipeline.files import strict_json
from pipeline.results.comparison import GAINS, HARMONIC
from pipeline.results.escape import csv_cell, latex, markdown, plain
from pipeline.results.identity import Selection, missing_references, select
from pipeline.results.leaderboard import ReadPredictions, leaderboard, summary

Record = dict[str, Any]

WIDTH = 120
HALVES = ("base", "new")
"""Kinds that are shown beside each other, with their harmonic mean."""
RAW = (
    *("trial_id", "method", "dataset", "shots", "seed", "model", "status", "test_set", "accuracy", "requests"),
    *("images", "prompts", "outputs", "evaluate_requests", "seconds", "trainable_params", "client_bytes"),
    *("base_method", "access", "budget_requests", "budget_images", "macro_accuracy", "nll", "ece", "labels_used"),
    *("papers_count", "error", "kind", "validation", "split_digest", "test_label_reads"),
    *("template", "templates_digest", "classnames_digest", "augment", "data_digest", "test_digest"),
    *("model_digest", "precision", "transform", "code_digest", "method_version", "method_digest"),
    *("views", "hparams", "config", "cpu", "device", "threads", "torch_version", "farebox_version", "created"),
)
"""Columns of a row that are shown by `--raw`; `left_out` follows."""
SECTION = (
    *("access_class", "model", "model_digest", "precision", "kind", "dataset", "test_set", "shots"),
    *("budget_requests", "budget_images"),
)
LEGEND = {
    "accuracy": "per cent right, mean over seeds ± half of Student's 95 % interval over seeds",
    "gain": "points over zero_shot and over logit_head, paired by data set and seed, with the same interval",
    "by image [ , ]": "the gain again: 95 % of 1,000 draws of other test images (bootstrap), the seeds as they are",
    "rank": "mean over data sets, within one access class and allotment; none under five seeds",
    "requests, images": "what fitting was billed: prompt sets asked about, and image rows in all of them",
    "base, new, H": "base to new: accuracy on the fitted classes alone, on the others alone, and their harmonic mean",
    "(ref)": "reference row, shown in every access class",
}
FOOTNOTE = (
    "accuracy in per cent, gains in points, paired by data set and seed; ± is Student's 95 % interval over seeds;\n"
    "requests and images are what fitting was billed; rank is within the access class and wants five seeds"
)

FOOTNOTE_HALVES = (
    "base to new: fitted on the base classes, tested on those alone and on the new ones alone; H is the harmonic mean\n"
    "for each data set and seed; gains are over zero_shot"
)


def text_table(table: pa.Table, notes: Sequence[str] = ()) -> str:
    """At most 120 columns wide: a heading for each access class, one for each section, a line for each method.

    `notes` follow the table, one paragraph each.
    """
    blocks: list[str] = []
    for name, group in groupby(sections(table), key=lambda s: s[0]["access_class"]):
        blocks.append(f"{name.upper()}  ({', '.join(_accesses(table, name))})")
        blocks += [f"{heading(rows)}\n{aligned([_shown(r) for r in rows])}" for rows in group]
    halves = [FOOTNOTE_HALVES] if HARMONIC in table["kind"].to_pylist() else []
    end = [textwrap.fill(plain(f"! {note}"), WIDTH, subsequent_indent="  ") for note in notes]
    body = ["\n\n".join([*blocks, FOOTNOTE]), *halves] if blocks else ["no trial has finished yet"]
    return "\n".join([*body, *end, ""])


def to_csv(table: pa.Table | Sequence[Mapping[str, Any]]) -> str:
    """Every column, full precision, nulls empty. Text that a spreadsheet would run as a formula starts with a `'`."""
    records, names = _records(table)
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in record.items()} for record in records)
    return out.getvalue()


def to_json(table: pa.Table | Sequence[Mapping[str, Any]]) -> str:
    """A list of records, every column. Numbers that JSON cannot hold (NaN, infinity) are null."""
    return strict_json(_records(table)[0], indent=1) + "\n"


def to_md(table: pa.Table, notes: Sequence[str] = ()) -> str:
    """A Markdown table for each section, then the notes as a list."""
    blocks = []
    for rows in sections(table):
        grid = md_grid([_shown(r) for r in rows])
        blocks.append(f"### {rows[0]['access_class']}: {markdown(heading(rows))}\n\n{grid}\n")
    blocks += ["\n".join(f"- {markdown(note)}" for note in notes) + "\n"] if notes else []
    return "\n".join(blocks)


def md_grid(shown: Sequence[Mapping[str, str]]) -> str:
    """Lines of cells as a markdown table."""
    bar = "|".join("---" if left else "---:" for left in _left(shown[0]))
    lines = ["|".join(map(markdown, cells.values())) for cells in shown]
    return "\n".join(f"|{line}|" for line in ["|".join(shown[0]), bar, *lines])


def to_latex(table: pa.Table, notes: Sequence[str] = ()) -> str:
    """A booktabs table for each section, after the notes as comments."""
    blocks = [f"% {plain(note)}" for note in notes]
    for rows in sections(table):
        blocks.append(latex_table(f"{rows[0]['access_class']}: {heading(rows)}", [_shown(r) for r in rows]))
    return "\n".join(blocks)


def latex_table(caption: str, shown: Sequence[Mapping[str, str]]) -> str:
    """Lines of cells as a booktabs table."""
    columns = "".join("l" if left else "r" for left in _left(shown[0]))
    lines = [" & ".join(map(latex, cells.values())) + r" \\" for cells in shown]
    head = " & ".join(map(latex, shown[0])) + r" \\"
    body = [r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"]
    start = [r"\begin{table}", rf"\caption{{{latex(caption)}}}", rf"\begin{{tabular}}{{{columns}}}"]
    return "\n".join([*start, *body, r"\end{table}"]) + "\n"


def raw_records(rows: pa.Table | Selection) -> list[Record]:
    """One record for each (trial, test set), a trial's source test set first; the bill is the whole trial's on each.

    `left_out` gives the reason why a row is in no mean, and is empty for all others.
    """
    selection = rows if isinstance(rows, Selection) else select(rows)

    def order(r: Record) -> tuple[Any, ...]:
        budget = tuple(-1 if r[f"budget_{u}"] is None else r[f"budget_{u}"] for u in ("requests", "images"))
        cell = (r["model"], r["method"], r["dataset"], r["shots"], *budget, r["seed"], r["trial_id"])
        return *cell, r["test_set"] != r["dataset"], r["test_set"]

    left_out = selection.left_out
    return [
        {k: r[k] for k in RAW} | {"left_out": left_out.get((r["trial_id"], r["test_set"]), "")}
        for r in sorted(selection.everything.to_pylist(), key=order)
    ]


def figures(rows: pa.Table | Selection) -> dict[str, bytes]:
    """PNG figures by name (matplotlib is loaded only here)."""
    from pipeline.results.plots import draw

    return draw(rows)


def report(
    rows: pa.Table | Selection,
    predictions: ReadPredictions | None = None,
    title: str = "Leaderboard",
    notes: Sequence[str] = (),
    beside: str = "",
) -> dict[str, bytes]:
    """The files of a report by relative path: the page (`beside` in it), both tables, raw trials and figures."""
    from pipeline.results.html import html

    selection = rows if isinstance(rows, Selection) else select(rows)
    board, overall = leaderboard(selection, predictions), summary(selection, predictions)
    drawn = figures(selection)
    footer = [*selection.notes, *missing_references(board)]
    page = html(board, selection, drawn, title, notes, overall, beside, footer)
    files = {
        "leaderboard.html": page,
        "leaderboard.csv": to_csv(board),
        "leaderboard.json": to_json(board),
        "leaderboard.md": to_md(overall, footer),
        "summary.csv": to_csv(overall),
        "summary.txt": text_table(overall, footer),
        "trials.csv": to_csv(raw_records(selection)),
    }
    return {k: v.encode() for k, v in files.items()} | {f"figures/{k}.png": v for k, v in drawn.items()}


def heading(rows: Sequence[Record]) -> str:
    """What one section compares: model, test set, shots, allotment."""
    r = rows[0]
    several = r["datasets_of"]
    if r["dataset"] == "all":
        kind = {"shift": "shift test ", "transfer": "transfer "}.get(r["kind"], "data ")
        what = f"mean of {several} {kind}set{'s' * (several > 1)}"
    elif r["kind"] in ("shift", "transfer"):
        what = f"{r['dataset']} -> {r['test_set']} ({r['kind']})"
    else:
        what = r["dataset"]
    what += ", base to new" * (r["kind"] == HARMONIC)
    where = f"{r['shots']} shot{'s' * (r['shots'] > 1)}, {budget_words(r)}, {r['model']} {r['precision']}"
    return plain(f"{what}, {where}")


def budget_words(record: Record) -> str:
    """'allotment 8,000 requests', or 'no limit'."""
    words = Limits(record["budget_requests"], record["budget_images"]).words
    return f"allotment {words}" if words else "no limit"


def plus_minus(mean: float | None, half: float | None, sign: str = "") -> str:
    """'57.8 ± 1.2', without the interval where there is none."""
    if mean is None:
        return "-"
    return f"{mean:{sign}.1f}" + ("" if half is None else f" ± {half:.1f}")


def state(record: Record) -> str:
    """What a reader must know before trusting a line."""
    said = [f"{record[s]} {s}" for s in ("truncated", "failed", "unfunded") if record[s]]
    if record["truncated_accuracy"] is not None:
        said[0] += f" ({record['truncated_accuracy']:.1f})"
    if record["datasets"] < record["datasets_of"]:
        said.append(f"{record['datasets']} of {record['datasets_of']} sets")
    if record["sources"] > 1:
        said.append(f"{record['sources']} codes")
    for name in GAINS:
        pairs = record.get(f"gain_{name}_pairs")
        if pairs and pairs < record["seeds"]:
            said.append(f"over {name}: {pairs} of {record['seeds']} seeds")
    return ", ".join(said)


def _shown(r: Record) -> dict[str, str]:
    if r["kind"] == HARMONIC:
        halves = [("base", r["base"]), ("new", r["new"]), ("H", r)]
        numbers = {name: plus_minus(h.get("accuracy"), h.get("accuracy_half")) for name, h in halves}
        numbers |= {f"{name} gain": gain(h, "zero_shot") for name, h in halves[1:]}
    else:
        numbers = {"accuracy": plus_minus(r["accuracy"], r["accuracy_half"])}
        numbers |= {f"over {name}": gain(r, name) for name in GAINS}
        numbers["rank"] = "-" if r["rank"] is None else f"{r['rank']:.1f}"
    return {
        "method": plain(r["label"]) + (" (ref)" if r["reference"] else ""),
        "seeds": str(r["seeds"]),
        **numbers,
        "requests": count(r["requests"]),
        "images": count(r["images"]),
        "state": state(r),
    }


def gain(record: Record, name: str) -> str:
    """Points over a reference, '+5.1 ± 0.7'."""
    return plus_minus(record.get(f"gain_{name}"), record.get(f"gain_{name}_half"), "+")


def count(number: float | None) -> str:
    """A whole number with commas."""
    return "-" if number is None else f"{number:,.0f}"


def sections(table: pa.Table) -> Iterator[list[Record]]:
    """The records of each section, with `datasets_of`: how many data sets its most complete method has.

    Base and new classes make no tables of their own: a harmonic record has their records as `base` and `new`.
    """
    records = table.to_pylist()
    same = [k for k in (*SECTION, "label") if k not in ("kind", "test_set")]
    halves = {(r["kind"], *(r[k] for k in same)): r for r in records if r["kind"] in HALVES}
    for _, rows in groupby((r for r in records if r["kind"] not in HALVES), key=lambda r: [r[k] for k in SECTION]):
        found = list(rows)
        several = max(r["datasets"] for r in found)
        parts = [{h: halves.get((h, *(r[k] for k in same)), {}) for h in HALVES} for r in found]
        yield [r | part | {"datasets_of": several} for r, part in zip(found, parts, strict=True)]


def _accesses(table: pa.Table, name: str) -> list[str]:
    """The access labels of a class's own methods."""
    records = [r for r in table.to_pylist() if r["access_class"] == name]
    return sorted({r["access"] for r in records if not r["reference"]} or {r["access"] or "none" for r in records})


def _left(names: Mapping[str, str]) -> list[bool]:
    return [n in ("method", "state", "printed in", "note") for n in names]


def aligned(rows: list[dict[str, str]]) -> str:
    """Columns side by side; a long method name is cut to fit, and what is wrong with a line is said below them all."""
    names = [n for n in rows[0] if n != "state"]
    widths = {n: max(len(n), *(len(r[n]) for r in rows)) for n in names}
    over = sum(widths.values()) + 2 * len(names) - WIDTH
    widths["method"] -= max(0, over)

    def line(cells: Mapping[str, str]) -> str:
        width, name = widths["method"], cells["method"]
        first = (name if len(name) <= width else name[: width - 1] + "…").ljust(width)
        return "  " + "  ".join([first, *(cells[n].rjust(widths[n]) for n in names[1:])])

    said = [f"  ! {r['method']}: {r['state']}"[:WIDTH] for r in rows if r.get("state")]
    return "\n".join([line({n: n for n in names}), *map(line, rows), *said])


def _records(table: pa.Table | Sequence[Mapping[str, Any]]) -> tuple[list[Record], list[str]]:
    if isinstance(table, pa.Table):
        return table.to_pylist(), table.column_names
    return [dict(r) for r in table], list(table[0]) if table else [*RAW, "left_out"]
