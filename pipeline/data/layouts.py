"""The layouts that a card can name, and the listing of a data set by its layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple, Protocol

from pipeline.data.class_names import check_names, check_prompts, distinct_ids, ids_digest
from pipeline.data.coop import COOP, ImageNet
from pipeline.data.folder import ImageFolder
from pipeline.data.listing import Listing, Options
from pipeline.data.split_file import OwnSplitFile
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

    def read(self, folder: Path, options: Options) -> Listing:
        """List all images. DataError when the files are not laid out so."""
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
    test_split: str = ""
    test_only: bool = False
    classes_digest: str = ""
    """Of the ids of the classes that `classnames` was written for, if that is known."""
    duplicates: bool = False
    """Classes may have the same prompt."""


def read(recipe: Recipe, images: bool = True) -> Listing:
    """List a data set; with images=False it is enough that its split file or lists are there.

    Raises:
        DataError: the files are not there or not laid out so, or the class names do not fit.
    """
    where, reader = Path(recipe.path), READERS[recipe.layout]
    if (absent := missing(recipe.layout, recipe.path)) and (images or not reader.lists(where)):
        raise DataError(absent[0])
    if recipe.test_split and recipe.layout in COOP:
        raise DataError(f"test={recipe.test_split} is for layouts folder, table and split_file, not {recipe.layout}")
    listing = reader.read(where, Options(recipe.split_seed, recipe.test_split, recipe.test_only))
    check_texts(recipe.path, (*listing.classnames, *listing.class_ids))
    if recipe.classnames:
        check_names(recipe.path, listing.class_ids, recipe.classnames)
        if recipe.classes_digest not in ("", ids_digest(listing.class_ids)):
            raise DataError(
                f"{recipe.path} has other classes, or another order of them, than when its card was written: type "
                "farebox data add again, with --force"
            )
        listing = dataclasses.replace(listing, classnames=recipe.classnames)
    if not listing.classnames:
        raise DataError(
            f"{recipe.path} says no class names: type classnames=FILE (`classnames` in the card), or give text labels, "
            "Hugging Face's ClassLabel, or a JSON list under `classes` in the schema's metadata"
        )
    check_prompts(recipe.path, listing.classnames, recipe.duplicates or isinstance(reader, ImageNet))
    contents, notes = listing.contents, _notes(recipe)
    return dataclasses.replace(
        listing, class_ids=distinct_ids(listing.class_ids), contents=lambda: contents().plus(notes=notes)
    )


def _notes(recipe: Recipe) -> list[str]:
    """Return what the recipe changes about the splits that the files have."""
    if not recipe.test_split:
        return []
    return [f"the {recipe.test_split} images are the test images, and nothing is left in {recipe.test_split}"]


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
