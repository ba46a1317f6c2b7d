"""Write the leaderboard as text, CSV, JSON and Markdown; `latex_tables.py` writes LaTeX.

Every function takes a table of `leaderboard.Leaderboard`: the board (one section per test set) or the summary (over
data sets). `raw_records` returns the trials themselves, before any averaging.
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
from pipeline.console import plain
from pipeline.files import strict_json
from pipeline.results.comparison import FULL, GAINS, HARMONIC, Section
from pipeline.results.escape import csv_cell, markdown
from pipeline.results.identity import Selection
from pipeline.results.leaderboard import UNFINISHED
from pipeline.results.row import STATUSES

Record = dict[str, Any]

WIDTH = 120
DISPENSABLE = ("rank", "over score_ridge", "over logit_head", "images", "seeds")
"""Columns that are left out of a text table for which a terminal is too narrow, in this order."""
HALVES = ("base", "new")
"""Kinds that are shown in one table, with their harmonic mean."""
RAW = (
    *("trial_id", "method", "dataset", "shots", "seed", "model", "status", "test_set", "accuracy", "requests"),
    *("images", "prompts", "outputs", "evaluate_requests", "seconds", "trainable_params", "client_bytes"),
    *("base_method", "access", "budget_requests", "budget_images", "answers", "macro_accuracy", "nll", "ece"),
    *("labels_used", "paper_queries", "error", "kind", "validation", "split_digest", "draw", "missing_classes"),
    *("test_label_reads", "template", "templates_digest", "classnames_digest", "augment", "data_digest", "test_digest"),
    *("model_digest", "precision", "transform", "code_digest", "method_version", "method_digest"),
    *("views", "hparams", "config", "cpu", "device", "threads", "torch_version", "farebox_version", "created"),
)
"""Columns of a row in `--raw`; `left_out` follows them."""
LEGEND = {
    "accuracy": "Top-1 accuracy in percent, mean over seeds ± 95% CI (t).",
    "gain": "Difference to zero_shot, logit_head or score_ridge in points, paired by data set and seed, ± 95% CI (t).",
    "95% CI (t)": "95% confidence interval over seeds (Student's t), as half-width. With two seeds: the range.",
    "by image [ , ]": "95% bootstrap confidence interval of the gain over test images (1,000 resamples, seeds fixed).",
    "rank": "Average rank within the access class with its 95% bootstrap interval; only with five or more seeds.",
    "resolution": "Median 95% CI (t) of the difference between two methods: smaller differences are not resolved.",
    "requests, images": "Billed for fitting: requests (one per prompt set), and image rows in all of them.",
    "base, new, H": "Base-to-new: accuracy on the fitted classes, on the remaining classes, and their harmonic mean.",
    "(ref)": "Reference method, shown in every access class.",
}
FOOTNOTE = (
    "Accuracy in percent, gains in percentage points, paired by data set and seed; ± is the 95% CI (t) over seeds.\n"
    "With two seeds, a..b is their range. Requests and images: billed for fitting. Rank: with five or more seeds."
)
FOOTNOTE_HALVES = (
    "Base-to-new: fitted on the base classes, tested on the base and on the new classes separately. H is the harmonic\n"
    "mean per data set and seed. Gains are over zero_shot."
)


def text_table(table: pa.Table, notes: Sequence[str] = (), width: int = WIDTH) -> str:
    """Return a table as text of at most `width` columns: a heading per access class and section, a line per method.

    The notes follow, one paragraph each. Columns without a value in any line of a section are left out, and so are
    those of `DISPENSABLE` for which there is no room.
    """
    blocks: list[str] = []
    for name, group in groupby(sections(table), key=lambda s: s[0]["access_class"]):
        blocks.append(f"{name.upper()}  ({', '.join(_accesses(table, name))})")
        blocks += [f"{heading(rows)}\n{aligned(with_values(rows), width)}" for rows in group]
    halves = [FOOTNOTE_HALVES] if HARMONIC in table["kind"].to_pylist() else []
    end = [textwrap.fill(plain(f"! {note}"), width, subsequent_indent="  ") for note in notes]
    body = (
        ["\n\n".join([*blocks, _fitted(FOOTNOTE, width)]), *(_fitted(text, width) for text in halves)]
        if blocks
        else ["no finished trials"]
    )
    return "\n".join([*body, *end, ""])


def _fitted(text: str, width: int) -> str:
    return text if width >= WIDTH else textwrap.fill(text, width)


def to_csv(table: pa.Table | Sequence[Mapping[str, Any]]) -> str:
    """Return all columns as CSV with full precision; nulls are empty, and formulas are escaped (`escape.csv_cell`)."""
    records, names = _records(table)
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in record.items()} for record in records)
    return out.getvalue()


def to_json(table: pa.Table | Sequence[Mapping[str, Any]]) -> str:
    """Return all columns as a JSON list of records; NaN and infinity are null."""
    return strict_json(_records(table)[0], indent=1) + "\n"


def to_md(table: pa.Table, notes: Sequence[str] = ()) -> str:
    """Return a Markdown table per section, followed by the notes as a list."""
    blocks = []
    for rows in sections(table):
        grid = md_grid(with_values(rows))
        blocks.append(f"### {rows[0]['access_class']}: {markdown(heading(rows))}\n\n{grid}\n")
    blocks += ["\n".join(f"- {markdown(note)}" for note in notes) + "\n"] if notes else []
    return "\n".join(blocks)


def md_grid(shown: Sequence[Mapping[str, str]]) -> str:
    """Return lines of cells as a Markdown table."""
    bar = "|".join("---" if left else "---:" for left in is_text(shown[0]))
    lines = ["|".join(map(markdown, cells.values())) for cells in shown]
    return "\n".join(f"|{line}|" for line in ["|".join(shown[0]), bar, *lines])


def raw_records(selection: Selection) -> list[Record]:
    """Return one record per trial and test set, including rows that are left out; a trial's source test set is first.

    The bill is that of the whole trial. `left_out` is the reason why a row enters no mean, and empty for others.
    """

    def order(r: Record) -> tuple[Any, ...]:
        budget = tuple(-1 if r[f"budget_{u}"] is None else r[f"budget_{u}"] for u in ("requests", "images"))
        cell = (r["model"], r["method"], r["dataset"], r["shots"], *budget, r["answers"], r["seed"], r["trial_id"])
        return *cell, r["test_set"] != r["dataset"], r["test_set"]

    left_out = selection.left_out
    return [
        {k: r[k] for k in RAW} | {"left_out": left_out.get((r["trial_id"], r["test_set"]), "")}
        for r in sorted(selection.everything.to_pylist(), key=order)
    ]


def heading(rows: Sequence[Record]) -> str:
    """Return the heading of a section: test set, shots, allotment and model."""
    r = rows[0]
    several = r["datasets_of"]
    if r["dataset"] == "all":
        kind = {"shift": "shift test ", "transfer": "transfer "}.get(r["kind"], "data ")
        what = f"mean of {several} {kind}set{'s' * (several > 1)}"
    elif r["kind"] in ("shift", "transfer"):
        what = f"{r['dataset']} -> {r['test_set']} ({r['kind']})"
    else:
        what = r["dataset"]
    what += ", base-to-new" * (r["kind"] == HARMONIC)
    where = f"{r['shots']} shot{'s' * (r['shots'] > 1)}, {allotment(r)}, {r['model']} {r['precision']}"
    where += f", answers: {r['answers']}" * (r["answers"] != FULL)
    resolution = next((r["resolution"] for r in rows if r["resolution"] is not None), None)
    return plain(f"{what}, {where}" + ("" if resolution is None else f", resolution {resolution:.1f} points"))


def limits(record: Mapping[str, Any]) -> Limits:
    """Return the allotment of a record."""
    return Limits(record["budget_requests"], record["budget_images"])


def budget(of: Limits) -> str:
    """Return limits as text, e.g. '8,000 requests'; 'no limit' without one."""
    return of.text or "no limit"


def allotment(record: Record) -> str:
    """Return the allotment of a section as text, e.g. 'allotment 8,000 requests'; 'no limit' without one."""
    of = limits(record)
    return f"allotment {of.text}" if of.text else budget(of)


def rank_text(record: Record, digits: int = 0) -> str:
    """Return a rank with its interval, e.g. '3.2 (2-5)', or '3.2 (2.0-5.3)' with one digit; '-' without a rank."""
    if record["rank"] is None:
        return "-"
    low, high = record["rank_low"], record["rank_high"]
    return f"{record['rank']:.1f}" + ("" if low is None else f" ({low:.{digits}f}-{high:.{digits}f})")


def plus_minus(mean: float | None, ci95: float | None, sign: str = "", ends: Sequence[float | None] = ()) -> str:
    """Return a mean with the half-width of its interval, e.g. '57.8 ± 1.2'; '-' without a mean.

    Without an interval, but with different `ends` of the range over seeds, return these: '56.1..59.5'.
    """
    if mean is None:
        return "-"
    if ci95 is None and ends and None not in ends and ends[0] != ends[1]:
        return "..".join(f"{end:{sign}.1f}" for end in ends)
    return f"{mean:{sign}.1f}" + ("" if ci95 is None else f" ± {ci95:.1f}")


def accuracy(record: Mapping[str, Any]) -> str:
    """Return the accuracy with its interval, or its range over two seeds."""
    return estimate(record, "accuracy")


def state(record: Record) -> str:
    """Return what limits the validity of a line, such as unfinished trials, missing pairs or several code versions."""
    parts = [f"{record[s]} {STATUSES[s]}" for s in UNFINISHED if record[s]]
    if record["budget_exhausted_accuracy"] is not None:
        parts[0] += f" ({record['budget_exhausted_accuracy']:.1f})"
    if record["datasets"] < record["datasets_of"]:
        parts.append(f"{record['datasets']} of {record['datasets_of']} sets")
    if record["sources"] > 1:
        parts.append(f"{record['sources']} code versions")
    for name in GAINS:
        pairs = record.get(f"gain_{name}_pairs")
        if pairs and pairs < record["seeds"]:
            parts.append(f"over {name}: {pairs} of {record['seeds']} seeds")
    return ", ".join(parts)


def _shown(r: Record) -> dict[str, str]:
    if r["kind"] == HARMONIC:
        halves = [("base", r["base"]), ("new", r["new"]), ("H", r)]
        numbers = {name: accuracy(h) for name, h in halves}
        numbers |= {f"{name} gain": gain(h, "zero_shot") for name, h in halves[1:]}
    else:
        numbers = {"accuracy": accuracy(r)}
        numbers |= {f"over {name}": gain(r, name) for name in GAINS}
        numbers["rank"] = rank_text(r)
    return {
        "method": plain(r["label"]) + (" (ref)" if r["reference"] else ""),
        "seeds": str(r["seeds"]),
        **numbers,
        "requests": count(r["requests"]),
        "images": count(r["images"]),
        "state": state(r),
    }


def with_values(rows: Sequence[Record]) -> list[dict[str, str]]:
    """Return the cells of a section's lines, without gains over a reference that no line could be compared with."""
    shown = [_shown(r) for r in rows]
    empty = {name for name in shown[0] if name.startswith("over ") and all(cells[name] == "-" for cells in shown)}
    return [{name: cell for name, cell in cells.items() if name not in empty} for cells in shown]


