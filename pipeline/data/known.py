"""What was found out about image files, remembered: content keys, and that a file is a readable image.

One folder for each index, in it files of records that are each written once and put in place by an atomic rename: a
line with the file's checksum (files.py) and the folder's name, then the records. A record holds for a row as long as
the image's size and time of change are those that it was made for. A damaged file is removed, and its images are hashed
again.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from pathlib import Path

import numpy as np

from pipeline.errors import DamagedFile
from pipeline.files import UNSEALED, read_sealed, seal

log = logging.getLogger(__name__)

RECORD = np.dtype([("row", "<i8"), ("size", "<i8"), ("mtime", "<i8"), ("readable", "?"), ("key", "u1", 16)])
SUFFIX = ".records"
MANY = 32
"""Files above which they are written together as one."""


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

    def find(self, rows: np.ndarray, sizes: np.ndarray, mtimes: np.ndarray) -> np.ndarray:
        """The records [B] of these rows; `mtime` is 0 where nothing is known of a file of this size and time."""
        found = self._records[rows]
        found["mtime"][(found["size"] != sizes) | (found["mtime"] != mtimes)] = 0
        return found

    def add(self, records: np.ndarray) -> None:
        """Remember records [B]: for all processes that begin later, where the folder can be written."""
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
            log.warning("%s cannot be written (%s): images are hashed again the next time", self.folder, error)

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
