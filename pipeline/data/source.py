"""Sources of images: a `Source` provides the images, labels and splits of a data set.

A source is a small value (a path and a digest) that is part of requests. Files are opened in the process that uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.file_keys import Checked, KnownRows, cache_folder, checks_name
from pipeline.errors import DataError
from pipeline.files import file_sha256
from pipeline.untrusted import check_texts, parse_json

COLUMNS = ("image", "label", "split")
RESTORE = "restore the file (one of the package: pip install --force-reinstall farebox, or git checkout)"


class LabelledRows(Protocol):
    """Rows with labels and splits, without images: what a few-shot draw needs."""

    @property
    def classnames(self) -> tuple[str, ...]:
        """Class names in label order."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """Labels of all rows, int64."""
        ...

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have rows."""
        ...

    def rows_of(self, split: str) -> np.ndarray:
        """Return the row numbers of a split, in listed order."""
        ...


class Source(LabelledRows, Protocol):
    """The images of a data set by row number. Hashable and small to pickle: opened files are not pickled."""

    def __hash__(self) -> int: ...

    @property
    def digest(self) -> str:
        """Digest of the content: a data set with another digest is another data set."""
        ...

    @property
    def bits(self) -> int | None:
        """Number of bits that 16-bit grey images use; None if the card does not say."""
        ...

    @property
    def place(self) -> str:
        """Its path, for messages."""
        ...

    @property
    def class_ids(self) -> tuple[str, ...]:
        """Identifiers of the classes, in label order. Classes of two data sets with the same id are the same class."""
        ...

    def where(self, row: int) -> str:
        """Return the file or table row of a row, for messages."""
        ...

    def image_bytes(self, row: int) -> bytes:
        """Return the encoded image of one row."""
        ...

    def keys_of(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the content key of each of these rows: the first 16 bytes of the image's SHA-256, as hex."""
        ...

    def unchecked(self, rows: Sequence[int] | np.ndarray) -> list[int]:
        """Return those of these rows whose images were not successfully decoded before."""
        ...

    def mark_checked(self, images: Mapping[int, Checked]) -> None:
        """Record that the images of these rows can be decoded."""
        ...

    def peaks_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the peak [B] of each of these rows, 0 for rows that were not checked."""
        ...


@dataclass(frozen=True)
class ParquetSource:
    """A Parquet file with the columns image (encoded bytes), label (int) and split (train, val or test)."""

    path: str
    sha256: str
    bits: int | None = None

    def __getstate__(self) -> dict[str, object]:
        """Return the fields, without anything that was opened in this process."""
        return {"path": self.path, "sha256": self.sha256, "bits": self.bits}

    @property
    def digest(self) -> str:
        """SHA-256 of the file, and of `bits` if the card has it."""
        return with_bits(self.sha256, self.bits)

    @property
    def place(self) -> str:
        """Path of the file."""
        return self.path

    @cached_property
    def _table(self) -> pa.Table:
        path = Path(self.path)
        if not path.is_file():
            raise DataError(f"no data file at {path}: reinstall, or set `path` in the data set's card")
        actual = file_sha256(path)
        if actual != self.sha256:
            raise DataError(f"{path} has SHA-256 {actual[:12]}, the card says {self.sha256[:12]}: {RESTORE}")
        try:
            table = pq.ParquetFile(path, memory_map=True).read()  # read_table imports pandas
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a readable Parquet file: {error}") from error
        lacks = [name for name in COLUMNS if name not in table.column_names or table[name].null_count]
        if lacks or b"classes" not in (table.schema.metadata or {}):
            raise DataError(
                f"{path} lacks {' and '.join(lacks) or 'class names'}: expected the columns {', '.join(COLUMNS)} "
                "without gaps, and the class names as a JSON list under `classes` in the file's metadata"
            )
        return table

    @cached_property
    def classnames(self) -> tuple[str, ...]:
        """Class names in label order."""
        names = parse_json(self._table.schema.metadata[b"classes"], f"the metadata of {self.path}")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"the metadata of {self.path} has `classes` that are not a JSON list of texts")
        check_texts(self.path, names)
        return tuple(names)

    @property
    def class_ids(self) -> tuple[str, ...]:
        """The class names."""
        return self.classnames

    def where(self, row: int) -> str:
        """Return the row number and the file, for messages."""
        return f"row {int(row)} of {self.path}"

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels of all rows, int64."""
        return cast(np.ndarray, self._table["label"].to_numpy().astype(np.int64))

    @cached_property
    def _split_of_row(self) -> np.ndarray:
        return np.asarray(self._table["split"].to_pylist())

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have rows."""
        return tuple(np.unique(self._split_of_row).tolist())

    def rows_of(self, split: str) -> np.ndarray:
        """Return the row numbers of a split, in file order."""
        return np.flatnonzero(self._split_of_row == split)

    def image_bytes(self, row: int) -> bytes:
        """Return the encoded image of one row."""
        return cast(bytes, self._table["image"][int(row)].as_py())

    @cached_property
    def _keys(self) -> dict[int, str]:
        return {}

    def keys_of(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the content key of each of these rows. An image is hashed once a process."""
        known = self._keys
        for row in map(int, rows):
            if row not in known:
                known[row] = content_key(self.image_bytes(row))
        return [known[int(row)] for row in rows]

    @cached_property
    def _known(self) -> KnownRows:
        return KnownRows(cache_folder() / "index" / f"{self.sha256}.{checks_name(self.bits)}", len(self.labels))

    def unchecked(self, rows: Sequence[int] | np.ndarray) -> list[int]:
        """Return those of these rows whose images were not successfully decoded before."""
        return self._known.unchecked(rows)

    def mark_checked(self, images: Mapping[int, Checked]) -> None:
        """Record that the images of these rows can be decoded."""
        self._known.add(images)
        self._keys.update((row, checked.key) for row, checked in images.items())

    def peaks_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the peak [B] of each of these rows, 0 for rows that were not checked."""
        return self._known.peaks(rows)


S = TypeVar("S", bound=Source)


@lru_cache(maxsize=64)
def _opened(source: Source) -> Source:
    return source


def opened(source: S) -> S:
    """Return this process's opened instance of a source, so that a file is read and verified once."""
    return cast(S, _opened(source))


def with_bits(digest: str, bits: int | None) -> str:
    """Return the digest of a data set with `bits`, which changes the pixels of its 16-bit images."""
    return digest if bits is None else hashlib.sha256(f"{digest} bits={bits}".encode()).hexdigest()


def content_key(data: bytes) -> str:
    """Return the content key of an image: the first 16 bytes of its SHA-256, as hex."""
    return hashlib.sha256(data).hexdigest()[:32]
