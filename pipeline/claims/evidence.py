"""Evidence for claims: rows of sweeps and other measurements, produced on first use and kept in a folder.

The folder has a storage for each sweep, as written by `farebox run sweep=NAME storage=...`, and `measured/NAME.json`
for each other measurement, which is repeated when the code of its methods changes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from methods import all_methods
from pipeline.claims.measured import Measured
from pipeline.config.compose import Config, compose
from pipeline.errors import DamagedFile, FareboxError
from pipeline.files import read_sealed_json, sealed_json, write_atomic
from pipeline.results.mirroring import BackgroundMirror
from pipeline.results.row import FINISHED, ResultRow
from pipeline.results.store import ResultStore
from pipeline.source_code import code_digest, method_digest
from pipeline.sweep import driver as sweep
from pipeline.trials.estimate import missing_assets


class Evidence:
    """Rows and measurements in one folder.

    Args:
        storage: The folder.
        overrides: Configuration overrides of every sweep, such as seeds=1,2.
        log: Prints a line of progress.
    """

    def __init__(self, storage: Path, overrides: Sequence[str], log: Callable[[str], None]) -> None:
        self.storage, self.overrides, self.log = storage, tuple(overrides), log
        self._rows: dict[str, list[ResultRow]] = {}

    def config(self, name: str) -> Config:
        """Return the configuration of a sweep."""
        features = self.storage / "features"
        return compose([f"sweep={name}", f"storage={self.storage / name}", f"features={features}", *self.overrides])

    def rows(self, name: str) -> list[ResultRow]:
        """Return the finished rows of a sweep; missing trials are run first. Raises FareboxError if a trial fails."""
        if name not in self._rows:
            config = self.config(name)
            self.log(f"sweep {name}")
            mirror = BackgroundMirror(config)
            outcome = sweep.run(config, self.log, mirror.add)
            mirror.close()
            if outcome.problems:
                raise FareboxError(f"sweep {name}: {outcome.problems[0]}")
            store = ResultStore(config.storage)
            rows = [row for trial in outcome.plan.trials for row in store.rows_of(trial.trial_id)]
            self._rows[name] = [row for row in rows if row.status in FINISHED]
        return self._rows[name]

    def by_seed(
        self,
        name: str,
        method: str,
        value: Callable[[ResultRow], float | None] = lambda row: row.accuracy,
        *,
        shots: int = 16,
        kind: str = "source",
    ) -> dict[int, float]:
        """Return the mean over data sets of a value of each row (by default the accuracy), by seed."""
        values_of: dict[int, list[float]] = defaultdict(list)
        for row in self.rows(name):
            if (row.method, row.shots, row.kind) == (method, shots, kind) and (number := value(row)) is not None:
                values_of[row.seed].append(number)
        return {seed: float(np.mean(values)) for seed, values in sorted(values_of.items())}

    def gains(self, name: str, method: str, reference: str, *, shots: int = 16, kind: str = "source") -> list[float]:
        """Return the mean gain of a method over another in percentage points, per seed, on equal few-shot draws."""
        ours, theirs = (self.by_seed(name, m, shots=shots, kind=kind) for m in (method, reference))
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

    def mean(
        self, name: str, method: str, value: Callable[[ResultRow], float | None] = lambda row: row.accuracy
    ) -> Measured:
        """Return the mean of `by_seed` with its interval, at 16 shots on the data sets' own test sets."""
        return Measured.over_seeds(self.by_seed(name, method, value).values())

    def gain(self, name: str, method: str, reference: str, *, shots: int = 16, kind: str = "source") -> Measured:
        """Return the mean of `gains` with its interval."""
        return Measured.over_seeds(self.gains(name, method, reference, shots=shots, kind=kind))

    def measure(self, name: str, methods: Sequence[str], take: Callable[[], Any]) -> Any:
        """Return a measurement that is not a sweep; `take` repeats it if the overrides or the methods' code changed."""
        path = self.storage / "measured" / f"{name}.json"
        digests = [*(method_digest(all_methods()[method]) for method in methods), code_digest()]
        digest = " ".join([*digests, *self.overrides])
        try:
            kept = read_sealed_json(path)
            if (kept["name"], kept["code"]) == (name, digest):
                return kept["values"]
        except (FileNotFoundError, KeyError):  # not measured yet, or another file
            pass
        except DamagedFile as error:
            self.log(f"{error}; measuring again")
        self.log(f"measuring {name}")
        values = take()
        write_atomic(path, sealed_json({"name": name, "code": digest, "values": values}, indent=1))
        return values

    def lacking(self, name: str) -> str:
        """Return why a sweep on published data is not run here."""
        missing = missing_assets(compose([f"sweep={name}"]))
        if not missing:
            return "its data is here, but it takes more than an hour: run its own command"
        return f"{len(missing)} of its data sets and weights are missing, the first is {missing[0].name}"
