"""Open the MLflow mirror of a sweep, and mirror trials from a background thread while the sweep runs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

from pipeline.config.compose import Config
from pipeline.errors import TrackingError
from pipeline.results.row import ResultRow
from pipeline.results.store import ResultStore
from pipeline.results.tracking import Mirror

RETRY_S = 60.0
"""Seconds without another attempt after MLflow failed."""


def open_mirror(config: Config) -> Mirror:
    """Open the MLflow mirror of a sweep. Raises TrackingError if MLflow fails."""
    return Mirror(config.mlflow, config.storage / "mlflow", f"farebox/{config.sweep}")


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
        mirror, retry_at = None, 0.0
        while (rows := self._queue.get()) is not None:
            if time.monotonic() < retry_at:
                continue  # each attempt would wait for the server; `publish` mirrors the trials that are left out
            try:
                mirror = mirror or open_mirror(self.config)
                mirror.mirror(rows, self.store.prediction_files(rows))
            except TrackingError:
                retry_at = time.monotonic() + RETRY_S

    def close(self) -> None:
        """Wait until all queued rows are mirrored."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
