"""What a layout's reader returns: the rows of a data set with labels and splits, before any image is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.data.layouts.file_kinds import ends_in, entries, hidden_reason
from pipeline.data.layouts.skipped import Contents
from pipeline.errors import DataError
from pipeline.untrusted import check_texts

SPLITS = ("train", "val", "test")
Row = tuple[str, int, str]
"""Path relative to the listing's root, label, split."""
SCHEMA = pa.schema([("path", pa.string()), ("label", pa.int32()), ("split", pa.int8())])
"""`split` is the position in SPLITS."""
BATCH = 65_536
"""Maximum number of rows in memory while a folder is listed."""

T = TypeVar("T")


class Options(NamedTuple):
    """Options of a card that concern splits."""

    split_seed: int = 1
    """Seed of a split that is generated."""
    test_split: str = ""
    """The split that is scored instead of test: val, or empty for test."""
    test_only: bool = False
    """Whether the data set is a shift set, on which methods are not fitted."""


@dataclass(frozen=True)
class Listing:
    """A data set as a reader lists it. The rows may be iterated more than once."""

    root: Path
    classnames: tuple[str, ...]
    """Class names in label order, as the files write them."""
    class_ids: tuple[str, ...]
    """Identifiers by which the classes of two data sets are matched: WordNet ids, or the names in the files."""
    batches: Callable[[], Iterator[pa.RecordBatch]]
    """The rows in batches: the columns of SCHEMA, and `image` (binary) if the images are not files."""
    watched: tuple[Path, ...]
    """Files and folders that the rows were read from. The rows are read again when one of them changes."""
    split_origin: str = ""
    """How the split was generated; empty if it is the published one."""
    order: str = ""
    """What decides the order of the labels."""
    contents: Callable[[], Contents] = Contents
    """The other content of the folder; complete after the rows have been iterated."""
    stated: bool = False
    """Whether the paths were read from a split file or list, not found by listing folders."""


class Manifest:
    """The rows [N] of a listing, without images."""

    def __init__(self, table: pa.Table, listing: Listing) -> None:
        self.table, self.classnames, self.class_ids = table, listing.classnames, listing.class_ids
        self.split_origin, self.order = listing.split_origin, listing.order

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels [N], int64."""
        return numbers(self.table["label"], np.int64)

    @cached_property
    def _split(self) -> np.ndarray:
        return numbers(self.table["split"], np.int8)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have rows."""
        return tuple(name for name in SPLITS if len(self.rows_of(name)))

    def rows_of(self, split: str) -> np.ndarray:
        """Row numbers of a split, in listed order."""
        return np.flatnonzero(self._split == SPLITS.index(split))

    def path(self, row: int) -> str:
        """Path of a row, as listed."""
        return str(self.table["path"][int(row)])


def numbers(column: pa.ChunkedArray, kind: type) -> np.ndarray:
    """Return a column as one array. (Arrow's own to_numpy imports pandas.)"""
    return np.concatenate([np.empty(0, kind), *(np.from_dlpack(chunk) for chunk in column.chunks)], dtype=kind)


def batches(rows: Callable[[], Iterable[Row]]) -> Callable[[], Iterator[pa.RecordBatch]]:
    """Convert rows to Arrow batches of BATCH rows."""
    return lambda: _batches(rows())


def _batches(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    walk = iter(rows)
    while some := list(islice(walk, BATCH)):
        paths, labels, splits = zip(*some, strict=True)
        check_texts("a listed file", paths)  # Arrow cannot hold lone surrogates
        yield pa.record_batch([paths, labels, [SPLITS.index(split) for split in splits]], schema=SCHEMA)


def listed(listing: Listing) -> Manifest:
    """Return all rows of a listing. The images need not exist."""
    return Manifest(pa.Table.from_batches((batch.select(SCHEMA.names) for batch in listing.batches()), SCHEMA), listing)


def scored(splits: dict[str, T], options: Options, where: Path) -> dict[str, T]:
    """Return the splits after `test_split` replaces the test split.

    Raises:
        DataError: There is no such split.
    """
    if not options.test_split:
        return splits
    if options.test_split not in splits:
        raise DataError(f"{where} has no {options.test_split} split: leave test={options.test_split} out")
    kept = {split: content for split, content in splits.items() if split not in ("test", options.test_split)}
    return kept | {"test": splits[options.test_split]}


def folders(where: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, without hidden and system folders."""
    return sorted(entry.name for entry in entries(where) if entry.is_dir() and not hidden_reason(entry.name, True))


def files(where: Path, endings: tuple[str, ...] = ("",)) -> list[str]:
    """Return the sorted names of the files in a folder with these endings, without hidden and system files."""
    return sorted(
        entry.name
        for entry in entries(where)
        if not hidden_reason(entry.name, False) and ends_in(entry.name, endings) and entry.is_file()
    )
