"""The record of a storage's runs, from which the leaderboard derives the current rows.

`farebox run` replaces storage/plan.json atomically, with a checksum:

    {"checksum": "...", "run": 3, "keep": false, "label": "...", "trials": {"<trial_id>": 3, "<trial_id>": 1}}

`run` counts the runs of the storage. `trials` maps each trial to the last run that planned it. A later run with other
methods, seeds or data sets adds trials and removes none. `keep` is true if the last run kept results of other code.
`label` is the description of the last run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import DamagedFile
from pipeline.files import read_sealed_json, sealed_json, write_atomic

FILE = "plan.json"


@dataclass(frozen=True)
class RunRecord:
    """The content of plan.json."""

    run: int = 0
    """Number of the last run; 0 if none is recorded."""
    keep: bool = False
    """Whether the last run kept results of other code."""
    trials: Mapping[str, int] = field(default_factory=dict)
    """Last run that planned each trial, by trial id."""
    label: str = ""
    """Description of the last run."""

    @property
    def description(self) -> str:
        """The description of the storage: that of the last run if it planned all trials, else empty."""
        return self.label if len(self.last) == len(self.trials) else ""

    @property
    def last(self) -> list[str]:
        """Ids of the trials planned by the last run."""
        return [trial_id for trial_id, run in self.trials.items() if run == self.run]


def read_runs(storage: Path) -> RunRecord:
    """Read the record of a storage; an empty record if there is no file.

    Raises:
        DamagedFile: the file cannot be read or does not match its checksum.
    """
    path = storage / FILE
    try:
        content = read_sealed_json(path)
        return RunRecord(
            int(content["run"]), bool(content["keep"]), dict(content["trials"]), str(content.get("label", ""))
        )
    except FileNotFoundError:
        return RunRecord()
    except DamagedFile as error:
        reason = error.reason
    except (OSError, ValueError, KeyError, TypeError):
        reason = "it is not a record of runs"
    raise DamagedFile(path, f"{reason}; run the farebox run command of this storage again, which replaces it")


def add_run(storage: Path, trial_ids: Iterable[str], keep: bool, echo: Callable[[str], None], label: str = "") -> None:
    """Record a run that planned these trials. A damaged record is reported with `echo` and replaced.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        old = read_runs(storage)
    except DamagedFile as error:
        echo(f"{error.path} was damaged ({error.reason.split(';')[0]}) and is replaced")
        old = RunRecord()
    trials = {**old.trials, **dict.fromkeys(trial_ids, old.run + 1)}
    content = {"run": old.run + 1, "keep": keep, "label": label, "trials": trials}
    write_atomic(storage / FILE, sealed_json(content, indent=0))
