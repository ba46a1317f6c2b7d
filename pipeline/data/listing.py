"""What a layout's reader finds: the images of a folder with labels and splits, before any of them is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.data.file_kinds import ends_in, entries, hidden_reason
from pipeline.data.skipped import Contents
from pipeline.errors import DataError
from pipeline.untrusted import check_texts

SPLITS = ("train", "val", "test")
Row = tuple[str, int, str]
"""Path under the listing's root, label, split."""
SCHEMA = pa.schema([("path", pa.string()), ("label", pa.int32()), ("split", pa.int8())])
"""`split` is its place in SPLITS."""
BATCH = 65_536
"""Rows that are held in memory at a time while a folder is listed."""


T = TypeVar("T")


class Options(NamedTuple):
    """What a data set's card says about its splits."""

    split_seed: int = 1
    """Of a split that is made here."""
    test_split: str = ""
    """The split that is scored, where it is not `test`: val."""
    test_only: bool = False
    """The set is the shift of another one: nothing is fitted on it."""


@dataclass(frozen=True)
class Listing:
    """A data set as its folder lists it. Its rows may be walked more than once."""

    root: Path
    classnames: tuple[str, ...]
    """As the files write them, in label order."""
    class_ids: tuple[str, ...]
    """What tells classes apart, and says which are the same in another set: WordNet ids, or the names in the files."""
    batches: Callable[[], Iterator[pa.RecordBatch]]
    """The rows, some at a time: the columns of SCHEMA, and `image` (binary) where images are not files."""
    watched: tuple[Path, ...]
    """Files and folders that the rows were read from: when one of them changes, they are read again."""
    made: str = ""
    """How the split was made, where it is not the published one."""
    order: str = ""
    """What decides the order of the labels."""
    contents: Callable[[], Contents] = Contents
    """What else the folder holds; complete once the rows have been walked."""
    stated: bool = False
    """Whether the paths are taken from a split file or list, rather than found by listing folders."""


class Rows:
    """Listed rows [N]: enough to draw from and to name images by."""

    def __init__(self, table: pa.Table, listing: Listing) -> None:
        self.table, self.classnames, self.class_ids = table, listing.classnames, listing.class_ids
        self.made, self.order = listing.made, listing.order

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels [N], int64."""
        return _numbers(self.table["label"], np.int64)

    @cached_property
    def _split(self) -> np.ndarray:
        return _numbers(self.table["split"], np.int8)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have rows."""
        return tuple(name for name in SPLITS if len(self.rows_of(name)))

    def rows_of(self, split: str) -> np.ndarray:
        """Row numbers of a split, in listed order."""
        return np.flatnonzero(self._split == SPLITS.index(split))

    def path(self, row: int) -> str:
        """A row's path, as listed."""
        return str(self.table["path"][int(row)])


def _numbers(column: pa.ChunkedArray, kind: type) -> np.ndarray:
    """A column as one array; Arrow's own to_numpy loads pandas."""
    return np.concatenate([np.empty(0, kind), *(np.from_dlpack(chunk) for chunk in column.chunks)], dtype=kind)


def batches(rows: Callable[[], Iterable[Row]]) -> Callable[[], Iterator[pa.RecordBatch]]:
    """Rows as Arrow, BATCH at a time."""
    return lambda: _batches(rows())


def _batches(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    walk = iter(rows)
    while some := list(islice(walk, BATCH)):
        paths, labels, splits = zip(*some, strict=True)
        check_texts("a listed file", paths)  # Arrow cannot hold lone surrogates
        yield pa.record_batch([paths, labels, [SPLITS.index(split) for split in splits]], schema=SCHEMA)


def listed(listing: Listing) -> Rows:
    """All rows in memory, no image looked for."""
    return Rows(pa.Table.from_batches((batch.select(SCHEMA.names) for batch in listing.batches()), SCHEMA), listing)


def scored(splits: dict[str, T], options: Options, where: Path) -> dict[str, T]:
    """Return the splits with the one that the card names as `test_split` in the place of test.

    Raises:
        DataError: there is no such split.
    """
    if not options.test_split:
        return splits
    if options.test_split not in splits:
        raise DataError(f"{where} has no {options.test_split} split: leave test={options.test_split} out")
    kept = {split: content for split, content in splits.items() if split not in ("test", options.test_split)}
    return kept | {"test": splits[options.test_split]}


def folders(where: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; hidden ones and those of operating systems left out."""
    return sorted(entry.name for entry in entries(where) if entry.is_dir() and not hidden_reason(entry.name, True))


def files(where: Path, endings: tuple[str, ...] = ("",)) -> list[str]:
    """Return the names of the files in a folder that end so, sorted; hidden ones and system files left out."""
    return sorted(
        entry.name
        for entry in entries(where)
        if not hidden_reason(entry.name, False) and ends_in(entry.name, endings) and entry.is_file()
    )
