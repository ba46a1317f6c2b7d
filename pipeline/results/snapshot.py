"""The snapshot of a storage: the rows of all its row files in one file, which is read in their place.

    rows.arrow     the rows, each with the size and the time of modification of its row file

Row files remain the record of their trials. The snapshot's rows are used where size and time of a row file are still
those that it states; any other row file is read, so a file that was replaced, edited, damaged or removed since is
treated as without a snapshot. A snapshot that is missing, damaged or of another version of the columns is ignored. It
is written at the end of a run, atomically and sealed. Files written in the last seconds before are not in it, since a
file that is replaced within one tick of the file system's clock would keep its time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from pipeline.errors import DamagedFile
from pipeline.files import read_sealed, sealed_arrow, write_atomic
from pipeline.results.row import SCHEMA

FILE = "rows.arrow"
SETTLED_NS = 2 * 10**9
"""Age in nanoseconds at which a row file enters the snapshot."""
_STAMP = ("file_size", "file_mtime_ns")

Stamp = tuple[int, int]
"""Size and time of modification, in nanoseconds, of a row file."""


@dataclass(frozen=True)
class Snapshot:
    """Rows of trials, and the stamps of the files that they were read from."""

    table: pa.Table = field(default_factory=SCHEMA.empty_table)
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    """By trial id."""


def stamps_of(results: Path) -> dict[str, Stamp]:
    """Return the stamps of the row files in a folder by trial id, sorted; empty if there is no folder."""
    try:
        with os.scandir(results) as entries:
            found = [(entry.name, entry.stat()) for entry in entries if entry.name.endswith(".arrow")]
    except FileNotFoundError:
        return {}
    return {name.removesuffix(".arrow"): (stat.st_size, stat.st_mtime_ns) for name, stat in sorted(found)}


def read_snapshot(storage: Path) -> Snapshot:
    """Read the snapshot of a storage; an empty one if there is none that is intact."""
    try:
        table = pa.ipc.open_file(read_sealed(storage / FILE)).read_all().replace_schema_metadata(None)
        trials, sizes, times = (table[name].to_pylist() for name in ("trial_id", *_STAMP))
        table = table.drop_columns(list(_STAMP))
    except (OSError, KeyError, pa.ArrowException, DamagedFile):
        return Snapshot()
    if not table.schema.equals(SCHEMA):
        return Snapshot()
    return Snapshot(table, dict(zip(trials, zip(sizes, times, strict=True), strict=True)))


def write_snapshot(storage: Path, table: pa.Table, stamps: Mapping[str, Stamp]) -> None:
    """Write the snapshot of a storage.

    Args:
        storage: the storage.
        table: rows that were read from its row files.
        stamps: the stamps of these files before they were read, by trial id.

    Raises:
        StorageError: the file cannot be written.
    """
    latest = time.time_ns() - SETTLED_NS
    settled = {trial: stamp for trial, stamp in stamps.items() if stamp[1] < latest}
    trials = table["trial_id"].to_pylist()
    table = table.filter(pa.array([trial in settled for trial in trials], pa.bool_()))
    of_rows = [settled[trial] for trial in trials if trial in settled]
    for i, name in enumerate(_STAMP):
        table = table.append_column(name, pa.array([stamp[i] for stamp in of_rows], pa.int64()))
    write_atomic(storage / FILE, sealed_arrow(table.combine_chunks()))