def gain(record: Record, name: str) -> str:
    """Return the gain over a reference with its interval, e.g. '+5.1 ± 0.7', or its range over two seeds."""
    return estimate(record, f"gain_{name}", "+")


def estimate(record: Mapping[str, Any], name: str, sign: str = "") -> str:
    """Return a column of a record with its interval, or with its range over two seeds."""
    ends = record.get(f"{name}_min"), record.get(f"{name}_max")
    return plus_minus(record.get(name), record.get(f"{name}_ci95"), sign, ends)


def count(number: float | None) -> str:
    """Return a rounded number with thousands separators; '-' for None."""
    return "-" if number is None else f"{number:,.0f}"


def compact(number: float | None) -> str:
    """Return a count in at most six characters, e.g. 7,995, 208k and 1.66M."""
    if number is None:
        return "-"
    if number < 99_999.5:
        return f"{number:,.0f}"
    return f"{number / 1e3:.0f}k" if number < 999_500 else f"{number / 1e6:.3g}M"


def sections(table: pa.Table) -> Iterator[list[Record]]:
    """Yield the records of each section, with `datasets_of`: the largest number of data sets of a method in it.

    Records of base and new classes are attached to their harmonic record as `base` and `new`.
    """
    records = table.to_pylist()
    same = [k for k in (*Section._fields, "label") if k not in ("kind", "test_set")]
    halves = {(r["kind"], *(r[k] for k in same)): r for r in records if r["kind"] in HALVES}
    for _, rows in groupby(
        (r for r in records if r["kind"] not in HALVES), key=lambda r: [r[k] for k in Section._fields]
    ):
        section = list(rows)
        several = max(r["datasets"] for r in section)
        parts = [{h: halves.get((h, *(r[k] for k in same)), {}) for h in HALVES} for r in section]
        yield [r | part | {"datasets_of": several} for r, part in zip(section, parts, strict=True)]


