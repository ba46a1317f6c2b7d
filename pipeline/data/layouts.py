"""How a data set's files may lie, by the name that a card's `layout` has, and what is told when they do not lie so."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import NamedTuple, Protocol

from pipeline.data.coop import COOP, OwnSplitFile
from pipeline.data.folder import ImageFolder
from pipeline.data.listing import Listing
from pipeline.data.tables import Tables
from pipeline.errors import DataError
from pipeline.untrusted import check_texts


class Reader(Protocol):
    """Lists one kind of data set, without opening an image."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Files and folders in it without which nothing can be read."""
        ...

    def lists(self, folder: Path) -> bool:
        """True when the rows can be listed though the images are not there."""
        ...

    def read(self, folder: Path, seed: int) -> Listing:
        """The listing; `seed` is for a split that is made here."""
        ...


READERS: dict[str, Reader] = {**COOP, "folder": ImageFolder(), "table": Tables(), "split_file": OwnSplitFile()}
LAYOUTS = ("parquet", *READERS)
"""All layouts: `parquet` is one file that is named by its digest, read by ParquetSource."""


class Recipe(NamedTuple):
    """All that a listing depends on beside the files themselves."""

    layout: str
    path: str
    classnames: tuple[str, ...] = ()
    """In place of the files' own."""
    split_seed: int = 1


def read(recipe: Recipe, images: bool = True) -> Listing:
    """The listing of a data set; with images=False it is enough that its split file or lists are there.

    DataError when it is not there, lies otherwise, or has class names that cannot be.
    """
    where, reader = Path(recipe.path), READERS[recipe.layout]
    if (absent := missing(recipe.layout, recipe.path)) and (images or not reader.lists(where)):
        raise DataError(absent[0])
    listing = reader.read(where, recipe.split_seed)
    check_texts(recipe.path, (*listing.classnames, *listing.class_ids))
    ids_of_its_own = listing.class_ids != listing.classnames
    if recipe.classnames:
        if len(recipe.classnames) != len(listing.class_ids):
            found = f"{recipe.path} has {len(listing.class_ids)} classes"
            raise DataError(f"the card has {len(recipe.classnames)} class names, {found}: wanted one for each")
        listing = dataclasses.replace(listing, classnames=recipe.classnames)
    if not listing.classnames:
        raise DataError(
            f"{recipe.path} says no class names: wanted `classnames` in the card, text labels, Hugging Face's "
            "ClassLabel, or a JSON list under `classes` in the schema's metadata"
        )
    name, count = Counter(listing.class_ids if ids_of_its_own else listing.classnames).most_common(1)[0]
    if count > 1:
        raise DataError(f"{recipe.path} has {count} classes named {name!r}: give each class a name of its own")
    return listing


def missing(layout: str, path: str) -> tuple[str, ...]:
    """One line for each thing that is not where this layout has it; nothing when all is there."""
    where, needs = Path(path), READERS[layout].needs
    if not where.is_absolute():
        return (f"no folder for data sets is set: type data.root=DIR (or set FAREBOX_DATA), DIR holding {path}/",)
    if not where.exists():
        return (f"nothing at {where}{_elsewhere(where, needs)}",)
    lines = tuple(f"{where} has no {name}" for name in needs if not (where / name).exists())
    if len(lines) == len(needs) and (inside := _nested(where, needs)):
        return (f"{where} has no {needs[0]}, but {inside} has: move what is in it up one level",)
    return lines


def _elsewhere(where: Path, needs: tuple[str, ...]) -> str:
    """Where it seems to be, when `data.root` is one level too deep or too high."""
    root = where.parent
    if needs and all((root / name).exists() for name in needs):
        return f": {root} is the data set itself; set data.root={root.parent}, the folder above it"
    if root.is_dir():
        for below in sorted(child for child in root.iterdir() if child.is_dir()):
            if (below / where.name).is_dir():
                return f", but {below / where.name} is there: set data.root={below}"
    return ""


def _nested(where: Path, needs: tuple[str, ...]) -> Path | None:
    inside = [child for child in sorted(where.iterdir()) if child.is_dir()] if needs else []
    return next((child for child in inside if all((child / name).exists() for name in needs)), None)
