"""Open an MLflow store quietly, serve it, and what is known about files and code that its runs describe."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from pipeline.errors import TrackingError, first_line, masked
from pipeline.files import json_value, strict_json
from pipeline.results.tracking_names import fit_key


def open_client(uri: str) -> Any:
    """Open MLflow's client of a store. The file of a SQLite store is created if needed."""
    _quiet()
    from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # reported once, as a TrackingError
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=20)) as db:
            db.execute("pragma journal_mode=wal")  # stored in the file: readers do not wait for the writer
    return MlflowClient(tracking_uri=uri)


def _quiet() -> None:
    """Disable telemetry, and shorten the timeouts of remote stores, unless the user set these variables."""
    defaults = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    defaults |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    defaults |= {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}  # two lines for each run of a server
    defaults |= {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    for key, value in defaults.items():
        os.environ.setdefault(key, value)


def ui_command(tracking_uri: str, port: int = 5000, host: str = "127.0.0.1") -> tuple[list[str], dict[str, str]]:
    """Return the command that serves MLflow's pages for a store, and the environment variables to add.

    The URI of the store may contain a password, so it is not an argument, which every user of the machine can read.
    """
    _quiet()
    serve = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    return serve, {"MLFLOW_BACKEND_STORE_URI": tracking_uri}


@contextlib.contextmanager
def mapped(what: str) -> Iterator[None]:
    """Convert all errors of MLflow and its libraries to TrackingError."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(masked(f"{what}: {type(error).__name__}: {first_line(error)}")) from error


def is_gone(location: str) -> bool:
    """Return whether a location was a folder of this machine that no longer exists."""
    place = urlparse(location)
    return place.scheme in ("", "file") and not Path(unquote(place.path)).exists()


def write_files(folder: Path, contents: Mapping[str, Any], predictions: Sequence[Path]) -> None:
    """Write the artifacts of a run into a folder.

    Args:
        folder: The folder.
        contents: JSON values by file name.
        predictions: Files for the folder `predictions`. They get a second name, which takes no space, or are copied if
            they are on another disk.
    """
    (folder / "predictions" if predictions else folder).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(strict_json(json_value(content)))
    for file in predictions:
        target = folder / "predictions" / _file_name(file)
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)


def _file_name(file: Path) -> str:
    """Return the file's name, or another one if its decoded name contains a path, which artifact servers refuse."""
    name = unquote(file.stem)
    return f"{fit_key(name)}{file.suffix}" if set(name) & set("/\\") or not name.strip(".") else file.name


@cache
def git_tags() -> dict[str, str]:
    """Return tags with the git commit of this installation; none if it is no checkout."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return {}

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "methods", "pipeline")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit, "mlflow.git.dirty": str(bool(changes)).lower()} if commit else {}
