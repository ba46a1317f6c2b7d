"""The truth of a sweep: one Arrow row for each (trial, test set), and the predictions behind it.

Files under `storage`:
    results/<trial_id>.arrow                   all rows of one trial, replaced as a whole by an atomic rename
    errors/<trial_id>.txt                      the traceback of a trial that failed
    predictions/<trial_id>/<test_set>.arrow    image_key, label, predicted class, logits of one test set

The row itself is in `row.py`; its Arrow schema is derived from it, so a column is added in one place. A file of an
older Farebox is read with the defaults of the columns that it lacks.

Both kinds of Arrow file are sealed (`files.py`): the checksum is verified before Arrow parses a byte. A damaged file is
recorded in `Store.damaged` and treated as absent, so its trial counts as not run.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from pipeline.blackbox.bill import UNITS
from pipeline.errors import DamagedFile, DataError, first_line, masked
from pipeline.files import read_sealed, sealed_arrow, write_atomic
from pipeline.predictions import Predictions, pack, unpack
from pipeline.row import (
    FINISHED,
    KINDS,
    PHASES,
    SCHEMA,
    STATUSES,
    ResultRow,
    check_trial,
    conform,
    to_rows,
    to_table,
)

__all__ = [
    "FINISHED",
    "KINDS",
    "PHASES",
    "SCHEMA",
    "STATUSES",
    "UNITS",
    "Damage",
    "DamagedFileWarning",
    "Predictions",
    "ResultRow",
    "Scan",
    "Store",
    "to_rows",
    "to_table",
]

REPAIR = "repeat the `farebox run` command of this storage, which recomputes it at no new charge"
LISTED = 5
"""Damaged files that are named one by one; more are counted."""


class Damage(NamedTuple):
    """A file of the store that cannot be used."""

    path: Path
    trial_id: str
    reason: str
    effect: str
    """What is left out because of it."""
    otherwise: str = ""
    """What also repairs it."""

    @property
    def line(self) -> str:
        """The file, what is wrong with it, what follows, and the command that repairs it."""
        return f"{self.path} is damaged: {self.reason}; {self.effect}; {REPAIR}{self.otherwise}"


class Scan(NamedTuple):
    """What the store holds."""

    table: pa.Table
    damaged: list[str]
    """One line for each damaged file of rows; its trial counts as not run."""


class DamagedFileWarning(UserWarning):
    """A result file is damaged and is treated as absent."""


class Store:
    """The rows and predictions in a sweep's `storage` folder. One writer for each trial; any number of readers."""

    def __init__(self, storage: Path) -> None:
        self.storage = Path(storage)
        self.results = self.storage / "results"
        self.damaged: dict[Path, Damage] = {}
        """Files that were read through this object and found damaged."""

    def write(self, rows: Sequence[ResultRow]) -> Path:
        """Replace all rows of one trial. ValueError when they are not of one trial, or name a test set twice.

        A finished trial's rows stay when a failure of the same code comes after them: the worker of a killed run may
        live for some seconds, and fail, beside the one that took its trial over.
        """
        ids, sets = {row.trial_id for row in rows}, [row.test_set for row in rows]
        if len(ids) != 1 or len(set(sets)) != len(sets):
            raise ValueError(f"one trial's rows, each of another test set, are wanted; got {sorted(ids)} on {sets}")
        path = self.results / f"{ids.pop()}.arrow"
        if rows[0].status not in FINISHED and any(
            old.status in FINISHED
            and (old.method_digest, old.code_digest) == (rows[0].method_digest, rows[0].code_digest)
            for old in self.rows_of(path.stem)
        ):
            return path
        write_atomic(path, sealed_arrow(to_table(rows)))
        self.damaged.pop(path, None)
        return path

    def rows_of(self, trial_id: str) -> list[ResultRow]:
        """Return the rows of one trial; an empty list when it has no intact file."""
        table = self._rows(self.results / f"{trial_id}.arrow")
        return [] if table is None else to_rows(table)

    def scan(self) -> Scan:
        """Read every row; files that are damaged are listed, and recorded in `damaged`."""
        paths = sorted(self.results.glob("*.arrow"))
        tables = [table for path in paths if (table := self._rows(path)) is not None]
        lines = [self.damaged[path].line for path in paths if path in self.damaged]
        return Scan(pa.concat_tables([SCHEMA.empty_table(), *tables]), lines)

    def read(self) -> pa.Table:
        """Read every row, with a DamagedFileWarning for each damaged file."""
        table, lines = self.scan()
        for line in lines:
            warnings.warn(line, DamagedFileWarning, stacklevel=2)
        return table

    def finished(self, trials: Collection[str] | None = None) -> dict[str, tuple[str, str]]:
        """Return the method digest and the code digest of each trial that need not run again, by trial id.

        A trial is finished when its status is done or truncated and its predictions are intact. `trials`: the ids to
        look at; None: all.
        """
        columns = ["trial_id", "test_set", "status", "method_digest", "code_digest", "predictions_digest"]
        rows = self.scan().table.select(columns).to_pylist()
        rows = [r for r in rows if r["status"] in FINISHED and (trials is None or r["trial_id"] in trials)]
        broken = {r["trial_id"] for r in rows if not self.intact(r["trial_id"], r["test_set"], r["predictions_digest"])}
        return {r["trial_id"]: (r["method_digest"], r["code_digest"]) for r in rows if r["trial_id"] not in broken}

    def damage(self) -> list[str]:
        """Return one line for each damaged file that was read so far; LISTED at most, then how many more there are."""
        return _first([damage.line for damage in self.damaged.values()], f"files in {self.storage} are damaged")

    def recomputed(self, trials: Collection[str]) -> list[str]:
        """Return the same for a run: one line for each damaged file of these trials, which are to run again."""
        lines = [
            f"{damage.path} is damaged: {damage.reason}; its trial is recomputed, and paid charges are replayed"
            for damage in self.damaged.values()
            if damage.trial_id in trials
        ]
        return _first(lines, "files are damaged: their trials are recomputed, too")

    def _rows(self, path: Path) -> pa.Table | None:
        """Read one trial's rows; None, and a record in `damaged`, when they cannot be read."""
        try:
            table = _read_rows(path)
        except FileNotFoundError:  # replaced or removed while the folder was listed
            table = None
        except (OSError, KeyError, ValueError, pa.ArrowException, DamagedFile) as error:
            reason = error.reason if isinstance(error, DamagedFile) else first_line(error)
            self.damaged[path] = Damage(path, path.stem, reason, "its trial counts as not run", ", or delete the file")
            return None
        self.damaged.pop(path, None)
        return table

    def write_traceback(self, trial_id: str, title: str, error: BaseException) -> Path:
        """Keep how an error came about; the file."""
        path = self.storage / "errors" / f"{trial_id}.txt"
        write_atomic(path, masked("".join([f"{trial_id}  {title}\n\n", *traceback.format_exception(error)])).encode())
        return path

    def write_predictions(
        self, trial_id: str, test_set: str, image_keys: Sequence[str], labels: np.ndarray, logits: np.ndarray
    ) -> tuple[str, str]:
        """Store logits [B, C] with keys and labels [B]; returns the file (relative to storage) and its digest."""
        data, digest = pack(image_keys, labels, logits)
        path = self.predictions_path(trial_id, test_set)
        write_atomic(path, data)
        self.damaged.pop(path, None)
        return str(path.relative_to(self.storage)), digest

    def read_predictions(self, trial_id: str, test_set: str, digest: str | None = None) -> Predictions:
        """Read one test set's predictions.

        Raises:
            DataError: the file is missing or damaged, or its predictions do not have this digest.
        """
        try:
            return _read_predictions(self.predictions_path(trial_id, test_set), digest)
        except DamagedFile as error:
            raise DataError(f"predictions {error.path} cannot be read: {error.reason}") from error

    def reader(self, rows: pa.Table) -> Callable[[str, str], Predictions]:
        """Return a function from (trial id, test set) to the predictions of these rows, verified by the row's digest.

        The function raises DataError when there are none. It records files that are missing or damaged in `damaged`.
        """
        columns = rows.select(["trial_id", "test_set", "predictions_digest"]).to_pylist()
        digests = {(row["trial_id"], row["test_set"]): row["predictions_digest"] for row in columns}

        def read(trial_id: str, test_set: str) -> Predictions:
            digest = digests.get((trial_id, test_set))
            if digest is None:
                raise DataError(f"no predictions of trial {trial_id} on {test_set}")
            return self._verified(trial_id, test_set, digest)

        return read

    def intact(self, trial_id: str, test_set: str, digest: str | None) -> bool:
        """Whether predictions match their row's digest; files that do not are recorded in `damaged`.

        True for a row without predictions: there is nothing to verify.
        """
        if digest is not None:
            try:
                self._verified(trial_id, test_set, digest)
            except DataError:
                return False
        return True

    def prediction_files(self, rows: Iterable[ResultRow]) -> list[Path]:
        """Return the intact prediction files of these rows; the others are recorded in `damaged`.

        A path is derived from trial id and test set, so no file outside the storage is ever returned.
        """
        return [
            self.predictions_path(row.trial_id, row.test_set)
            for row in rows
            if row.predictions_digest and self.intact(row.trial_id, row.test_set, row.predictions_digest)
        ]

    def _verified(self, trial_id: str, test_set: str, digest: str) -> Predictions:
        path = self.predictions_path(trial_id, test_set)
        try:
            found = _read_predictions(path, digest)
        except DamagedFile as error:
            self.damaged[path] = Damage(path, trial_id, error.reason, "bootstrap intervals that need it are left out")
            raise DataError(str(error)) from error
        self.damaged.pop(path, None)
        return found

    def predictions_path(self, trial_id: str, test_set: str) -> Path:
        """Return the file of one test set's predictions."""
        return self.storage / "predictions" / trial_id / f"{quote(test_set, safe='')}.arrow"


def _first(lines: list[str], rest: str) -> list[str]:
    """At most LISTED lines; one more counts the others."""
    return [*lines[:LISTED], *([f"{len(lines) - LISTED:,} more {rest}"] if len(lines) > LISTED else [])]


def _read_rows(path: Path) -> pa.Table:
    """Read one trial's rows under the present schema.

    Raises:
        OSError, DamagedFile: the file cannot be read or is damaged.
        KeyError, ValueError, pa.ArrowException: it is intact and holds something else.
    """
    table = pa.ipc.open_file(read_sealed(path)).read_all()
    if set(table["trial_id"].to_pylist()) != {path.stem}:
        raise ValueError("its rows are of another trial than its name says")
    return check_trial(conform(table))


def _read_predictions(path: Path, digest: str | None) -> Predictions:
    """Read a file of predictions; DamagedFile when it is missing, damaged, or does not have this digest."""
    try:
        found = unpack(read_sealed(path))
    except FileNotFoundError as error:
        raise DamagedFile(path, "the file is missing") from error
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DamagedFile(path, first_line(error)) from error
    if digest is not None and found.digest != digest:
        raise DamagedFile(path, f"its predictions are not those of the row, whose digest is {digest[:12]}...")
    return found
