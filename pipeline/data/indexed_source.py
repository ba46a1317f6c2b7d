"""Sources over an index: images in files, and images in tables."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.decode import MAX_BYTES
from pipeline.data.file_keys import Checked, FileKeyCache, KnownRows, checks_name, records_of
from pipeline.data.index import Index, index_of
from pipeline.data.layouts.registry import LayoutSpec
from pipeline.data.source import content_key, with_bits
from pipeline.errors import DamagedFile, DataError
from pipeline.untrusted import check_regular, read_regular

log = logging.getLogger(__name__)

_REBUILDING = threading.Lock()


@dataclass(frozen=True)
class IndexedSource:
    """An indexed data set. It is pickled as its spec and digest. Another process must list the same rows."""

    spec: LayoutSpec
    listed: str
    """Digest of the listed rows."""
    bits: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields, without anything that was opened in this process."""
        return {"spec": self.spec, "listed": self.listed, "bits": self.bits}

    @property
    def digest(self) -> str:
        """Digest of the listed rows, and of `bits` if the card has it."""
        return with_bits(self.listed, self.bits)

    @cached_property
    def index(self) -> Index:
        """The rows. Raises DataError when the files were changed after the run was planned."""
        index = index_of(self.spec)
        if index.digest != self.listed:
            raise DataError(f"{self.place} was changed after the run was planned: type the same command again")
        return index

    def use(self, index: Index) -> None:
        """Use an index that was just read, whose findings may be newer than those of the present one."""
        self.__dict__["index"] = index

    @property
    def place(self) -> str:
        """Its path."""
        return self.spec.path

    @property
    def split_origin(self) -> str:
        """How the split was generated; empty if it is the published one."""
        return self.index.split_origin

    @property
    def classnames(self) -> tuple[str, ...]:
        """Class names in label order, as in prompts: like CoOp, with underscores replaced by spaces."""
        return tuple(name.replace("_", " ") for name in self.index.classnames)

    @property
    def class_ids(self) -> tuple[str, ...]:
        """Identifiers of the classes, in label order."""
        return self.index.class_ids

    @property
    def labels(self) -> np.ndarray:
        """Labels of all rows, int64."""
        return self.index.labels

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have rows."""
        return self.index.splits

    def rows_of(self, split: str) -> np.ndarray:
        """Row numbers of a split, in listed order."""
        return self.index.rows_of(split)

    def _known_folder(self) -> Path:
        return self.index.file.with_name(f"{self.listed}.{checks_name(self.bits)}")


@dataclass(frozen=True)
class TableSource(IndexedSource):
    """Images of Parquet or Arrow files, copied once into the index."""

    def where(self, row: int) -> str:
        """Return the name of a row, for messages."""
        return f"{self.index.path(row)} of {self.place}"

    def image_bytes(self, row: int) -> bytes:
        """Return the encoded image of one row, verified by its content key. A damaged index is rebuilt."""
        try:
            return self._verified(int(row))
        except DamagedFile:
            with _REBUILDING:
                return self._after_rebuild(int(row))

    def _verified(self, row: int) -> bytes:
        image, key = self.index.image(row)
        if content_key(image) != key:
            raise DamagedFile(self.index.file, f"the image of {self.where(row)} does not match its content key")
        return image

    def _after_rebuild(self, row: int) -> bytes:
        try:
            return self._verified(row)  # another thread may have rebuilt the index
        except DamagedFile as error:
            log.warning("%s: the index is rebuilt", error)
            self.index.forget()
            self.__dict__.pop("index")
        try:
            return self._verified(row)
        except DamagedFile as error:
            raise DataError(f"{error}, though it was rebuilt: check the disk, or set FAREBOX_CACHE=DIR") from error

    def keys_of(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the content key of each of these rows."""
        keys = self.index.table["key"]
        return [str(keys[int(row)]) for row in rows]

    @cached_property
    def _known(self) -> KnownRows:
        return KnownRows(self._known_folder(), len(self.labels))

    def unchecked(self, rows: Sequence[int] | np.ndarray) -> list[int]:
        """Return those of these rows whose images were not successfully decoded before."""
        return self._known.unchecked(rows)

    def mark_checked(self, images: Mapping[int, Checked]) -> None:
        """Record that the images of these rows can be decoded."""
        self._known.add(images)

    def peaks_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the peak [B] of each of these rows, 0 for rows that were not checked."""
        return self._known.peaks(rows)


@dataclass(frozen=True)
class FileSource(IndexedSource):
    """Images in files. A file is read on demand, and its content key is cached."""

    def where(self, row: int) -> str:
        """Return the file of a row."""
        return str(self._path(row))

    def image_bytes(self, row: int) -> bytes:
        """Return the encoded image of one row.

        Raises:
            DataError: The file cannot be read, or its content does not match its cached key.
        """
        try:
            image = read_regular(self._path(row), MAX_BYTES)
        except OSError as error:
            raise self._gone(row, error) from error
        key = self._keys.get(int(row))
        if key is not None and content_key(image) != key:
            self._known.forget()
            raise DataError(
                f"{self._path(row)} was changed since it was hashed: restore it, then type the same command"
            )
        return image

    def keys_of(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the content key of each of these rows. A file is read again only after its size or mtime changed."""
        keys = self._keys
        if unknown := [row for row in dict.fromkeys(map(int, rows)) if row not in keys]:
            records = self._records(unknown)
            rest = records["row"][records["mtime"] == 0].tolist()
            unread = {row: Checked(content_key(self.image_bytes(row)), 0) for row in rest}
            self._remember(unread, readable=False)
        return [keys[int(row)] for row in rows]

    def unchecked(self, rows: Sequence[int] | np.ndarray) -> list[int]:
        """Return those of these rows whose files were not decoded since they were last changed."""
        records = self._records(rows)
        return list(map(int, records["row"][(records["mtime"] == 0) | ~records["readable"]]))

    def mark_checked(self, images: Mapping[int, Checked]) -> None:
        """Record that the images of these rows can be decoded, until their files change."""
        self._remember(images, readable=True)

    def peaks_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the peak [B] of each of these rows, 0 for rows that were not checked."""
        records = self._records(rows)
        return np.where(records["mtime"] == 0, 0, records["peak"])

    def _path(self, row: int) -> Path:
        return self.index.root / self.index.path(row)

    @cached_property
    def _known(self) -> FileKeyCache:
        return FileKeyCache(self._known_folder(), len(self.labels))

    @cached_property
    def _keys(self) -> dict[int, str]:
        """Content keys of the files that this process has examined."""
        return {}

    def _records(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the records [B] of the present files; `mtime` is 0 where there is none."""
        rows = np.asarray(rows, np.int64)
        records = self._known.find(rows, *self._stamps(rows))
        records["row"] = rows
        for row, key, mtime in zip(rows.tolist(), records["key"], records["mtime"], strict=True):
            if mtime:
                self._keys[row] = key.tobytes().hex()
            else:
                self._keys.pop(row, None)
        return records

    def _stamps(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return sizes and mtimes [B] of the files. Raises DataError when a size is not the listed one."""
        listed = self.index.table.select(["path", "size"]).take(rows).to_pydict()
        stamps = np.empty((2, len(rows)), np.int64)
        root = str(self.index.root)
        for i, (path, size) in enumerate(zip(listed["path"], listed["size"], strict=True)):
            try:
                status = os.stat(f"{root}/{path}")  # noqa: PTH116 (building a Path takes longer than the call itself)
                check_regular(status, path)
            except OSError as error:
                raise self._gone(rows[i], error) from error
            if status.st_size != size:
                self.index.forget()
                raise DataError(f"{root}/{path} was changed since it was indexed: type the same command again")
            stamps[:, i] = status.st_size, status.st_mtime_ns
        return stamps[0], stamps[1]

    def _remember(self, images: Mapping[int, Checked], readable: bool) -> None:
        if not images:
            return
        records = records_of(images, readable)
        records["size"], records["mtime"] = self._stamps(records["row"])
        self._known.add(records)
        self._keys.update((row, checked.key) for row, checked in images.items())

    def _gone(self, row: int, error: OSError) -> DataError:
        self.index.forget()
        return DataError(f"{self._path(row)} cannot be read ({error.strerror}): restore it, then type the same command")
