"""`farebox leaderboard`, `sync` and `ui`: show the results of a sweep, here and in MLflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa

from pipeline.config.compose import Config
from pipeline.config.files import load, names
from pipeline.console import short_path
from pipeline.errors import ConfigError, did_you_mean, masked
from pipeline.results import tracking
from pipeline.results.mirroring import open_mirror
from pipeline.results.published.tables import html as printed_html
from pipeline.results.published.tables import with_printed
from pipeline.results.report import FORMATS, WITHOUT_NOTES, Report, make_report, page, read_selection, write_report
from pipeline.results.store import ResultStore
from pipeline.results.tables import raw_records, to_csv, to_json
from pipeline.sweep.preflight import check_free_port
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
    config = _of_rows(config, selection.everything)
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


def sync(config: Config, echo: Callable[[str], None]) -> list[str]:
    """Rebuild the MLflow mirror from the rows of a storage, and the report if a run wrote one.

    Returns:
        One line for each trial that MLflow did not accept, and for each damaged file.
    """
    store = open_store(config)
    selection = read_selection(store)
    config = _of_rows(config, selection.everything)
    mirror = open_mirror(config)
    outcome = mirror.sync(store)
    echo(f"{outcome.mirrored} trials are in MLflow at {masked(config.mlflow)}")
    if (config.storage / "leaderboard").is_dir():
        title = f"Leaderboard of {config.sweep}"
        report = make_report(selection, store.reader(selection.rows), title, config.label)
        mirror.log_report(write_report(report, config.storage), report.board.to_pylist())
    return [*outcome.problems, *store.damage()]


def ui_command(config: Config, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the command that serves MLflow's pages for a sweep, and the environment variables to add.

    Raises:
        ConfigError: there is no sweep in the storage, or the port is in use.
    """
    open_store(config)
    check_free_port(port)
    return tracking.ui_command(config.mlflow, port)


def open_store(config: Config) -> ResultStore:
    """Open the result store of an existing sweep. Raises ConfigError if there is none."""
    if not (config.storage / FILE).exists():
        raise ConfigError(
            f"no sweep at {short_path(config.storage)}: choose one with storage=DIR, or run one: "
            f"farebox run sweep={config.sweep}"
        )
    return ResultStore(config.storage)


def _of_rows(config: Config, rows: pa.Table) -> Config:
    """Return the configuration with the name and label of the sweep that wrote the rows, if it is one sweep.

    With storage=DIR alone, the configuration names another sweep.
    """
    sweeps = set(rows["sweep"].to_pylist())
    if len(sweeps) != 1 or sweeps == {config.sweep}:
        return config
    sweep = str(sweeps.pop())
    return replace(config, sweep=sweep, label=load("sweep", sweep).get("label", "") if sweep in names("sweep") else "")
