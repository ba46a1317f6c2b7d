"""Open the MLflow mirror of a sweep, and mirror trials from a background thread while the sweep runs."""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pipeline.config.compose import Config
from pipeline.console import plain
from pipeline.errors import DamagedFile, TrackingError, masked
from pipeline.files import file_sha256, read_sealed_json, sealed_json, strict_json, write_atomic
from pipeline.ledger.sqlite_file import sqlite_file
from pipeline.results.identity import Selection
from pipeline.results.row import ResultRow
from pipeline.results.store import ResultStore
from pipeline.results.tracking import BATCH, Mirror
from pipeline.source_code import driver_code, texts_digest

MirrorRows = Callable[[Sequence[ResultRow]], None]
"""Receives the rows of each trial when it has ended. It must return quickly: Ray Tune waits for it."""
PUBLISHED = "published.json"
FOLDER = "leaderboard"
"""Folder of a storage with the files of its report."""
GATHER_S = 2.0
"""Seconds for which rows are gathered for a batch."""
RETRY_S = 60.0
"""Seconds without another attempt after MLflow failed."""


def open_mirror(config: Config) -> Mirror:
    """Open the MLflow mirror of a sweep. Raises TrackingError if MLflow fails."""
    return Mirror(config.mlflow, config.storage / "mlflow", f"farebox/{config.sweep}", _storage_id(config.storage))


def _storage_id(storage: Path) -> str:
    """Return the id of a storage, which tells two storages of equal paths on two machines apart; '' without one."""
    try:
        return plain(str(json.loads((storage / "storage_id").read_bytes().partition(b"\n")[0])["id"]), 50)
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def report_digest(config: Config, selection: Selection) -> str:
    """Return a digest of the report in a storage and of all that it is made from: rows, settings and code."""
    parts = [
        strict_json(selection.rows.to_pylist()),
        *selection.notes,
        config.sweep,
        config.label,
        driver_code().digest,
    ]
    for file in sorted((config.storage / FOLDER).rglob("*")):
        parts += [str(file), file_sha256(file) if file.is_file() else ""]
    return texts_digest(parts)


def is_published(config: Config, selection: Selection) -> bool:
    """Return whether the report of these rows was written and mirrored to this MLflow store, and is unchanged."""
    file = sqlite_file(config.mlflow)
    if file is not None and not file.exists():
        return False
    try:
        return read_sealed_json(config.storage / PUBLISHED) == _published(config, selection)
    except (OSError, DamagedFile):
        return False


def mark_published(config: Config, selection: Selection) -> None:
    """Record that the report of these rows is written and mirrored."""
    write_atomic(config.storage / PUBLISHED, sealed_json(_published(config, selection)))


def _published(config: Config, selection: Selection) -> dict[str, str]:
    return {"mlflow": masked(config.mlflow), "digest": report_digest(config, selection)}


def ignored_variable(config: Config) -> list[str]:
    """Return a line that says that MLFLOW_TRACKING_URI is not used, if it is set and names another store."""
    if os.environ.get("MLFLOW_TRACKING_URI", "") in ("", config.mlflow):
        return []
    return ["MLFLOW_TRACKING_URI is ignored; to use it: mlflow='${oc.env:MLFLOW_TRACKING_URI}'"]


class BackgroundMirror:
    """Mirror finished trials to MLflow from one thread, so that MLflow does not delay any trial."""

    def __init__(self, config: Config) -> None:
        self.config, self.store = config, ResultStore(config.storage)
        self._queue: queue.SimpleQueue[Sequence[ResultRow] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, rows: Sequence[ResultRow]) -> None:
        """Queue the rows of a finished trial."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._queue.put(rows)

    def _work(self) -> None:
        mirror, retry_at, open_ = None, 0.0, True
        while open_:
            trials, open_ = self._gathered()
            if not trials or time.monotonic() < retry_at:
                continue  # each attempt would wait for the server; `publish` mirrors the trials that are left out
            try:
                mirror = mirror or open_mirror(self.config)
                mirror.mirror_all([(rows, partial(self.store.prediction_files, rows)) for rows in trials])
            except TrackingError:
                retry_at = time.monotonic() + RETRY_S

    def _gathered(self) -> tuple[list[Sequence[ResultRow]], bool]:
        """Wait for rows; return those that come within `GATHER_S`, at most a batch, and whether more may come."""
        trials, until = list[Sequence[ResultRow]](), math.inf
        while len(trials) < BATCH:
            try:
                rows = self._queue.get(timeout=max(0.0, until - time.monotonic()) if trials else None)
            except queue.Empty:
                break
            if rows is None:
                return trials, False
            until = until if trials else time.monotonic() + GATHER_S
            trials.append(rows)
        return trials, True

    def close(self) -> None:
        """Wait until all queued rows are mirrored."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
