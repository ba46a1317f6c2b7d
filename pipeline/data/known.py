"""What checks learned of images, kept on disk: content keys, and that an image can be decoded.

Each data set has a folder of files of records. A file is written once and put in place by an atomic rename: a line with
its checksum (files.py) and the folder's name, then the records. The folder's name holds the version of the decoder, so
that another version decodes every image again. The record of a file holds as long as its size and time of change are
those that it was made for. A damaged file is removed, and its images are hashed again.
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
"""Files above which they are merged into one."""
FIXED = 1
"""Time of change in the records of rows whose content is fixed by the data set's digest."""


class Checked(NamedTuple):
    """What a check learned of an image that can be decoded."""

    key: str
    """Content key: 32 hexadecimal digits."""
    peak: int
    """Greatest value of an image of 16 bits a channel, else 0: see `decode.Examined`."""


def cache_folder() -> Path:
    """Return the folder of indexes and records: $FAREBOX_CACHE, else farebox/ in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("FAREBOX_CACHE"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farebox"


def checks_name(bits: int | None) -> str:
    """Return the end of a folder's name: what the outcome of a check depends on beside the image."""
    return f"{RULES}-{PIL.__version__}{'' if bits is None else f'-{bits}'}.known"


def records_of(images: Mapping[int, Checked], readable: bool) -> np.ndarray:
    """Return records [B] of rows, without size and time of change."""
    records = np.zeros(len(images), RECORD)
    records["row"], records["readable"] = list(images), readable
    records["peak"] = [checked.peak for checked in images.values()]
    keys = "".join(checked.key for checked in images.values())
    records["key"] = np.frombuffer(bytes.fromhex(keys), np.uint8).reshape(-1, 16)
    return records


class Known:
    """Records [n] by row, as far as they are known. Safe for several processes: files are only added, or merged."""

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
        """Return the records [B] of these rows; `mtime` is 0 where nothing is known of this size and time."""
        found = self._records[rows]
        found["mtime"][(found["size"] != sizes) | (found["mtime"] != mtimes)] = 0
        return found

    def add(self, records: np.ndarray) -> None:
        """Remember records [B], in this process and in later ones if the folder can be written."""
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
        """Records of a file; none when it cannot be used."""
        try:
            header, _, records = read_sealed(file).partition(b"\n")
            if header.split(b" ")[1:] != self._header.split()[1:]:
                raise DamagedFile(file, "it is of another data set")
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
    """Records of images whose content is fixed by the data set's digest: rows of a table, not files."""

    def __init__(self, folder: Path, n: int) -> None:
        self._known = Known(folder, n)

    def unchecked(self, rows: Sequence[int] | np.ndarray) -> list[int]:
        """Return those of these rows that are not known to be images that can be decoded."""
        return [int(row) for row in np.asarray(rows, np.int64)[~self._find(rows)["readable"]]]

    def peaks(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the peak [B] of each of these rows, 0 for rows that were not checked."""
        return self._find(rows)["peak"]

    def add(self, images: Mapping[int, Checked]) -> None:
        """Remember that the images of these rows can be decoded."""
        if images:
            records = records_of(images, readable=True)
            records["mtime"] = FIXED
            self._known.add(records)

    def _find(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._known.find(np.asarray(rows, np.int64), 0, FIXED)
