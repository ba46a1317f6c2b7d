"""`farebox leaderboard`: show the results of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.config import answers
from pipeline.config import values as checks
from pipeline.config.compose import Config, compose
from pipeline.config.files import VALUE_OR_KEYS, parse_overrides
from pipeline.config.plugins import with_methods_of_files
from pipeline.console import Terminal
from pipeline.errors import ConfigError, did_you_mean
from pipeline.results.filters import COLUMNS, Filter
from pipeline.results.overview import AXES
from pipeline.results.published.tables import html as printed_html
from pipeline.results.published.tables import with_printed
from pipeline.results.report import (
    FORMATS,
    PIVOTS,
    WITHOUT_NOTES,
    Report,
    last_screen,
    make_report,
    page,
    read_selection,
)
from pipeline.results.runs import read_runs
from pipeline.results.tables import WIDTH, raw_records, text_table, to_csv, to_json
from pipeline.sweep.storage import open_store

RAW_FORMATS = {"json": to_json, "csv": to_csv, "table": to_csv}
"""Formats of `farebox leaderboard --raw`; the default of `--format` prints CSV."""
PAPER = ("latex", "md")
"""Formats that print the table for a paper, methods by data sets, unless --all or --by asks for another."""
LOCATION = ("sweep", "storage", "data", "mlflow", "features")
"""Keys that tell where results are, or that a command of `farebox run` may have and no result depends on."""


@dataclass(frozen=True)
class Options:
    """Options of `farebox leaderboard`."""

    form: str = "table"
    """One of `report.FORMATS`."""
    raw: bool = False
    """Single trials, as CSV or JSON."""
    published: bool = False
    """Append the comparison with printed accuracies."""
    by: str | None = None
    """Axis of the overview, one of `overview.AXES`."""
    every: bool = False
    """The full table: every section and column."""

    def check(self) -> None:
        """Raise ConfigError if a format or an axis is unknown, or options contradict each other."""
        if self.form not in FORMATS:
            raise ConfigError(did_you_mean("format", self.form, FORMATS))
        if self.by is not None and self.by not in AXES:
            raise ConfigError(did_you_mean("axis", self.by, AXES))
        if self.raw and self.published:
            raise ConfigError(
                "--raw and --published exclude each other: printed accuracies are compared with means only"
            )
        if self.raw and self.form not in RAW_FORMATS:
            raise ConfigError(f"--raw --format {self.form}: expected json or csv")
        if self.by and (self.raw or self.published or self.every):
            raise ConfigError("--by shows one table: leave out --raw, --published and --all")
        if self.by and self.form not in ("table", *PIVOTS):
            raise ConfigError(f"--by {self.by} --format {self.form}: expected table, {', '.join(PIVOTS)}")


def of_words(words: Sequence[str]) -> tuple[Config, Filter]:
    """Return the configuration that names the storage, and the filter of the other overrides.

    Raises:
        ConfigError: a key neither names a storage nor filters its rows.
    """
    typed = parse_overrides(words)
    flat = {key: value for key, value in _flat(typed) if key.split(".")[0] not in LOCATION}
    for key in flat:
        if key not in COLUMNS:
            known = (*COLUMNS, *LOCATION)
            raise ConfigError(f"{key} does not filter a leaderboard: " + did_you_mean("filter", key, known))
    config = compose([word for word in words if word.partition("=")[0].split(".")[0] in LOCATION])
    values: dict[str, tuple[Any, ...]] = {}
    for key, value in flat.items():
        if key == "methods":
            of_files = with_methods_of_files(checks.name_list(key, value))
            # a file that cannot be imported filters nothing: results stay readable
            values |= {key: names} if (names := tuple(n for n in of_files if not n.endswith(".py"))) else {}
        elif key in ("model", "datasets"):
            values[key] = checks.name_list(key, value)
        elif key == "answers":
            values[key] = tuple(answers.texts(key, value))
        elif key.startswith("budget."):
            values[key] = checks.limit_list(key, value)
        else:
            values[key] = checks.numbers(key, value, minimum=0)
    return config, Filter(values)


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in VALUE_OR_KEYS:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def leaderboard(
    config: Config,
    options: Options | None = None,
    only: Filter | None = None,
    terminal: Terminal | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[str, list[str]]:
    """Return the leaderboard of a storage as text.

    Args:
        config: Configuration that names the storage.
        options: What to show, and in which format.
        only: The filter of the rows.
        terminal: Size and abilities of the terminal.
        log: Prints notes in formats that have no place for them.

    Returns:
        The text, and one line for each damaged file of the storage.

    Raises:
        ConfigError: there is no sweep in the storage, the options contradict each other, or nothing passes the filter.
    """
    options, only, terminal = options or Options(), only or Filter(), terminal or Terminal()
    options.check()
    store = open_store(config)
    selection = read_selection(store, config.features)
    config = of_rows(config, selection.everything)
    if options.raw:
        selection = only.select(selection, references=False)
        notes, text = selection.notes, RAW_FORMATS[options.form](raw_records(selection))
    else:
        overview = options.form == "table" and not (options.every or options.published)
        reader = None if overview or options.by else store.reader(selection.rows)  # the bootstrap takes seconds
        label = read_runs(store.storage).description
        report = make_report(selection, reader, config.sweep, label, config.sweep, only)
        notes, text = report.notes, _text(report, config, options, terminal)
    if options.raw or options.form in WITHOUT_NOTES:
        for note in notes:
            log(note)
    return text, store.damage()


def _text(report: Report, config: Config, options: Options, terminal: Terminal) -> str:
    if options.published:
        return _with_printed(report, options.form)
    if options.form == "table":
        if options.every:
            return text_table(report.board, report.notes, terminal.width if terminal.is_tty else WIDTH)
        return last_screen(report, config, terminal, axis=options.by)
    if options.by or (options.form in PAPER and not options.every):
        return PIVOTS[options.form](report.overview(options.by or "dataset"), report)
    return FORMATS[options.form](report)


def _with_printed(report: Report, form: str) -> str:
    if form == "html":
        return page(report, printed_html(report.board))
    return with_printed(form, FORMATS[form](report), report.board)


def of_rows(config: Config, rows: pa.Table) -> Config:
    """Return the configuration with the name of the sweep that wrote the rows, if it is one sweep.

    With storage=DIR alone, the configuration names another sweep.
    """
    sweeps = set(rows["sweep"].to_pylist())
    if len(sweeps) != 1 or sweeps == {config.sweep}:
        return config
    return replace(config, sweep=str(sweeps.pop()))
