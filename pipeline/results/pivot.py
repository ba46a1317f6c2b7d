"""Write an overview as a table of accuracies for a paper: LaTeX, Markdown, CSV and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.results.escape import latex, markdown
from pipeline.results.latex_tables import latex_environment, latex_number
from pipeline.results.overview import NO_FIT, Line, Overview
from pipeline.results.tables import accuracy, count, to_csv, to_json

Record = dict[str, Any]
PARTS = ("", "_ci95", "_min", "_max")


def records(view: Overview | None) -> list[Record]:
    """Return one record per method: for each column its accuracy and its gain, with interval and range over seeds."""
    found = []
    for line in view.lines if view else ():
        record: Record = {"group": line.group, "method": line.main["label"], "access": line.main["access"]}
        record |= {name: line.main[name] for name in ("reference", "seeds", "requests", "images", "leader", "tied")}
        for column, cell in zip(view.columns if view else (), line.records, strict=True):
            for value in ("accuracy", "gain_zero_shot"):
                record |= {f"{column} {value}{part}": cell and cell[f"{value}{part}"] for part in PARTS}
        found.append(record)
    return found


def pivot_csv(view: Overview | None) -> str:
    """Return `records` as CSV."""
    found = records(view)
    return to_csv(found) if found else "group,method\n"


def pivot_json(view: Overview | None) -> str:
    """Return `records` as JSON."""
    return to_json(records(view))


def pivot_md(view: Overview | None, notes: Sequence[str] = ()) -> str:
    """Return a Markdown table of accuracies, the best of each group and column in bold."""
    if view is None:
        return "No finished trials.\n"
    head = ["Method", *map(markdown, view.columns), "Requests", "Images"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    for name, group in view.groups.items():
        lines.append(f"| *{markdown(name)}* |{' |' * (len(head) - 1)}")
        for line, cells in _cells(view, group):
            shown = [f"**{text}**" if best else text for text, best in cells]
            lines.append(f"| {' | '.join([markdown(line.main['label']), *shown, *_bill(line)])} |")
    return "\n".join([*lines, "", caption(view), *(f"- {markdown(note)}" for note in notes), ""])


def pivot_latex(view: Overview | None, title: str, notes: Sequence[str] = ()) -> str:
    r"""Return a booktabs table of accuracies that is scaled to \textwidth if it is wider."""
    if view is None:
        return "% No finished trials.\n"
    head = ["Method", *map(latex, view.columns), "Requests", "Images"]
    body = []
    for name, group in view.groups.items():
        body.append(rf"\midrule \multicolumn{{{len(head)}}}{{l}}{{\textit{{{latex(name)}}}}} \\")
        for line, cells in _cells(view, group):
            shown = [rf"\textbf{{{latex_number(text)}}}" if best else latex_number(text) for text, best in cells]
            body.append(" & ".join([latex(line.main["label"]), *shown, *_bill(line)]) + r" \\")
    columns = f"l{'r' * (len(head) - 1)}"
    table = latex_environment(caption(view), f"{title}-{view.axis}", columns, head, body)
    return "\n".join([*(f"% {note}" for note in notes), table])


def caption(view: Overview) -> str:
    """Return what the table shows, in words."""
    facts = [view.facts[name] for name in ("data", "kind", "shots", "seeds", "allotment", "answers", "model")]
    values = [line.main["accuracy_ci95"] for line in view.lines]
    interval = " ± 95% CI over seeds" if any(value is not None for value in values) else ""
    return (
        f"Accuracy in percent{interval}: {', '.join(fact for fact in facts if fact)}. Bold: the best of each group. "
        "Requests and image rows are billed for fitting."
    )


def _cells(view: Overview, group: Sequence[Line]) -> Iterator[tuple[Line, list[tuple[str, bool]]]]:
    """Yield each line with its cells: the text, and whether it is the best of the group as printed."""
    best: list[float | None] = []
    for i in range(len(view.columns)):
        values = [_rounded(line.records[i]) for line in group]
        best.append(max((v for v in values if v is not None), default=None))
    for line in group:
        cells = []
        for i, record in enumerate(line.records):
            value = _rounded(record)
            text = "-" if value is None or record is None else accuracy(record) if i == view.main else f"{value:.1f}"
            cells.append((text, value is not None and value == best[i] and line.group != NO_FIT))
        yield line, cells


def _rounded(record: Record | None) -> float | None:
    return None if record is None or record["accuracy"] is None else round(record["accuracy"], 1)


def _bill(line: Line) -> list[str]:
    return [count(line.main[unit]) for unit in ("requests", "images")]
