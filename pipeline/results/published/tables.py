"""Write the comparison with printed accuracies as a section after the leaderboard, in each format."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

import pyarrow as pa

from pipeline.files import strict_json
from pipeline.results.comparison import FULL
from pipeline.results.escape import markdown
from pipeline.results.latex_tables import latex_table
from pipeline.results.published import EVIDENCE, ORIGIN, OURS, Printed, Record, matches, unmatched
from pipeline.results.tables import WIDTH, aligned, allotment, md_grid, plus_minus, to_csv

TITLE = "Comparison with printed numbers"
PRINTED = (
    *(f"printed_{k}" for k in Printed._fields if k not in ("farebox_method", "shots")),
    *("printed_selects_on", "ours_minus_printed"),
)
"""Columns that a leaderboard as CSV gets for printed numbers."""
SELECTION = {"nothing": "none", "training": "train", "validation": "val", "test": "test", "": ""}
"""What a printed number was chosen on, as the column `sel.` writes it."""
MEANING = (
    "Our results and printed ones for the same method, backbone, data set and shots. Budgets, validation, views and "
    "prompts may differ. No printed number enters a mean, a gain or a rank. Column `known`: "
    + "; ".join(f"{k}, {v}" for k, v in EVIDENCE.items())
    + ". Column `whose`: "
    + "; ".join(f"{k}, {v}" for k, v in ORIGIN.items())
    + ". Column `sel.`: what the authors' released code chooses settings, epoch or step on: test, the test set; val, "
    "validation images; train, the training images; none, nothing is chosen; empty, not known, or printed by others. "
    "`farebox audit` has the details."
)


def with_printed(form: str, table: str, board: pa.Table) -> str:
    """Return the leaderboard in a format other than HTML, followed by the comparison."""
    records = matches(board)
    if form == "json":
        return strict_json({"leaderboard": json.loads(table), "published": records}, indent=1) + "\n"
    if form == "csv":
        return to_csv(_joined(board, records)) if board.num_rows else table
    return f"{table}\n{ {'table': _text, 'md': _md, 'latex': _latex}[form](records) }"


def _joined(board: pa.Table, matched: Sequence[Record]) -> list[Record]:
    """Return the records of a leaderboard, once for each printed number; columns of cells without one are None.

    Zero-shot is printed once, at 0 shots: its numbers are beside our first record of the same test set.
    """
    cell = ("label", "model", "model_digest", "precision", "kind", "dataset", "test_set")
    place = ("shots", "budget_requests", "budget_images")
    left, records = list(matched), []
    for ours in board.to_pylist():
        same = [r for r in left if ours["answers"] == FULL and all(r[k] == ours[k] for k in cell)]
        same = [r for r in same if r["shots"] == 0 or all(r[k] == ours[k] for k in place)]
        left = [r for r in left if not any(r is other for other in same)]
        records += [ours | {name: r.get(name) for name in PRINTED} for r in same or [{}]]
    return records


def counted(records: Sequence[Record]) -> str:
    """Return one line with the number of matches."""
    rest = unmatched(list(records))
    if not records:
        return f"None of the {rest:,} printed accuracies matches a method, backbone, data set and shots of this table."
    cells = len({tuple(r[k] for k in OURS) for r in records})
    return f"{cells:,} of our cells match printed numbers; {rest:,} printed numbers match none of ours."


def _text(records: Sequence[Record]) -> str:
    blocks = [f"{TITLE.upper()}\n{counted(records)}"]
    for head, group in _sections(records):
        lines = [f"{head}\n{aligned(_shown(group))}"]
        lines += [
            textwrap.fill(f"! {note}", WIDTH, initial_indent="  ", subsequent_indent="    ") for note in _notes(group)
        ]
        blocks.append("\n".join(lines))
    if records:
        blocks += ["\n".join(["sources", *(f"  {line}" for line in _sources(records))]), textwrap.fill(MEANING, WIDTH)]
    return "\n\n".join(blocks) + "\n"


def _md(records: Sequence[Record]) -> str:
    blocks = [f"## {TITLE}", counted(records)]
    for head, group in _sections(records):
        blocks += [f"### {markdown(head)}", md_grid(_shown(group)), *_bullets(_notes(group))]
    if records:
        blocks += ["### Sources", *_bullets(_sources(records)), MEANING]
    return "\n\n".join(blocks) + "\n"


def _bullets(lines: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _latex(records: Sequence[Record]) -> str:
    comments = [f"{TITLE}. {counted(records)}", *(f"Source: {line}" for line in _sources(records))]
    notes = [f"{head}: {note}" for head, group in _sections(records) for note in _notes(group)]
    tables = [latex_table(f"{TITLE}: {head}", _shown(group)) for head, group in _sections(records)]
    return "\n".join([*(f"% {line}" for line in (*comments, *notes)), *tables])


def html(board: pa.Table) -> str:
    """Return the section of the HTML page."""
    records = matches(board)
    parts = [f"<p>{escape(counted(records))}</p>"]
    parts += [f"<p>{escape(MEANING)}</p>"] if records else []
    for head, group in _sections(records):
        shown = [
            cells | {"source": r["printed_source"], "note": r["printed_note"]}
            for cells, r in zip(_shown(group), group, strict=True)
        ]
        lines = [f"<tr>{''.join(f'<th scope=col>{escape(name)}</th>' for name in shown[0])}</tr>"]
        for cells in shown:
            theirs = (" class=printed" if name not in ("method", "ours", "seeds") else "" for name in cells)
            row = (f"<td{c}>{escape(cell)}</td>" for c, cell in zip(theirs, cells.values(), strict=True))
            lines.append(f"<tr>{''.join(row)}</tr>")
        parts.append(
            f"<div class=wide tabindex=0><table><caption>{escape(head)}</caption>{''.join(lines)}</table></div>"
        )
    return "\n".join(parts)


def _sections(records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    for head, group in groupby(records, key=_heading):
        yield head, list(group)


def _heading(r: Record) -> str:
    what = r["test_set"] if r["kind"] == "source" else f"{r['dataset']} -> {r['test_set']} (shift)"
    setting = f"{r['shots']} shot{'s' * (r['shots'] > 1)}, {allotment(r)}" if r["shots"] else "zero-shot"
    return f"{what}, {setting}, {r['model']} {r['precision']}"


def _shown(records: Sequence[Record]) -> list[dict[str, str]]:
    """Return the cells of each line; our result is written once for all rows that it matches."""
    lines, last = [], ""
    for r in records:
        first = r["label"] != last
        last = r["label"]
        lines.append(
            {
                "method": r["label"] if first else "",
                "ours": plus_minus(r["accuracy"], r["accuracy_ci95"]) if first else "",
                "seeds": str(r["seeds"]) if first else "",
                "printed": f"{r['printed_accuracy']:.2f}",
                "ours - printed": f"{r['ours_minus_printed']:+.1f}",
                "whose": r["printed_origin"],
                "known": r["printed_evidence"],
                "sel.": SELECTION[r["printed_selects_on"]],
                "printed in": r["printed_paper"],
            }
        )
    return lines


def _notes(records: Sequence[Record]) -> list[str]:
    notes = (f"{r['printed_paper']}, {r['printed_method']}: {r['printed_note']}" for r in records if r["printed_note"])
    return list(dict.fromkeys(notes))


def _sources(records: Sequence[Record]) -> list[str]:
    return sorted({f"{r['printed_paper']}: {r['printed_source']}" for r in records})
