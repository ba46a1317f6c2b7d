"""The report of a sweep: its leaderboard and summary, computed once and written in every format.

A format that `farebox leaderboard` prints is a line in `FORMATS`, a file that `farebox run` writes a line in `FILES`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.config.compose import Config
from pipeline.console import Terminal, short_path
from pipeline.errors import TrackingError
from pipeline.files import write_atomic
from pipeline.results import noise_floor
from pipeline.results.comparison import missing_references
from pipeline.results.filters import Filter
from pipeline.results.html import html
from pipeline.results.identity import Selection, select
from pipeline.results.ladder import COLUMNS, cheapest, cheapest_md, compared
from pipeline.results.latex_tables import to_latex
from pipeline.results.leaderboard import ReadPredictions, leaderboard
from pipeline.results.mirroring import FOLDER, is_published, mark_published, open_mirror, report_digest
from pipeline.results.overview import Overview, overview
from pipeline.results.pivot import pivot_csv, pivot_json, pivot_latex, pivot_md
from pipeline.results.runs import read_runs
from pipeline.results.screen import screen
from pipeline.results.store import ResultStore
from pipeline.results.tables import raw_records, text_table, to_csv, to_json, to_md

if TYPE_CHECKING:
    from pipeline.results.drawing import Drawing


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
    sweep: str = ""
    """Name of the sweep."""

    def overview(self, axis: str | None = None) -> Overview | None:
        """Return the overview by an axis of `overview.AXES`; None chooses it."""
        return overview(self.board, self.summary, axis)

    @cached_property
    def cheapest(self) -> list[dict[str, Any]]:
        """The cheapest method near the best for each budget (`ladder.cheapest`)."""
        return cheapest(compared(self.board.to_pylist(), self.summary.to_pylist()))

    @cached_property
    def figures(self) -> dict[str, Drawing]:
        """Figures by name."""
        from pipeline.results.plots import draw  # matplotlib takes long to import

        return draw(self.board, self.summary, self.selection.rows)


def make_report(
    selection: Selection,
    predictions: ReadPredictions | None = None,
    title: str = "Leaderboard",
    label: str = "",
    sweep: str = "",
    only: Filter | None = None,
) -> Report:
    """Compute the leaderboard of a selection.

    Args:
        selection: The rows.
        predictions: Reads what the bootstrap over test images needs; None leaves its intervals out.
        title: Title of the page.
        label: The sweep's own description; dropped if `only` restricts what is shown.
        sweep: Name of the sweep.
        only: The filter; None shows everything.

    Raises:
        ConfigError: nothing passes the filter.
    """
    only = only or Filter()
    selection = only.select(selection)
    computed = leaderboard(selection.rows, predictions, only.methods)
    board, summary = (noise_floor.with_floors(only.records(table), selection.floors) for table in computed)
    notes = (*selection.notes, *missing_references(board))
    return Report(selection, board, summary, notes, title, "" if only.values else label, sweep or title)


def read_selection(store: ResultStore, features: Path | None = None) -> Selection:
    """Read the rows of a storage, select the current ones, and read noise floors from the folder of the features."""
    selection = select(store.read(), read_runs(store.storage))
    if features is None:
        return selection
    floors, problems = noise_floor.read(features, selection.rows)
    notes = (*selection.notes, *problems, *map(noise_floor.line, floors))
    return replace(selection, notes=notes, floors=tuple(floors))


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
PIVOTS: Mapping[str, Callable[[Overview | None, Report], str]] = {
    "csv": lambda view, report: pivot_csv(view),
    "json": lambda view, report: pivot_json(view),
    "md": lambda view, report: pivot_md(view, report.notes),
    "latex": lambda view, report: pivot_latex(view, report.sweep, report.notes),
}
"""Formats of `farebox leaderboard --by`, besides the table."""
FILES: Mapping[str, Callable[[Report], str]] = {
    "leaderboard.html": page,
    "leaderboard.csv": lambda report: to_csv(report.board),
    "leaderboard.json": lambda report: to_json(report.board),
    "leaderboard.md": lambda report: to_md(report.summary, report.notes),
    "summary.csv": lambda report: to_csv(report.summary),
    "summary.txt": lambda report: text_table(report.summary, report.notes),
    "cheapest.csv": lambda report: to_csv(report.cheapest) if report.cheapest else ",".join(COLUMNS) + "\n",
    "cheapest.md": lambda report: cheapest_md(report.cheapest),
    "trials.csv": lambda report: to_csv(raw_records(report.selection)),
}
"""Files of a report, beside its figures."""


def report_files(report: Report) -> dict[str, bytes]:
    """Return the content of every file of a report, by its path in the report's folder."""
    texts = {name: render(report).encode() for name, render in FILES.items()}
    return texts | {f"figures/{name}.png": figure.png for name, figure in report.figures.items()}


