"""From a data set's card to its images, and whether the two agree."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.cards import DatasetCard
from pipeline.data import layouts
from pipeline.data.class_names import same_prompt
from pipeline.data.coop import COOP
from pipeline.data.file_kinds import HIDDEN, SYSTEM
from pipeline.data.images import check_readable
from pipeline.data.index import index_of
from pipeline.data.indexed import FileSource, IndexedSource, TableSource
from pipeline.data.layouts import Recipe
from pipeline.data.listing import Rows, listed
from pipeline.data.skipped import OTHER, OUTSIDE, UNLISTED
from pipeline.data.source import ParquetSource, Source, opened
from pipeline.errors import DataError

log = logging.getLogger(__name__)

EXPECTED = (SYSTEM, HIDDEN, OUTSIDE, OTHER, UNLISTED)
"""Reasons for which files are skipped in sound data sets too: logged as information, others as warnings."""


def source_of(card: DatasetCard) -> Source:
    """The card's images, opened and checked once a process. DataError when they are not there."""
    if card.layout == "parquet":
        return opened(ParquetSource(str(card.file), card.sha256, card.bits))
    return opened(_indexed(recipe(card), card.bits))


def source_anew(card: DatasetCard, listed_anew: bool = False) -> Source:
    """Open the card's images again; with `listed_anew`, list all files again even if no folder was changed."""
    _indexed.cache_clear()
    if listed_anew and card.layout != "parquet":
        index_of(recipe(card), anew=True)
    source = source_of(card)
    if isinstance(source, IndexedSource):
        source.reopen()
    return source


@lru_cache(maxsize=64)
def _indexed(recipe: Recipe, bits: int | None) -> Source:
    kind = TableSource if recipe.layout == "table" else FileSource
    return kind(recipe, index_of(recipe).digest, bits)


def recipe(card: DatasetCard) -> Recipe:
    """What the listing of a card's files depends on."""
    return Recipe(
        layout=card.layout,
        path=card.path,
        classnames=card.classnames,
        split_seed=card.split_seed,
        test_split=card.test_split,
        test_only=bool(card.shift_of),
        classes_digest=card.classes_digest,
        duplicates=card.duplicates == "allow",
    )


def listing(card: DatasetCard) -> Rows:
    """The card's rows as they are listed, no image looked for. Not for `layout: parquet`.

    The split files of several sets may lie together in `data.root`, where there are no images.
    """
    here, reader = Path(card.path), layouts.READERS[card.layout]
    if not here.exists() and reader.lists(here.parent):
        card = replace(card, path=str(here.parent))
    return listed(layouts.read(recipe(card), images=False))


def missing(card: DatasetCard) -> tuple[str, ...]:
    """One line for each thing that is not on this machine; nothing when all is there. Opens no image."""
    if card.layout == "parquet":
        return () if card.file.is_file() else (f"no data file at {card.file}",)
    return layouts.missing(card.layout, card.path)


def check_card(card: DatasetCard) -> None:
    """Check that a data set's files are those that its card describes, and that its test images can be read.

    The files are looked at anew: this comes first in every plan.

    Raises:
        DataError: naming the difference, the image, or a finding about the folder that must be resolved first.
    """
    source = source_anew(card)
    if isinstance(source, IndexedSource):
        source.index.contents.check(f"data set {card.name!r}")
    part = ""
    if card.layout in COOP:
        part = f"; a part of the set needs a card of its own: farebox data add NAME {card.path} layout={card.layout}"
    classes, used = len(source.classnames), set(np.unique(source.labels).tolist())
    if classes != card.classes or not used <= set(range(card.classes)):
        found = f"{source.place} has {classes if classes != card.classes else 'others'}"
        raise DataError(f"data set {card.name!r}: its card says {card.classes} classes, {found}{part}")
    for split, said in (("test", card.test), ("train", card.train), ("val", card.val)):
        count = len(source.rows_of(split))
        if count != said or (split == "test" and not count):
            raise DataError(
                f"data set {card.name!r}: its card says {said:,} {split} images, {source.place} has {count:,}{part}"
            )
    if isinstance(source, IndexedSource):
        _log(card.name, source)
    check_readable(source, card.name, source.rows_of("test"))


def _log(name: str, source: IndexedSource) -> None:
    """Log how the split was made, what the folder holds beside the images, and classes with one prompt."""
    if source.made:
        log.warning("data set %r: its split was %s", name, source.made)
    contents = source.index.contents
    for skipped in contents.skipped:
        level = logging.INFO if skipped.reason in EXPECTED else logging.WARNING
        log.log(level, "data set %r: skipped %s", name, skipped)
    for note in contents.notes:
        log.info("data set %r: %s", name, note)
    if pairs := same_prompt(source.classnames):
        first, later = (source.classnames[label] for label in pairs[0])
        shown = f"{first!r} and {later!r}"
        log.warning("data set %r: pairs of classes with one prompt: %d, the first is %s", name, len(pairs), shown)
