"""The event log of a storage, `log.jsonl`: one JSON object a line, appended by the driver of each run.

    {"at": ..., "event": "run started", "trials": 12, "kept": 0, "host": ..., "pid": ..., "version": ...}
    {"at": ..., "event": "trial started" | "worker lost", "trial": <trial_id>, "name": "craft on digits, ..."}
    {"at": ..., "event": "trial ended", "trial": ..., "name": ..., "status": "done", "requests": ..., "seconds": ...}
    {"at": ..., "event": "replicas changed", "how": one line}
    {"at": ..., "event": "run ended" | "run stopped", "error": null or one line}

Farebox itself never reads it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.errors import first_line, masked
from pipeline.files import strict_json
from pipeline.results.row import ResultRow

FILE = "log.jsonl"


class EventLog:
    """Appends events to the file. Errors of the file system are ignored: other files report a full disk.

    Args:
        storage: folder of the sweep.
        names: a readable name for each trial id.
    """

    def __init__(self, storage: Path, names: Mapping[str, str]) -> None:
        self.path, self.names = storage / FILE, names

    @contextlib.contextmanager
    def run(self, trials: int, kept: int) -> Iterator[None]:
        """Log the start and the end of a run, with the error that ended it early."""
        where = {"host": socket.gethostname(), "pid": os.getpid(), "version": __version__}
        self._write("run started", trials=trials, kept=kept, **where)
        try:
            yield
        except BaseException as error:
            self._write("run stopped", error=f"{type(error).__name__}: {masked(first_line(error))}")
            raise
        self._write("run ended", error=None)

    def trial(self, event: str, trial: str) -> None:
        """Log that a trial got a worker or lost it."""
        self._write(event, trial=trial, name=self.names[trial])

    def replicas(self, how: str) -> None:
        """Log that replicas were added or ended."""
        self._write("replicas changed", how=how)

    def ended(self, rows: Sequence[ResultRow]) -> None:
        """Log the rows of a trial that ended."""
        row = rows[0]
        result = {"status": row.status, "error": row.error, "requests": row.requests, "seconds": row.seconds}
        self._write("trial ended", trial=row.trial_id, name=self.names[row.trial_id], **result)

    def _write(self, event: str, **more: Any) -> None:
        line = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **more}
        with contextlib.suppress(OSError), self.path.open("a") as file:
            file.write(strict_json(line) + "\n")
