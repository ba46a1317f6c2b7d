"""The result store: the rows and predictions of a sweep as Arrow files in its storage folder.

    results/<trial_id>.arrow                   all rows of one trial, replaced as a whole by an atomic rename
    rows.arrow                                 a copy of all rows, quick to read (`pipeline.results.snapshot`)
    errors/<trial_id>.txt                      the traceback of a failed trial
    predictions/<trial_id>/<test_set>.arrow    image_key, label, predicted class and logits of one test set

Arrow files are sealed (`pipeline.files`): the checksum is verified before Arrow parses the content. A damaged file is
recorded in `ResultStore.damaged` and treated as absent, so its trial counts as not run.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from pipeline.errors import DamagedFile, DataError, StorageError, first_line, masked
from pipeline.files import read_sealed, sealed_arrow, write_atomic
from pipeline.results.predictions import Predictions, pack, unpack
from pipeline.results.row import FINISHED, LATER_COLUMNS, SCHEMA, TRIAL_COLUMNS, ResultRow, to_rows, to_table
from pipeline.results.snapshot import Stamp, in_order, read_snapshot, stamps_of, write_snapshot

REPAIR = "run the same `farebox run` command again, which recomputes it at no new charge"
LISTED = 5
"""Number of damaged files that are named; the others are counted."""


class Damage(NamedTuple):
    """A damaged file of the store."""

    path: Path
    trial_id: str
    reason: str
    effect: str
    """What is left out because of it."""
    alternative: str = ""
    """Another way to repair it."""

    @property
    def line(self) -> str:
        """Description of the file, the damage, its effect, and the command that repairs it."""
        return f"{self.path} is damaged: {self.reason}; {self.effect}; {REPAIR}{self.alternative}"


class ResultStore:
    """Rows and predictions in the storage folder of a sweep. One writer per trial, any number of readers."""

    def __init__(self, storage: Path) -> None:
        self.storage = Path(storage)
        self.results = self.storage / "results"
        self.damaged: dict[Path, Damage] = {}
        """Damaged files among those read so far."""

    def write(self, rows: Sequence[ResultRow]) -> Path:
        """Replace all rows of one trial and return the file.

        Rows of a finished trial are not replaced by a later failure of the same code: after a run was killed, its
        worker may live for some seconds and fail, while another worker has already finished the trial.

        Raises:
            ValueError: the rows belong to several trials, or two of them have the same test set.
        """
        ids, sets = {row.trial_id for row in rows}, [row.test_set for row in rows]
        if len(ids) != 1 or len(set(sets)) != len(sets):
            raise ValueError(f"expected rows of one trial on different test sets, found {sorted(ids)} on {sets}")
        path = self._path(ids.pop())
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
        """Return the rows of one trial; an empty list if it has no intact file."""
        table = self._rows(self._path(trial_id))
        return [] if table is None else to_rows(table)

    def read(self) -> pa.Table:
        """Read the rows of all trials, by trial id. Damaged files are left out and recorded in `damaged`."""
        return self._read()[0]

    def write_snapshot(self) -> None:
        """Copy the rows of all trials into one file, which later reads use; on a full disk do nothing."""
        table, stamps, changed = self._read()
        if changed:
            with contextlib.suppress(StorageError):
                write_snapshot(self.storage, table, stamps)

    def _read(self) -> tuple[pa.Table, dict[str, Stamp], bool]:
        """Return the rows of all trials, the stamps of their files, and whether the snapshot lacks any of them."""
        snapshot, stamps = read_snapshot(self.storage), stamps_of(self.results)
        known = {trial for trial, stamp in stamps.items() if snapshot.stamps.get(trial) == stamp}
        for trial in known:
            self.damaged.pop(self._path(trial), None)
        others = [table for trial in stamps if trial not in known and (table := self._rows(self._path(trial)))]
        return in_order(snapshot, known, others), stamps, stamps != snapshot.stamps

    def trials(self, table: pa.Table | None = None) -> dict[str, list[ResultRow]]:
        """Return the rows of all trials by trial id, those of the source test set first.

        `table` is what `read` returned; None reads the files.
        """
        rows = sorted(
            to_rows(self.read() if table is None else table),
            key=lambda r: (r.trial_id, r.test_set != r.dataset, r.test_set),
        )
        return {trial_id: list(group) for trial_id, group in groupby(rows, key=lambda r: r.trial_id)}

    def finished(self, trials: Collection[str] | None = None) -> dict[str, tuple[str, str]]:
        """Return the method digest and code digest of each finished trial, by trial id.

        A trial is finished when its status is done or budget_exhausted and its predictions are intact.

        Args:
            trials: Ids of the trials to check; None checks all.
        """
        columns = ["trial_id", "test_set", "status", "method_digest", "code_digest", "predictions_digest"]
        rows = self.read().select(columns).to_pylist()
        rows = [r for r in rows if r["status"] in FINISHED and (trials is None or r["trial_id"] in trials)]
        broken = {r["trial_id"] for r in rows if not self.intact(r["trial_id"], r["test_set"], r["predictions_digest"])}
        return {r["trial_id"]: (r["method_digest"], r["code_digest"]) for r in rows if r["trial_id"] not in broken}

    def damage(self) -> list[str]:
        """Return one line per damaged file read so far: at most `LISTED` lines, and the number of further files."""
        return _first([damage.line for damage in self.damaged.values()], f"files in {self.storage} are damaged")

    def recomputed(self, trials: Collection[str]) -> list[str]:
        """Return one line per damaged file of these trials, which run again; shortened as in `damage`."""
        lines = [
            f"{damage.path} is damaged: {damage.reason}; its trial is recomputed; paid charges are replayed"
            for damage in self.damaged.values()
            if damage.trial_id in trials
        ]
        return _first(lines, "files are damaged; their trials are recomputed too")

    def _path(self, trial_id: str) -> Path:
        return self.results / f"{trial_id}.arrow"

    def _rows(self, path: Path) -> pa.Table | None:
        """Return one trial's rows; None if there are none, or if they are damaged, which is recorded in `damaged`."""
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
        """Write the traceback of a failed trial and return the file."""
        path = self.storage / "errors" / f"{trial_id}.txt"
        write_atomic(path, masked("".join([f"{trial_id}  {title}\n\n", *traceback.format_exception(error)])).encode())
        return path

    def write_predictions(
        self, trial_id: str, test_set: str, image_keys: Sequence[str], labels: np.ndarray, logits: np.ndarray
    ) -> tuple[str, str]:
        """Write predictions of one test set.

        Args:
            trial_id: The trial.
            test_set: The test set.
            image_keys: Keys of the B test images.
            labels: Labels [B].
            logits: Logits [B, C].

        Returns:
            The path relative to `storage`, and the digest for the row.
        """
        data, digest = pack(image_keys, labels, logits)
        path = self.predictions_path(trial_id, test_set)
        write_atomic(path, data)
        self.damaged.pop(path, None)
        return str(path.relative_to(self.storage)), digest

    def read_predictions(self, trial_id: str, test_set: str, digest: str | None = None) -> Predictions:
        """Read the predictions of one test set.

        Args:
            trial_id: The trial.
            test_set: The test set.
            digest: Digest that the row states; None skips this check.

        Raises:
            DataError: the file is missing or damaged, which is recorded in `damaged`, or the digest differs.
        """
        path = self.predictions_path(trial_id, test_set)
        try:
            predictions = _read_predictions(path, digest)
        except DamagedFile as error:
            self.damaged[path] = Damage(path, trial_id, error.reason, "bootstrap intervals that need it are left out")
            raise DataError(f"predictions {path} cannot be read: {error.reason}") from error
        self.damaged.pop(path, None)
        return predictions

    def reader(self, rows: pa.Table) -> Callable[[str, str], Predictions]:
        """Return a function that reads the predictions of these rows by trial id and test set.

        The function verifies the row's digest and raises DataError as `read_predictions` does.
        """
        columns = rows.select(["trial_id", "test_set", "predictions_digest"]).to_pylist()
        digests = {(row["trial_id"], row["test_set"]): row["predictions_digest"] for row in columns}

        def read(trial_id: str, test_set: str) -> Predictions:
            digest = digests.get((trial_id, test_set))
            if digest is None:
                raise DataError(f"no predictions of trial {trial_id} on {test_set}")
            return self.read_predictions(trial_id, test_set, digest)

        return read

    def intact(self, trial_id: str, test_set: str, digest: str | None) -> bool:
        """Return whether predictions match their row's digest; a file that does not is recorded in `damaged`.

        A row without predictions (`digest` is None) is intact.
        """
        if digest is not None:
            try:
                self.read_predictions(trial_id, test_set, digest)
            except DataError:
                return False
        return True

    def prediction_files(self, rows: Iterable[ResultRow]) -> list[Path]:
        """Return the intact prediction files of these rows; others are recorded in `damaged`.

        Paths are derived from trial id and test set, so every file is inside the storage.
        """
        return [
            self.predictions_path(row.trial_id, row.test_set)
            for row in rows
            if row.predictions_digest and self.intact(row.trial_id, row.test_set, row.predictions_digest)
        ]

    def predictions_path(self, trial_id: str, test_set: str) -> Path:
        """Return the path of the predictions of one test set."""
        return self.storage / "predictions" / trial_id / f"{quote(test_set, safe='')}.arrow"