def _accesses(table: pa.Table, name: str) -> list[str]:
    """Return the access labels of the methods of an access class, or of its references if it has no other."""
    records = [r for r in table.to_pylist() if r["access_class"] == name]
    return sorted({r["access"] for r in records if not r["reference"]} or {r["access"] or "none" for r in records})


def is_text(names: Mapping[str, str]) -> list[bool]:
    """Return which columns hold text, which is aligned on the left."""
    return [n in ("method", "state", "printed in", "note") for n in names]


def aligned(rows: Sequence[Mapping[str, str]], width: int = WIDTH) -> str:
    """Return lines as aligned columns; long method names are cut, and the `state` of each line follows below."""
    names = [n for n in rows[0] if n != "state"]
    widths = {n: max(len(n), *(len(r[n]) for r in rows)) for n in names}
    for name in DISPENSABLE:
        if name in names and min(24, widths["method"]) + sum(widths[n] + 2 for n in names[1:]) + 2 > width:
            names.remove(name)
    over = sum(widths[n] for n in names) + 2 * len(names) - width
    widths["method"] = max(8, widths["method"] - max(0, over))

    def line(cells: Mapping[str, str]) -> str:
        first = plain(cells["method"], widths["method"]).ljust(widths["method"])
        return "  " + "  ".join([first, *(cells[n].rjust(widths[n]) for n in names[1:])])

    states = [f"  ! {r['method']}: {r['state']}"[:width] for r in rows if r.get("state")]
    return "\n".join([line({n: n for n in names}), *map(line, rows), *states])


def _records(table: pa.Table | Sequence[Mapping[str, Any]]) -> tuple[list[Record], list[str]]:
    if isinstance(table, pa.Table):
        return table.to_pylist(), table.column_names
    return [dict(r) for r in table], list(table[0]) if table else [*RAW, "left_out"]
