"""The record of a storage's runs: when each trial was last planned. The leaderboard derives the current rows from it.

`farebox run` replaces storage/plan.json atomically, with a checksum:

    {"checksum": "...", "run": 3, "keep": false, "trials": {"<trial_id>": 3, "<trial_id>": 1}}

`run` counts the runs of the storage. `trials` maps every trial that a run planned to the last run that did. A later run
with other methods, seeds or data sets adds to the record and removes nothing. `keep` is true when the last run kept
results of other code (on_code_change=keep). A storage without the file (written by an older Farebox) reads as an empty
record; its newest rows then count as current.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import DamagedFile
from pipeline.files import SEAL_KEY, UNSEALED, read_sealed, seal, write_atomic

FILE = "plan.json"


@dataclass(frozen=True)
class RunRecord:
    """The content of plan.json."""

    run: int = 0
    """Number of the last run; 0: no run is recorded."""
    keep: bool = False
    """Whether the last run kept results of other code."""
    trials: Mapping[str, int] = field(default_factory=dict)
    """Last run that planned a trial, by trial id."""

    @property
    def last(self) -> list[str]:
        """Ids of the trials of the last run."""
        return [trial_id for trial_id, run in self.trials.items() if run == self.run]


def read_runs(storage: Path) -> RunRecord:
    """Read the record of a storage; an empty one when there is no file.

    Raises:
        DamagedFile: the file cannot be read or does not match its checksum.
    """
    path = storage / FILE
    try:
        content = json.loads(read_sealed(path))
        return RunRecord(int(content["run"]), bool(content["keep"]), dict(content["trials"]))
    except FileNotFoundError:
        return RunRecord()
    except DamagedFile as error:
        reason = error.reason
    except (OSError, ValueError, KeyError, TypeError):
        reason = "it is not a record of runs"
    raise DamagedFile(path, f"{reason}; type the farebox run command of this storage again, which writes it anew")


def add_run(storage: Path, trial_ids: Iterable[str], keep: bool, echo: Callable[[str], None]) -> None:
    """Record that a run planned these trials. A damaged record is reported and replaced.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        old = read_runs(storage)
    except DamagedFile as error:
        echo(f"{error.path} was damaged ({error.reason.split(';')[0]}) and is written anew")
        old = RunRecord()
    trials = {**old.trials, **dict.fromkeys(trial_ids, old.run + 1)}
    content = {SEAL_KEY: UNSEALED, "run": old.run + 1, "keep": keep, "trials": trials}
    write_atomic(storage / FILE, seal(json.dumps(content, indent=0).encode()))
