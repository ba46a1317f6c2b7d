"""From a data set's card to its images, and whether the two agree."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.cards import DatasetCard
from pipeline.data import layouts
from pipeline.data.images import check_readable
from pipeline.data.index import index_of
from pipeline.data.indexed import FileSource, IndexedSource, TableSource
from pipeline.data.layouts import Recipe
from pipeline.data.listing import Rows, listed
from pipeline.data.source import ParquetSource, Source, opened
from pipeline.errors import DataError

log = logging.getLogger(__name__)


def source_of(card: DatasetCard) -> Source:
    """The card's images, opened and checked once a process. DataError when they are not there."""
    if card.layout == "parquet":
        return opened(ParquetSource(str(card.file), card.sha256, card.bits))
    return opened(_indexed(recipe(card), card.bits))


def source_anew(card: DatasetCard) -> Source:
    """The same after a new look at the files."""
    _indexed.cache_clear()
    return source_of(card)


@lru_cache(maxsize=64)
def _indexed(recipe: Recipe, bits: int | None) -> Source:
    kind = TableSource if recipe.layout == "table" else FileSource
    return kind(recipe, index_of(recipe).digest, bits)


def recipe(card: DatasetCard) -> Recipe:
    """What the listing of a card's files depends on."""
    return Recipe(card.layout, card.path, card.classnames, card.split_seed)


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
    """DataError when a data set's files contradict its card, or one of its test images cannot be read.

    The files are looked at anew: this comes first in every plan.
    """
    source = source_anew(card)
    classes, used = len(source.classnames), set(np.unique(source.labels).tolist())
    if classes != card.classes or not used <= set(range(card.classes)):
        found = f"{source.place} has {classes if classes != card.classes else 'others'}"
        raise DataError(f"data set {card.name!r}: its card says {card.classes} classes, {found}")
    for split, said in (("test", card.test), ("train", card.train), ("val", card.val)):
        count = len(source.rows_of(split))
        if count != said or (split == "test" and not count):
            raise DataError(
                f"data set {card.name!r}: its card says {said:,} {split} images, {source.place} has {count:,}"
            )
    if isinstance(source, IndexedSource) and source.made:
        log.warning("data set %r: its split was %s", card.name, source.made)
    check_readable(source, card.name, source.rows_of("test"))