def _first(lines: list[str], rest: str) -> list[str]:
    """Return at most `LISTED` lines, followed by the number of further ones."""
    return [*lines[:LISTED], *([f"{len(lines) - LISTED:,} more {rest}"] if len(lines) > LISTED else [])]


def _read_rows(path: Path) -> pa.Table:
    """Read the rows of one trial.

    Raises:
        OSError, DamagedFile: the file cannot be read or is damaged.
        KeyError, ValueError, pa.ArrowException: the file is intact but does not hold the rows of its trial.
    """
    table = pa.ipc.open_file(read_sealed(path)).read_all()
    if set(table["trial_id"].to_pylist()) != {path.stem}:
        raise ValueError("its rows are of another trial than its name states")
    return check_trial(table)


def _read_predictions(path: Path, digest: str | None) -> Predictions:
    """Read a file of predictions. Raises DamagedFile if it is missing or damaged, or if the digest differs."""
    try:
        predictions = unpack(read_sealed(path))
    except FileNotFoundError as error:
        raise DamagedFile(path, "the file is missing") from error
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DamagedFile(path, first_line(error)) from error
    if digest is not None and predictions.digest != digest:
        raise DamagedFile(path, f"its predictions are not those of the row (digest {digest[:12]}...)")
    return predictions


def with_later_columns(table: pa.Table) -> pa.Table:
    """Return a table with the columns that were added to `SCHEMA` later, as rows from before are to be read."""
    missing = LATER_COLUMNS.keys() - set(table.column_names)
    for name in sorted(missing, key=SCHEMA.get_field_index):
        column = pa.array([LATER_COLUMNS[name]] * len(table), SCHEMA.field(name).type)
        table = table.add_column(SCHEMA.get_field_index(name), SCHEMA.field(name), column)
    return table


def check_trial(table: pa.Table) -> pa.Table:
    """Check that a table holds the rows of one trial, and return it without metadata.

    Raises:
        ValueError: the columns are not those of `SCHEMA`, a row is not consistent, two rows have the same test set, or
            rows disagree in a column of the trial.
    """
    table = with_later_columns(table.replace_schema_metadata(None))
    if not table.schema.equals(SCHEMA):
        differing = sorted(set(table.schema.names) ^ set(SCHEMA.names)) or ["their types"]
        raise ValueError(f"its columns are those of another Farebox version ({', '.join(differing[:3])})")
    rows = to_rows(table)
    for row in rows[1:]:
        for column in TRIAL_COLUMNS:
            if getattr(row, column) != getattr(rows[0], column):
                raise ValueError(f"its rows disagree in {column}")
    if len({row.test_set for row in rows}) < len(rows):
        raise ValueError("two of its rows have the same test set")
    return table
