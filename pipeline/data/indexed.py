"""Sources over an index: images that are files, and images that lie in tables."""

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
from pipeline.data.index import Index, index_of
from pipeline.data.known import Checked, Known, KnownRows, checks_name, records_of
from pipeline.data.layouts import Recipe
from pipeline.data.source import content_key, with_bits
from pipeline.errors import DamagedFile, DataError
from pipeline.untrusted import check_regular, read_regular

log = logging.getLogger(__name__)

_REBUILDING = threading.Lock()


@dataclass(frozen=True)
class IndexedSource:
    """A listed data set. It travels as its recipe and digest; where it is opened it must list the same."""

    recipe: Recipe
    listed: str
    """Digest of what is listed."""
    bits: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields: nothing that was opened in this process."""
        return {"recipe": self.recipe, "listed": self.listed, "bits": self.bits}

    @property
    def digest(self) -> str:
        """Digest of what is listed, with `bits` if the card states them."""
        return with_bits(self.listed, self.bits)

    @cached_property
    def index(self) -> Index:
        """The rows. DataError when the files here are not those of the digest."""
        found = index_of(self.recipe)
        if found.digest != self.listed:
            raise DataError(f"{self.place} is not what it was when the run was planned: type the same command again")
        return found

    def reopen(self) -> None:
        """Forget the opened rows: findings about the folder may have changed while the rows have not."""
        self.__dict__.pop("index", None)

    @property
    def place(self) -> str:
        """Where it lies."""
        return self.recipe.path

    @property
    def made(self) -> str:
        """How the split was made, where it is not the published one."""
        return self.index.made

    @property
    def classnames(self) -> tuple[str, ...]:
        """Class names in label order, as prompts have them: CoOp reads underscores as spaces."""
        return tuple(name.replace("_", " ") for name in self.index.classnames)

    @property
    def class_ids(self) -> tuple[str, ...]:
        """What tells classes apart, in label order."""
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
        """A row's name, for messages."""
        return f"{self.index.path(row)} of {self.place}"

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of one row, verified by its content key. An index with a damaged image is made again."""
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
            return self._verified(row)  # another thread has made the index again
        except DamagedFile as error:
            log.warning("%s: the index is made again", error)
            self.index.forget()
            self.__dict__.pop("index")
        try:
            return self._verified(row)
        except DamagedFile as error:
            raise DataError(f"{error}, though it was made again: check the disk, or set FAREBOX_CACHE=DIR") from error

    def keys_of(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The content key of each of these rows."""
        keys = self.index.table["key"]
        return [str(keys[int(row)]) for row in rows]

    @cached_property
    def _known(self) -> KnownRows:
        return KnownRows(self._known_folder(), len(self.labels))

    def unchecked(self, rows: Sequence[int] | np.ndarray) -> list[int]:
        """Return those of these rows that are not known to be images that can be decoded."""
        return self._known.unchecked(rows)

    def mark_checked(self, images: Mapping[int, Checked]) -> None:
        """Remember that the images of these rows can be decoded."""
        self._known.add(images)

    def peaks_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the peak [B] of each of these rows, 0 for rows that were not checked."""
        return self._known.peaks(rows)


@dataclass(frozen=True)
class FileSource(IndexedSource):
    """Images that are files. A file is read when its bytes are asked for; its content key is remembered."""

    def where(self, row: int) -> str:
        """A row's file."""
        return str(self._path(row))

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of one row.

        Raises:
            DataError: the file has gone, or its content does not match the key that this process knows it by.
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
        """The content key of each of these rows; a file is read once for each size and time of change."""
        keys = self._keys
        if asked := [row for row in dict.fromkeys(map(int, rows)) if row not in keys]:
            found = self._found(asked)
            rest = found["row"][found["mtime"] == 0].tolist()
            unread = {row: Checked(content_key(self.image_bytes(row)), 0) for row in rest}
            self._remember(unread, readable=False)
        return [keys[int(row)] for row in rows]

    def unchecked(self, rows: Sequence[int] | np.ndarray) -> list[int]:
        """Those of these rows that were not found readable since their files were last changed."""
        found = self._found(rows)
        return list(map(int, found["row"][(found["mtime"] == 0) | ~found["readable"]]))

    def mark_checked(self, images: Mapping[int, Checked]) -> None:
        """Remember that the images of these rows can be decoded, for as long as their files are not changed."""
        self._remember(images, readable=True)

    def peaks_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the peak [B] of each of these rows, 0 for rows that were not checked."""
        found = self._found(rows)
        return np.where(found["mtime"] == 0, 0, found["peak"])

    def _path(self, row: int) -> Path:
        return self.index.root / self.index.path(row)

    @cached_property
    def _known(self) -> Known:
        return Known(self._known_folder(), len(self.labels))

    @cached_property
    def _keys(self) -> dict[int, str]:
        """Keys of the files that this process has looked at."""
        return {}

    def _found(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """What is known of the files as they are now; `mtime` is 0 where nothing is."""
        rows = np.asarray(rows, np.int64)
        found = self._known.find(rows, *self._stamps(rows))
        found["row"] = rows
        for row, key, mtime in zip(rows.tolist(), found["key"], found["mtime"], strict=True):
            if mtime:
                self._keys[row] = key.tobytes().hex()
            else:
                self._keys.pop(row, None)
        return found

    def _stamps(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sizes and times of change [B] of the files as they are now. DataError where one is not as it was listed."""
        listed = self.index.table.select(["path", "size"]).take(rows).to_pydict()
        stamps = np.empty((2, len(rows)), np.int64)
        root = str(self.index.root)
        for i, (path, size) in enumerate(zip(listed["path"], listed["size"], strict=True)):
            try:
                found = os.stat(f"{root}/{path}")  # noqa: PTH116 (a Path costs more than the look itself)
                check_regular(found, path)
            except OSError as error:
                raise self._gone(rows[i], error) from error
            if found.st_size != size:
                self.index.forget()
                raise DataError(f"{root}/{path} was changed since it was indexed: type the same command again")
            stamps[:, i] = found.st_size, found.st_mtime_ns
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
