"""An on-disk cache of content keys and decoding checks.

Each data set has a folder of record files. A record file is written once and moved into place by an atomic rename: a
line with its checksum (files.py) and the name of the folder, then the records. The name of the folder contains the
version of the decoder, so another version decodes every image again. A record is valid while the size and mtime of its
file are unchanged. A damaged record file is removed, and its images are hashed again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL

from pipeline.data.decode import RULES
from pipeline.errors import DamagedFile
from pipeline.files import UNSEALED, read_sealed, seal

log = logging.getLogger(__name__)

RECORD = np.dtype(
    [("row", "<i8"), ("size", "<i8"), ("mtime", "<i8"), ("readable", "?"), ("peak", "<u4"), ("key", "u1", 16)]
)
SUFFIX = ".records"
MANY = 32
"""Number of record files above which they are merged into one."""
FIXED = 1
"""The mtime in records of rows whose content is fixed by the digest of the data set."""


class Checked(NamedTuple):
    """Outcome of the check of an image that can be decoded."""

    key: str
    """Content key: 32 hexadecimal digits."""
    peak: int
    """Maximum value of an image with 16 bits per channel, else 0: see `decode.Examined`."""


def cache_folder() -> Path:
    """Return the cache folder of indexes and records: $FAREBOX_CACHE, else farebox/ in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("FAREBOX_CACHE"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farebox"


def checks_name(bits: int | None) -> str:
    """Return the end of a record folder's name: what the outcome of a check depends on, apart from the image."""
    return f"{RULES}-{PIL.__version__}{'' if bits is None else f'-{bits}'}.known"


def records_of(images: Mapping[int, Checked], readable: bool) -> np.ndarray:
    """Return records [B] of rows, without size and mtime."""
    records = np.zeros(len(images), RECORD)
    records["row"], records["readable"] = list(images), readable
    records["peak"] = [checked.peak for checked in images.values()]
    keys = "".join(checked.key for checked in images.values())
    records["key"] = np.frombuffer(bytes.fromhex(keys), np.uint8).reshape(-1, 16)
    return records


class FileKeyCache:
    """The known records of the rows of a data set. Processes may share it: files are only added or merged."""

    def __init__(self, folder: Path, n: int) -> None:
        self.folder = folder
        self._records = np.zeros(n, RECORD)  # memory is taken only where something is written
        files = sorted(folder.glob(f"*{SUFFIX}"))
        for file in files:
            self._take(self._read(file))
        if len(files) > MANY:
            self._write(self._records[self._records["mtime"] > 0])
            for file in files:
                file.unlink(missing_ok=True)

    def find(self, rows: np.ndarray, sizes: np.ndarray | int, mtimes: np.ndarray | int) -> np.ndarray:
        """Return the records [B] of these rows; `mtime` is 0 where there is no record of this size and mtime."""
        records = self._records[rows]
        records["mtime"][(records["size"] != sizes) | (records["mtime"] != mtimes)] = 0
        return records

    def add(self, records: np.ndarray) -> None:
        """Add records [B], in this process and, if the folder can be written, on disk."""
        self._take(records)
        self._write(records)

    def forget(self) -> None:
        """Remove all records, so that every image is hashed again by the next process."""
        for file in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                file.unlink()

    def _take(self, records: np.ndarray) -> None:
        kept = records[records["row"] < len(self._records)]
        self._records[kept["row"]] = kept

    def _write(self, records: np.ndarray) -> None:
        temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(seal(self._header + records.tobytes()))
            temporary.rename(temporary.with_suffix(SUFFIX))
        except OSError as error:
            log.warning("%s cannot be written (%s): images are checked again the next time", self.folder, error)

    @property
    def _header(self) -> bytes:
        return f"{UNSEALED} {self.folder.name}\n".encode()

    def _read(self, file: Path) -> np.ndarray:
        """Return the records of a file; none if it cannot be used."""
        try:
            header, _, records = read_sealed(file).partition(b"\n")
            if header.split(b" ")[1:] != self._header.split()[1:]:
                raise DamagedFile(file, "it belongs to another data set")
            return np.frombuffer(records, RECORD)
        except FileNotFoundError:  # another process has merged it
            pass
        except OSError as error:
            log.warning("%s cannot be read (%s): its images are hashed again", file, error)
        except DamagedFile as error:
            log.warning("%s: removed, its images are hashed again", error)
            with contextlib.suppress(OSError):
                file.unlink()
        return np.empty(0, RECORD)


class KnownRows:
    """Records of images in tables, whose content is fixed by the digest of the data set."""

    def __init__(self, folder: Path, n: int) -> None:
        self._known = FileKeyCache(folder, n)

    def unchecked(self, rows: Sequence[int] | np.ndarray) -> list[int]:
        """Return those of these rows whose images were not successfully decoded before."""
        return [int(row) for row in np.asarray(rows, np.int64)[~self._find(rows)["readable"]]]

    def peaks(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the peak [B] of each of these rows, 0 for rows that were not checked."""
        return self._find(rows)["peak"]

    def add(self, images: Mapping[int, Checked]) -> None:
        """Record that the images of these rows can be decoded."""
        if images:
            records = records_of(images, readable=True)
            records["mtime"] = FIXED
            self._known.add(records)

    def _find(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._known.find(np.asarray(rows, np.int64), 0, FIXED)
