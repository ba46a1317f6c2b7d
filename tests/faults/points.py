"""The named points at which a process of a sweep is killed, and commands that run with such faults."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.command import ROOT

INJECT = ROOT / "tests" / "faults" / "inject"

ENDPOINT, LEDGER, FIT = "pipeline.blackbox.endpoint", "pipeline.ledger.ledger", "pipeline.trials.fit"
CHECKPOINT = "pipeline.trials.checkpoint"
POINTS: dict[str, dict[str, Any]] = {
    "replica.loading": {"module": ENDPOINT, "function": "Endpoint.__init__", "moment": "after"},
    "replica.before_charge": {"module": ENDPOINT, "function": "Endpoint.check", "moment": "before"},
    "replica.after_charge": {"module": ENDPOINT, "function": "Endpoint.compute", "moment": "before", "paid": True},
    "replica.after_compute": {"module": ENDPOINT, "function": "Endpoint.compute", "moment": "after", "paid": True},
    "replica.storing_features": {"rename": r"/features[^/]*/.*\.features$"},
    "ledger.before_commit": {"module": "pipeline.ledger.batch", "function": "Batch.save", "moment": "after"},
    "ledger.after_commit": {"module": LEDGER, "function": "Ledger.charge", "moment": "after"},
    "trial.at_a_call": {"module": "pipeline.blackbox.client", "function": "MeteredBox._send", "moment": "after"},
    "trial.between_steps": {"module": FIT, "function": "Fit._record_curve", "moment": "before"},
    "trial.before_checkpoint": {
        "module": CHECKPOINT,
        "function": "Checkpoint.save",
        "moment": "before",
    },
    "trial.checkpoint_written": {"rename": r"\.before\.ckpt$"},
    "trial.between_renames": {"rename": r"/[0-9a-f]+(\.[0-9a-f]+){2}\.ckpt$"},
    "trial.after_checkpoint": {
        "module": CHECKPOINT,
        "function": "Checkpoint.save",
        "moment": "after",
    },
    "trial.scoring": {"rename": "/predictions/"},
    "trial.row_written": {"rename": "/results/"},
    "trial.after_row": {"module": "pipeline.results.store", "function": "ResultStore.write", "moment": "after"},
    "driver.reserving": {"module": LEDGER, "function": "Ledger.reserve_all", "moment": "after"},
    "driver.reserved": {"module": "pipeline.sweep.reservations", "function": "reserve", "moment": "after"},
    "driver.closing": {"module": "pipeline.sweep.reservations", "function": "close_trials", "moment": "before"},
    "driver.releasing": {"module": LEDGER, "function": "Ledger.release_all", "moment": "after"},
    "driver.publishing": {"module": "pipeline.results.report", "function": "publish", "moment": "before"},
    "driver.writing_the_page": {"rename": r"/leaderboard/.*\.html$"},
}
"""The fault of each point, as inject/sitecustomize.py takes it. A kill before a rename leaves a temporary file."""


FULL: dict[str, dict[str, Any]] = {
    "checkpoint": {"fsync": "/checkpoints/"},
    "row": {"fsync": "/results/"},
    "ledger": {
        **{"module": "pipeline.ledger.schema", "function": "_prepare_file"},
        "pragma": "max_page_count = 1",  # the file cannot grow: SQLite says that the disk is full
    },
}
"""Places where the disk can be full."""
SLOW: dict[str, Any] = {"name": "slow", "module": ENDPOINT, "function": "Endpoint.compute"}
"""An endpoint that sleeps before it computes: a sweep then takes time without taking the processor's."""


@dataclass
class Faults:
    """Faults for one command: the environment that causes them, and which of them happened."""

    folder: Path
    storage: Path
    faults: list[dict[str, Any]] = field(default_factory=list)

    def at(self, point: str, nth: int = 1) -> Faults:
        """Kill the first process that passes the point for the nth time."""
        return self.add({**POINTS[point], "name": f"{point}.{nth}", "nth": nth, "ledger": f"{self.storage}/ledger.db"})

    def add(self, fault: dict[str, Any]) -> Faults:
        """Add any fault that inject/sitecustomize.py knows."""
        self.faults.append(fault)
        return self

    def on(self, *names: str) -> None:
        """Turn on the lasting faults of these names, and turn off all others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for flag in self.folder.glob("on.*"):
            flag.unlink()
        for name in names:
            (self.folder / f"on.{name}").touch()

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the command; its Ray workers inherit it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([str(INJECT), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        words = {"FAREBOX_FAULTS": json.dumps(self.faults), "FAREBOX_FAULTS_FOLDER": str(self.folder)}
        return {**os.environ, **words, "PYTHONPATH": path}

    @property
    def happened(self) -> set[str]:
        """Names of the faults that happened."""
        return {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
