"""The truth of a sweep: one Arrow row for each (trial, test set), and the predictions behind it.

Files under `storage`:
    results/<trial_id>.arrow                   all rows of one trial, replaced as a whole by an atomic rename
    errors/<trial_id>.txt                      the traceback of a trial that failed
    predictions/<trial_id>/<test_set>.arrow    image_key, label, predicted class, logits of one test set

The row itself is in `row.py`; its Arrow schema is derived from it, so a column is added in one place. A file of an
older Farebox is read with the defaults of the columns that it lacks; a file that is damaged is named and treated as
absent, so its trial runs again.
"""

from __future__ import annotations

import hashlib
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from pipeline.blackbox.bill import UNITS
from pipeline.errors import DataError, first_line, masked
from pipeline.files import write_atomic
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
    "DamagedFileWarning",
    "Predictions",
    "ResultRow",
    "Scan",
    "Store",
    "to_rows",
    "to_table",
]

HALF_ABOVE = 2**24
"""Logits of more elements than this are stored as float16; the predicted class always comes from the full numbers."""


class Scan(NamedTuple):
    """What the store holds."""

    table: pa.Table
    damaged: list[str]
    """One line for each file that cannot be read; its trial counts as not run."""


class DamagedFileWarning(UserWarning):
    """A result file cannot be read and is treated as absent."""


class Predictions(NamedTuple):
    """A trial's answers on one test set, in test order."""

    image_keys: list[str]
    labels: np.ndarray
    predicted: np.ndarray
    """Class with the highest logit, taken before any rounding."""
    logits_BC: np.ndarray


class Store:
    """The rows and predictions in a sweep's `storage` folder. One writer for each trial; any number of readers."""

    def __init__(self, storage: Path) -> None:
        self.storage = Path(storage)
        self.results = self.storage / "results"

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
            old.status in FINISHED and old.method_digest == rows[0].method_digest for old in self.rows_of(path.stem)
        ):
            return path
        write_atomic(path, _ipc(to_table(rows)))
        return path

    def rows_of(self, trial_id: str) -> list[ResultRow]:
        """The rows of one trial, none when it has no readable file."""
        path = self.results / f"{trial_id}.arrow"
        try:
            return to_rows(_read_rows(path))
        except (OSError, ValueError, pa.ArrowException):
            return []

    def scan(self) -> Scan:
        """Every row, and the damaged files."""
        tables, damaged = [SCHEMA.empty_table()], []
        for path in sorted(self.results.glob("*.arrow")):
            try:
                tables.append(_read_rows(path))
            except (OSError, ValueError, pa.ArrowException) as error:
                damaged.append(f"{path}: {first_line(error)}; treated as absent, its trial will run again")
        return Scan(pa.concat_tables(tables), damaged)

    def read(self) -> pa.Table:
        """Every row; a damaged file is warned of by name."""
        table, damaged = self.scan()
        for line in damaged:
            warnings.warn(line, DamagedFileWarning, stacklevel=2)
        return table

    def finished(self) -> dict[str, str]:
        """The digest of the method's source for each trial that need not run again (done, or truncated)."""
        rows = self.read().select(["trial_id", "status", "method_digest"]).to_pylist()
        return {r["trial_id"]: r["method_digest"] for r in rows if r["status"] in FINISHED}

    def write_traceback(self, trial_id: str, title: str, error: BaseException) -> Path:
        """Keep how an error came about; the file."""
        path = self.storage / "errors" / f"{trial_id}.txt"
        write_atomic(path, masked("".join([f"{trial_id}  {title}\n\n", *traceback.format_exception(error)])).encode())
        return path

    def write_predictions(
        self, trial_id: str, test_set: str, image_keys: Sequence[str], labels: np.ndarray, logits: np.ndarray
    ) -> tuple[str, str]:
        """Store logits [B, C] with keys and labels [B]; returns the file (relative to storage) and its digest."""
        logits = np.ascontiguousarray(logits, dtype=np.float32)
        labels = np.ascontiguousarray(labels, dtype=np.int64)
        predicted = logits.argmax(1).astype(np.int64)
        if logits.size > HALF_ABOVE and float(np.abs(logits).max()) < float(np.finfo(np.float16).max):
            logits = logits.astype(np.float16)
        columns = {
            "image_key": pa.array(image_keys, pa.string()),
            "label": pa.array(labels),
            "predicted": pa.array(predicted),
            "logits": pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1]),
        }
        path = self._predictions(trial_id, test_set)
        write_atomic(path, _ipc(pa.table(columns)))
        return str(path.relative_to(self.storage)), _digest(image_keys, labels, logits)

    def read_predictions(self, trial_id: str, test_set: str, digest: str | None = None) -> Predictions:
        """DataError when the file is missing or damaged, or is not the one with this digest."""
        path = self._predictions(trial_id, test_set)
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
            logits = table["logits"].combine_chunks()
            shape = (len(table), table["logits"].type.list_size)
            found = Predictions(
                table["image_key"].to_pylist(),
                table["label"].to_numpy(),
                table["predicted"].to_numpy(),
                logits.flatten().to_numpy(zero_copy_only=False).reshape(shape),
            )
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise DataError(f"predictions {path} cannot be read: {error}") from error
        if digest is not None and _digest(found.image_keys, found.labels, found.logits_BC) != digest:
            raise DataError(f"predictions {path} are not those of the row: their digest differs from {digest[:12]}...")
        return found

    def _predictions(self, trial_id: str, test_set: str) -> Path:
        return self.storage / "predictions" / trial_id / f"{quote(test_set, safe='')}.arrow"


def _ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _read_rows(path: Path) -> pa.Table:
    """One trial's rows under the present schema; ValueError or an Arrow error when they are not that."""
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    table.validate(full=True)
    if set(table["trial_id"].to_pylist()) != {path.stem}:
        raise ValueError("its rows are of another trial than its name says")
    return check_trial(conform(table))


def _digest(image_keys: Sequence[str], labels: np.ndarray, logits: np.ndarray) -> str:
    h = hashlib.sha256("\n".join(image_keys).encode())
    for array in (labels, logits):
        h.update(f"{array.dtype.str}{array.shape}".encode())
        h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()