def write_report(report: Report, storage: Path) -> Path:
    """Write the files of a report into a storage, and return their folder."""
    folder = storage / FOLDER
    for name, data in report_files(report).items():
        write_atomic(folder / name, data)
    return folder


def last_screen(
    report: Report, config: Config, terminal: Terminal, page_file: Path | None = None, axis: str | None = None
) -> str:
    """Return the overview with the commands that show more."""
    sweep = shlex.quote(f"sweep={config.sweep}")
    own = config.storage == Path("runs", config.sweep).absolute()
    storage = sweep if own else shlex.quote(f"storage={short_path(config.storage)}")
    where = [f"page: {short_path(page_file)}"] if page_file else []
    view = report.overview(axis)
    by = "dataset" if view is not None and view.axis == "budget" else "budget"
    more = f"more: farebox leaderboard {storage} --all"
    choices = (
        f"{more} or --by {by}; farebox ledger {storage}; farebox ui {storage}",
        f"{more} or --by {by}; farebox ui {storage}",
        f"{more} or --by {by}",
        more,
    )
    where.append(next((line for line in choices if len(line) <= terminal.width), choices[-1]))
    return screen(
        view,
        terminal,
        title=report.sweep,
        label=report.label,
        notes=report.notes,
        where=where,
    )


def publish(config: Config, echo: Callable[[str], None], terminal: Terminal | None = None) -> list[str]:
    """Write the report of a finished run, mirror it to MLflow, and print one screen of results and what to do next.

    A report that was written and mirrored before is not made again.

    Returns:
        One line for each damaged file of the storage.
    """
    store = ResultStore(config.storage)
    selection = read_selection(store, config.features)
    label = read_runs(store.storage).description
    known = is_published(config, selection)
    reader = None if known else store.reader(selection.rows)  # the screen needs no bootstrap, which takes seconds
    report = make_report(selection, reader, f"Leaderboard of {config.sweep}", label, config.sweep)
    if not known:
        _write_and_mirror(report, config, store, echo)
    page_file = config.storage / FOLDER / "leaderboard.html"
    echo("\n" + last_screen(report, config, terminal or Terminal(), page_file))
    return store.damage()


def _write_and_mirror(report: Report, config: Config, store: ResultStore, echo: Callable[[str], None]) -> None:
    folder = write_report(report, config.storage)
    try:
        mirror = open_mirror(config)
        problems = mirror.sync(store).problems  # of trials that an earlier crash or a failure of MLflow left out
        digest = report_digest(config, report.selection)
        mirror.log_report(folder, report.board.to_pylist(), report.summary.to_pylist(), digest)
    except TrackingError as error:
        problems = [str(error)]
    if not problems:
        mark_published(config, report.selection)
    storage = shlex.quote(f"storage={short_path(config.storage)}")
    for line in [*problems[:2], *([f"and {len(problems) - 2} more trials"] if len(problems) > 2 else [])]:
        echo(f"not mirrored to MLflow ({line}); try again with: farebox sync {storage}")
