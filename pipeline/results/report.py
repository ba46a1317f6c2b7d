"""The report of a sweep: its leaderboard and summary, computed once and written in every format.

A format that `farebox leaderboard` prints is a line in `FORMATS`, a file that `farebox run` writes a line in `FILES`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from pipeline.config.compose import Config
from pipeline.console import short_path
from pipeline.errors import TrackingError
from pipeline.files import write_atomic
from pipeline.results.comparison import missing_references
from pipeline.results.html import html
from pipeline.results.identity import Selection, select
from pipeline.results.leaderboard import ReadPredictions, leaderboard
from pipeline.results.mirroring import open_mirror, report_digest
from pipeline.results.runs import read_runs
from pipeline.results.store import ResultStore
from pipeline.results.tables import raw_records, text_table, to_csv, to_json, to_latex, to_md


@dataclass(frozen=True)
class Report:
    """A computed leaderboard, from which every output is made."""

    selection: Selection
    board: pa.Table
    """One record per method and test set (`leaderboard.SCHEMA`)."""
    summary: pa.Table
    """The same averaged over data sets."""
    notes: tuple[str, ...]
    """One line for each thing to know about the tables, such as rows that are left out."""
    title: str = "Leaderboard"
    label: str = ""
    """The sweep's own description, shown at the top."""

    @cached_property
    def figures(self) -> dict[str, bytes]:
        """PNG figures by name."""
        from pipeline.results.plots import draw  # matplotlib takes long to import

        return draw(self.board, self.summary)


def make_report(
    selection: Selection,
    predictions: ReadPredictions | None = None,
    title: str = "Leaderboard",
    label: str = "",
) -> Report:
    """Compute the leaderboard of a selection; `predictions` reads what the bootstrap over test images needs."""
    board, summary = leaderboard(selection.rows, predictions)
    notes = (*selection.notes, *missing_references(board))
    return Report(selection, board, summary, notes, title, label)


def read_selection(store: ResultStore) -> Selection:
    """Read the rows of a storage and select the current ones."""
    return select(store.read(), read_runs(store.storage))


def page(report: Report, printed: str = "") -> str:
    """Return a report as a self-contained HTML page; `printed` is HTML that follows the leaderboard."""
    return html(
        report.board,
        report.summary,
        report.selection,
        report.figures,
        title=report.title,
        label=report.label,
        notes=report.notes,
        printed=printed,
    )


FORMATS: Mapping[str, Callable[[Report], str]] = {
    "table": lambda report: text_table(report.board, report.notes),
    "csv": lambda report: to_csv(report.board),
    "json": lambda report: to_json(report.board),
    "md": lambda report: to_md(report.board, report.notes),
    "latex": lambda report: to_latex(report.board, report.notes),
    "html": page,
}
"""Formats of `farebox leaderboard --format`."""
WITHOUT_NOTES = ("csv", "json")
"""Formats that have no place for notes."""
FILES: Mapping[str, Callable[[Report], str]] = {
    "leaderboard.html": page,
    "leaderboard.csv": lambda report: to_csv(report.board),
    "leaderboard.json": lambda report: to_json(report.board),
    "leaderboard.md": lambda report: to_md(report.summary, report.notes),
    "summary.csv": lambda report: to_csv(report.summary),
    "summary.txt": lambda report: text_table(report.summary, report.notes),
    "trials.csv": lambda report: to_csv(raw_records(report.selection)),
}
"""Files of a report, beside its figures."""


def report_files(report: Report) -> dict[str, bytes]:
    """Return the content of every file of a report, by its path in the report's folder."""
    texts = {name: render(report).encode() for name, render in FILES.items()}
    return texts | {f"figures/{name}.png": png for name, png in report.figures.items()}


def write_report(report: Report, storage: Path) -> Path:
    """Write the files of a report into a storage, and return their folder."""
    folder = storage / "leaderboard"
    for name, data in report_files(report).items():
        write_atomic(folder / name, data)
    return folder


def publish(config: Config, echo: Callable[[str], None]) -> list[str]:
    """Print the summary of a finished run, write its report, mirror both to MLflow, and print what to do next.

    Returns:
        One line for each damaged file of the storage.
    """
    store = ResultStore(config.storage)
    selection = read_selection(store)
    title = f"Leaderboard of {config.sweep}"
    report = make_report(selection, store.reader(selection.rows), title, config.label)
    if config.label:
        echo(f"\n{config.label}")
    echo("\n" + text_table(report.summary, report.notes))
    folder = write_report(report, config.storage)
    storage = shlex.quote(f"storage={short_path(config.storage)}")
    try:
        mirror = open_mirror(config)
        problems = mirror.sync(store).problems  # of trials that an earlier crash or a failure of MLflow left out
        digest = report_digest(config, selection)
        mirror.log_report(folder, report.board.to_pylist(), report.summary.to_pylist(), digest)
    except TrackingError as error:
        problems = [str(error)]
    for line in [*problems[:2], *([f"and {len(problems) - 2} more trials"] if len(problems) > 2 else [])]:
        echo(f"not mirrored to MLflow ({line}); try again with: farebox sync {storage}")
    echo(f"page with figures:  {short_path(folder / 'leaderboard.html')}")
    echo(f"every data set:     farebox leaderboard {storage}")
    echo(f"check the bill:     farebox ledger {storage}")
    echo(f"browse in MLflow:   farebox ui {storage}")
    return store.damage()
