"""What claims rest on: rows of sweeps and measurements, made when they are first asked for and kept in a folder.

Under `storage`: a folder for each sweep (what `farebox run sweep=NAME storage=...` makes: it resumes, and has a ledger
and rows of its own), and `measured/NAME.json` for the rest, which is taken again when its method's code changes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from methods import all_methods
from pipeline.claims.measured import Measured
from pipeline.commands import report
from pipeline.commands.report import Say
from pipeline.config.compose import Config, compose
from pipeline.errors import DamagedFile, FareboxError
from pipeline.files import SEAL_KEY, UNSEALED, read_sealed, seal, strict_json, write_atomic
from pipeline.results.store import FINISHED, ResultRow, ResultStore
from pipeline.source_code import code_digest, method_digest
from pipeline.sweep import driver as sweep
from pipeline.trials.estimate import missing_assets


class Evidence:
    """The rows and measurements of one folder. `words` hold for every sweep (seeds=[1,2], datasets=[digits], ...)."""

    def __init__(self, storage: Path, words: Sequence[str], say: Say) -> None:
        self.storage, self.words, self.say = storage, tuple(words), say
        self._rows: dict[str, list[ResultRow]] = {}

    def config(self, name: str) -> Config:
        """A sweep as it is run here."""
        features = self.storage / "features"
        return compose([f"sweep={name}", f"storage={self.storage / name}", f"features={features}", *self.words])

    def rows(self, name: str) -> list[ResultRow]:
        """The rows of a sweep; what of it is not done is run first. FareboxError when a trial of it fails."""
        if name not in self._rows:
            config = self.config(name)
            self.say(f"sweep {name}")
            mirror = report.Mirroring(config)
            outcome = sweep.run(config, self.say, mirror.add)
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
        """For each seed the mean of a row's value (its accuracy when none is named) over the data sets."""
        found: dict[int, list[float]] = defaultdict(list)
        for row in self.rows(name):
            if (row.method, row.shots, row.kind) == (method, shots, kind) and (number := value(row)) is not None:
                found[row.seed].append(number)
        return {seed: float(np.mean(values)) for seed, values in sorted(found.items())}

    def gains(self, name: str, method: str, reference: str, *, shots: int = 16, kind: str = "source") -> list[float]:
        """For each seed the mean gain of a method over another, on the same few-shot draws, in points."""
        ours, theirs = (self.by_seed(name, m, shots=shots, kind=kind) for m in (method, reference))
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

    def mean(
        self, name: str, method: str, value: Callable[[ResultRow], float | None] = lambda row: row.accuracy
    ) -> Measured:
        """Of `by_seed`, at 16 shots on the data sets' own test sets."""
        return Measured.over_seeds(self.by_seed(name, method, value).values())

    def gain(self, name: str, method: str, reference: str, *, shots: int = 16, kind: str = "source") -> Measured:
        """Of `gains`, in points."""
        return Measured.over_seeds(self.gains(name, method, reference, shots=shots, kind=kind))

    def measure(self, name: str, methods: Sequence[str], take: Callable[[], Any]) -> Any:
        """A measurement that is no sweep; taken anew when the words, or the code of one of the methods, are others."""
        path = self.storage / "measured" / f"{name}.json"
        digests = [*(method_digest(all_methods()[method]) for method in methods), code_digest()]
        digest = " ".join([*digests, *self.words])
        try:
            kept = json.loads(read_sealed(path))
            if (kept["name"], kept["code"]) == (name, digest):
                return kept["values"]
        except (FileNotFoundError, ValueError, KeyError):  # not measured yet, or intact and something else
            pass
        except DamagedFile as error:
            self.say(f"{error}: measured again")
        self.say(f"measuring {name}")
        values = take()
        record = {SEAL_KEY: UNSEALED, "name": name, "code": digest, "values": values}
        write_atomic(path, seal(strict_json(record, indent=1).encode()))
        return values

    def lacking(self, name: str) -> str:
        """Why a sweep on published data is not run here."""
        missing = missing_assets(compose([f"sweep={name}"]))
        if not missing:
            return "its data is here, but it takes more than the hour of this table: run it by its own command"
        return f"{len(missing)} of its data sets and weights are not here, the first: {missing[0].name}"
