"""Open data sets by their cards, and check that the files are those that the card describes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cards import DatasetCard
from pipeline.data.images import check_readable
from pipeline.data.index import Index, index_of
from pipeline.data.indexed_source import FileSource, IndexedSource, TableSource
from pipeline.data.layouts import registry as layouts
from pipeline.data.layouts.class_names import prompt_note
from pipeline.data.layouts.coop import COOP
from pipeline.data.layouts.file_kinds import HIDDEN, SYSTEM
from pipeline.data.layouts.listing import Manifest, listed
from pipeline.data.layouts.registry import LayoutSpec
from pipeline.data.layouts.skipped import OTHER, OUTSIDE, UNLISTED
from pipeline.data.source import ParquetSource, Source, opened
from pipeline.errors import DataError

log = logging.getLogger(__name__)

EXPECTED = (SYSTEM, HIDDEN, OUTSIDE, OTHER, UNLISTED)
"""Reasons for which files of intact data sets are skipped too: logged as information, others as warnings."""

_SOURCES: dict[tuple[LayoutSpec, int | None], FileSource | TableSource] = {}
"""The sources that this process has opened, by layout spec and `bits`."""


@dataclass(frozen=True)
class Dataset:
    """A data set of a plan: its card and its opened images.

    It is pickled as its card and digest. Where it is unpickled, the source is opened by the card when it is first used.
    """

    card: DatasetCard
    digest: str
    """Digest of the source when the run was planned."""

    @classmethod
    def of(cls, card: DatasetCard, source: Source) -> Dataset:
        """Return the data set of a card whose source is open."""
        dataset = cls(card, source.digest)
        dataset.__dict__["source"] = source
        return dataset

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields, without the opened source."""
        return {"card": self.card, "digest": self.digest}

    @property
    def name(self) -> str:
        """Name of the card."""
        return self.card.name

    @cached_property
    def source(self) -> Source:
        """The images. Raises DataError when the files were changed after the run was planned."""
        source = source_of(self.card)
        if source.digest != self.digest:
            raise DataError(f"{source.place} was changed after the run was planned: type the same command again")
        return source


def open_dataset(card: DatasetCard) -> Dataset:
    """Open a data set by its card, without checking its files."""
    return Dataset.of(card, source_of(card))


def source_of(card: DatasetCard) -> Source:
    """Open a data set by its card, once a process. Raises DataError when its files are missing."""
    if card.layout == "parquet":
        return opened(ParquetSource(str(card.file), card.sha256, card.bits))
    spec = layout_spec(card)
    return _SOURCES.get((spec, card.bits)) or _open(spec, card.bits, index_of(spec))


def reopen(card: DatasetCard, rebuild: bool = False) -> Source:
    """Open a data set again, with its present files.

    Args:
        card: Its card.
        rebuild: List all files again even if no folder was changed, to see files that were overwritten in place.
    """
    if card.layout == "parquet":
        return source_of(card)
    spec = layout_spec(card)
    return _open(spec, card.bits, index_of(spec, rebuild))


def _open(spec: LayoutSpec, bits: int | None, index: Index) -> FileSource | TableSource:
    """Open a source over an index that was just read."""
    kind = TableSource if spec.layout == "table" else FileSource
    source = _SOURCES[spec, bits] = opened(kind(spec, index.digest, bits))
    source.use(index)
    return source


def layout_spec(card: DatasetCard) -> LayoutSpec:
    """Return what the index of a card's files depends on."""
    return LayoutSpec(
        layout=card.layout,
        path=card.path,
        classnames=card.classnames,
        split_seed=card.split_seed,
        test_split=card.test_split,
        test_only=bool(card.shift_of),
        classes_digest=card.classes_digest,
        duplicates=card.duplicates == "allow",
    )


def manifest_of(card: DatasetCard) -> Manifest:
    """List the rows of a data set without looking for the images. Not for `layout: parquet`.

    The split files of several data sets may be kept together in `data.root`, without images.
    """
    folder, reader = Path(card.path), layouts.READERS[card.layout]
    if not folder.exists() and reader.lists(folder.parent):
        card = replace(card, path=str(folder.parent))
    return listed(layouts.read(layout_spec(card), images=False))


def missing(card: DatasetCard) -> tuple[str, ...]:
    """Return one line for each file or folder that is not on this machine. Opens no image."""
    if card.layout == "parquet":
        return () if card.file.is_file() else (f"no data file at {card.file}",)
    return layouts.missing(card.layout, card.path)


def check_card(card: DatasetCard) -> Dataset:
    """Open a data set, and check that its files match its card and that its test images can be decoded.

    Raises:
        DataError: The files differ from the card, an image cannot be decoded, or the folder has a finding that must be
            resolved first.
    """
    source = reopen(card)
    if isinstance(source, IndexedSource):
        source.index.contents.check(f"data set {card.name!r}")
    part = ""
    if card.layout in COOP:
        part = f"; a part of the set needs a card of its own: farebox data add NAME {card.path} layout={card.layout}"
    classes, labels = len(source.classnames), set(np.unique(source.labels).tolist())
    if classes != card.classes or not labels <= set(range(card.classes)):
        actual = f"{source.place} has {classes if classes != card.classes else 'others'}"
        raise DataError(f"data set {card.name!r}: its card says {card.classes} classes, {actual}{part}")
    for split, expected in (("test", card.test), ("train", card.train), ("val", card.val)):
        count = len(source.rows_of(split))
        if count != expected or (split == "test" and not count):
            raise DataError(
                f"data set {card.name!r}: its card says {expected:,} {split} images, {source.place} has {count:,}{part}"
            )
    if isinstance(source, IndexedSource):
        _log(card.name, source)
    check_readable(source, card.name, source.rows_of("test"))
    return Dataset.of(card, source)


def _log(name: str, source: IndexedSource) -> None:
    """Log how the split was generated, which files of the folder are not used, and classes with the same prompt."""
    if source.split_origin:
        log.warning("data set %r: its split was %s", name, source.split_origin)
    contents = source.index.contents
    for skipped in contents.skipped:
        level = logging.INFO if skipped.reason in EXPECTED else logging.WARNING
        log.log(level, "data set %r: skipped %s", name, skipped)
    for note in contents.notes:
        log.info("data set %r: %s", name, note)
    if note := prompt_note(source.classnames):
        log.warning("data set %r: %s", name, note)
