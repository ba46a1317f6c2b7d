"""Open an MLflow store quietly, serve it, and what is known about files and code that its runs describe."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from pipeline.errors import TrackingError, first_line, masked
from pipeline.files import json_value, strict_json
from pipeline.results.row import ResultRow
from pipeline.results.tracking_names import fit_key

FORMAT = 3
"""Version of what a run contains; runs of another version are replaced."""


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


@contextlib.contextmanager
def one_transaction(client: Any) -> Iterator[None]:
    """Commit at once what the block writes to an SQL store of this process; each call by itself to another one.

    MLflow has no call that writes several runs, and each of its calls takes a transaction of its own. Within the block
    all of them get the session of one. An error rolls it back as a whole, also one that MLflow would handle.
    """
    store = getattr(getattr(client, "_tracking_client", None), "store", None)
    open_session = getattr(store, "ManagedSessionMaker", None)
    if store is None or open_session is None:
        yield
        return
    failure: Exception | None = None
    try:
        with open_session(read_only=False) as session:

            @contextlib.contextmanager
            def same_session(read_only: bool = True) -> Iterator[Any]:
                yield session
                session.flush()

            store.ManagedSessionMaker, session.commit, session.rollback = same_session, session.flush, _refuse
            try:
                yield
            except Exception as error:
                failure = error
                raise
            finally:
                store.ManagedSessionMaker = open_session
                del session.commit, session.rollback
    except Exception as error:
        raise failure or error from None  # MLflow's session raises errors of the block as its own


def _refuse() -> None:
    raise TrackingError("a call to MLflow failed in a batch")


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


def log_files(client: Any, run: Any, local: bool, contents: Mapping[str, Any], predictions: Sequence[Path]) -> None:
    """Write the artifacts of a run: into its folder, or through one folder of a server's upload."""
    place = urlparse(run.info.artifact_uri)
    if local and place.scheme == "file":
        write_files(Path(unquote(place.path)), contents, predictions)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), contents, predictions)
        client.log_artifacts(run.info.run_id, folder)


def remove_files(client: Any, run_id: str) -> None:
    """Remove the artifacts of a run."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with contextlib.suppress(NotImplementedError):  # a remote store that only overwrites
        get_artifact_repository(client.get_run(run_id).info.artifact_uri).delete_artifacts()


def digest_of(content: Any) -> str:
    """Return the digest of what a run is made from."""
    return hashlib.sha256(f"{FORMAT} {strict_json(content, sort_keys=True)}".encode()).hexdigest()


def rows_digest(rows: Sequence[ResultRow]) -> str:
    """Return the digest of the rows of a trial."""
    return digest_of([asdict(row) for row in rows])


def refused(error: TrackingError) -> bool:
    """Return whether MLflow or this package refused the content of one trial, rather than MLflow not working."""
    return error.__cause__ is None or getattr(error.__cause__, "error_code", "") == "INVALID_PARAMETER_VALUE"


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
