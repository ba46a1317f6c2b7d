"""`farebox sync` and `ui`: rebuild the MLflow mirror of a sweep, and show it in MLflow's pages."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.commands.leaderboard import of_rows
from pipeline.config.compose import Config
from pipeline.console import Echo, short_path
from pipeline.errors import ConfigError, masked
from pipeline.results import tracking_views
from pipeline.results.mirroring import FOLDER, ignored_variable, open_mirror, report_digest
from pipeline.results.report import make_report, read_selection, write_report
from pipeline.results.runs import read_runs
from pipeline.results.tracking_store import ui_command
from pipeline.sweep.preflight import check_free_port
from pipeline.sweep.storage import open_store

PROGRESS_S = 5.0
"""Seconds between two lines of progress."""
START_S = 120
"""Seconds that the browser waits for the server to start."""
_OPEN_WHEN_SERVED = f"""
import os, sys, time, urllib.request, webbrowser
server, page = sys.argv[1:]
opener, parent = urllib.request.build_opener(urllib.request.ProxyHandler({{}})), os.getppid()
for _ in range({START_S * 2}):
    time.sleep(0.5)
    if os.getppid() != parent:
        break
    try:
        opener.open(server + "health", timeout=5)
    except OSError:
        continue
    webbrowser.open(page)
    break
"""
"""A program that opens a page once its server answers, or stops if the server's process has ended."""


def sync(config: Config, echo: Echo, log: Echo = lambda line: None) -> list[str]:
    """Rebuild the MLflow mirror from the rows of a storage, and the report if a run wrote one.

    Trials that are mirrored already, and a report of the same rows, are left as they are.

    Returns:
        One line for each trial that MLflow did not accept, and for each damaged file.
    """
    store = open_store(config)
    selection = read_selection(store, config.features)
    config = of_rows(config, selection.everything)
    for line in ignored_variable(config):
        log(f"farebox: {line}")
    mirror = open_mirror(config)
    outcome = mirror.sync(store, _progress(log))
    echo(f"{outcome.mirrored} trials are in MLflow at {masked(config.mlflow)}")
    folder = config.storage / FOLDER
    if folder.is_dir() and not mirror.has_report(report_digest(config, selection)):
        title = f"Leaderboard of {config.sweep}"
        label = read_runs(store.storage).description
        report = make_report(selection, store.reader(selection.rows), title, label, config.sweep)
        write_report(report, config.storage)
        digest = report_digest(config, selection)
        mirror.log_report(folder, report.board.to_pylist(), report.summary.to_pylist(), digest)
    else:
        mirror.write_views()
    return [*outcome.problems, *store.damage()]


def _progress(log: Echo) -> Callable[[int, int], None]:
    """Return a function that prints how many trials are mirrored, every few seconds and at the end."""
    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        if done == total or time.monotonic() - said >= PROGRESS_S:
            said = time.monotonic()
            log(f"mirrored {done} of {total} trials")

    return progress


def ui(config: Config, port: int, browser: bool, echo: Echo, log: Echo) -> tuple[list[str], dict[str, str]] | None:
    """Print the addresses of a sweep in MLflow's pages, and open the first in a browser once it is served.

    Args:
        config: Configuration that names the storage and the MLflow store.
        port: Port on this machine to serve the pages on; not used if `mlflow` is a server.
        browser: Open a browser, if there is a terminal and a display.
        echo: Prints the addresses.
        log: Prints notes.

    Returns:
        The command that serves the pages, and the environment variables to add; None if `mlflow` is a server.

    Raises:
        ConfigError: there is no sweep in the storage, the port is in use, or MLflow's pages are elsewhere.
        TrackingError: the MLflow store cannot be opened.
    """
    store = open_store(config)
    scheme = urlsplit(config.mlflow).scheme
    remote = scheme in ("http", "https")
    if scheme.startswith("databricks"):
        raise ConfigError("mlflow=databricks: open the experiment in the Databricks workspace")
    if not remote:
        check_free_port(port)
    config = of_rows(config, store.read())
    for line in ignored_variable(config):
        log(f"farebox: {line}")
    mirror = open_mirror(config)
    trials = store.trials()
    if missing := len(mirror.missing(trials)):
        storage = shlex.quote(f"storage={short_path(config.storage)}")
        log(f"farebox: {missing} of {len(trials)} trials are not in MLflow as they are now: farebox sync {storage}")
    mirror.write_views()
    server = _without_password(config.mlflow) if remote else f"http://127.0.0.1:{port}/"
    methods = server + tracking_views.methods_page(mirror.experiment_id)
    echo(f"compare methods:  {methods}")
    echo(f"all trials:       {server}{tracking_views.trials_page(mirror.experiment_id)}")
    browser = browser and _can_show_pages()
    if remote:
        if browser:
            webbrowser.open(methods)
        return None
    echo("press Ctrl-C to stop; the pages are there in a few seconds")
    if browser:
        _open_when_served(server, methods)
    return ui_command(config.mlflow, port)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/"


def _can_show_pages() -> bool:
    """Return whether a person is at a terminal with a display; a browser in the terminal would take it over."""
    display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return sys.stdout.isatty() and bool(display)


def _open_when_served(server: str, page: str) -> None:
    command = [sys.executable, "-I", "-c", _OPEN_WHEN_SERVED, server, page]
    with Path(os.devnull).open("r+") as none:
        subprocess.Popen(command, start_new_session=True, stdin=none, stdout=none, stderr=none)
