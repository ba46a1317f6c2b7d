"""`farebox leaderboard`: show the results of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa

from pipeline.config.compose import Config
from pipeline.config.files import load, names
from pipeline.console import short_path
from pipeline.errors import ConfigError, did_you_mean
from pipeline.results.published.tables import html as printed_html
from pipeline.results.published.tables import with_printed
from pipeline.results.report import FORMATS, WITHOUT_NOTES, Report, make_report, page, read_selection
from pipeline.results.store import ResultStore
from pipeline.results.tables import raw_records, to_csv, to_json
from pipeline.sweep.storage_id import FILE

RAW_FORMATS = {"json": to_json, "csv": to_csv, "table": to_csv}
"""Formats of `farebox leaderboard --raw`; the default of `--format` prints CSV."""


def leaderboard(
    config: Config, form: str, raw: bool, published: bool = False, log: Callable[[str], None] = lambda line: None
) -> tuple[str, list[str]]:
    """Return the leaderboard of a storage in one of `report.FORMATS`.

    Args:
        config: Configuration that names the storage.
        form: The format.
        raw: Return single trials instead, as JSON or CSV.
        published: Append the comparison with printed accuracies.
        log: Prints notes in formats that have no place for them.

    Returns:
        The text, and one line for each damaged file of the storage.

    Raises:
        ConfigError: there is no sweep in the storage, or the options contradict each other.
    """
    if form not in FORMATS:
        raise ConfigError(did_you_mean("format", form, FORMATS))
    if raw and published:
        raise ConfigError("--raw and --published exclude each other: printed accuracies are compared with means only")
    if raw and form not in RAW_FORMATS:
        raise ConfigError(f"--raw --format {form}: expected json or csv")
    store = open_store(config)
    selection = read_selection(store)
    config = of_rows(config, selection.everything)
    if raw:
        notes, text = selection.notes, RAW_FORMATS[form](raw_records(selection))
    else:
        report = make_report(selection, store.reader(selection.rows), config.sweep, config.label)
        notes, text = report.notes, _with_printed(report, form) if published else FORMATS[form](report)
    if raw or form in WITHOUT_NOTES:
        for note in notes:
            log(note)
    return text, store.damage()


def _with_printed(report: Report, form: str) -> str:
    if form == "html":
        return page(report, printed_html(report.board))
    return with_printed(form, FORMATS[form](report), report.board)


def open_store(config: Config) -> ResultStore:
    """Open the result store of an existing sweep. Raises ConfigError if there is none."""
    if not (config.storage / FILE).exists():
        raise ConfigError(
            f"no sweep at {short_path(config.storage)}: choose one with storage=DIR, or run one: "
            f"farebox run sweep={config.sweep}"
        )
    return ResultStore(config.storage)


def of_rows(config: Config, rows: pa.Table) -> Config:
    """Return the configuration with the name and label of the sweep that wrote the rows, if it is one sweep.

    With storage=DIR alone, the configuration names another sweep.
    """
    sweeps = set(rows["sweep"].to_pylist())
    if len(sweeps) != 1 or sweeps == {config.sweep}:
        return config
    sweep = str(sweeps.pop())
    return replace(config, sweep=sweep, label=load("sweep", sweep).get("label", "") if sweep in names("sweep") else "")
