"""The registry of layouts, and the function that lists a data set by its layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple, Protocol

from pipeline.data.layouts.class_names import check_names, check_prompts, distinct_ids, ids_digest
from pipeline.data.layouts.coop import COOP, ImageNet
from pipeline.data.layouts.image_folder import ImageFolder
from pipeline.data.layouts.listing import Listing, Options
from pipeline.data.layouts.split_file import OwnSplitFile
from pipeline.data.layouts.tables import Tables
from pipeline.errors import DataError
from pipeline.untrusted import check_texts


class Reader(Protocol):
    """Lists the rows of data sets with one layout, without opening images."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Files and folders without which nothing can be read."""
        ...

    def lists(self, folder: Path) -> bool:
        """Return True when the rows can be listed without the images."""
        ...

    def read(self, folder: Path, options: Options) -> Listing:
        """List all rows. Raises DataError when the files have another layout."""
        ...


READERS: dict[str, Reader] = {**COOP, "folder": ImageFolder(), "table": Tables(), "split_file": OwnSplitFile()}
LAYOUTS = ("parquet", *READERS)
"""All layouts. `parquet` is one file that is identified by its digest and read by ParquetSource."""


class LayoutSpec(NamedTuple):
    """Everything that a listing depends on, apart from the files themselves."""

    layout: str
    path: str
    classnames: tuple[str, ...] = ()
    """Class names in label order, instead of those in the files."""
    split_seed: int = 1
    test_split: str = ""
    test_only: bool = False
    classes_digest: str = ""
    """Digest of the ids of the classes that `classnames` was written for; empty if unknown."""
    duplicates: bool = False
    """Classes may have the same prompt."""


def read(spec: LayoutSpec, images: bool = True) -> Listing:
    """List a data set. With images=False, its split file or lists are enough.

    Raises:
        DataError: Files are missing or have another layout, or the class names do not match.
    """
    where, reader = Path(spec.path), READERS[spec.layout]
    if (absent := missing(spec.layout, spec.path)) and (images or not reader.lists(where)):
        raise DataError(absent[0])
    if spec.test_split and spec.layout in COOP:
        raise DataError(f"test={spec.test_split} is for layouts folder, table and split_file, not {spec.layout}")
    listing = reader.read(where, Options(spec.split_seed, spec.test_split, spec.test_only))
    check_texts(spec.path, (*listing.classnames, *listing.class_ids))
    if spec.classnames:
        check_names(spec.path, listing.class_ids, spec.classnames)
        if spec.classes_digest not in ("", ids_digest(listing.class_ids)):
            raise DataError(
                f"{spec.path} has other classes, or a different class order, than when its card was written: type "
                "farebox data add again, with --force"
            )
        listing = dataclasses.replace(listing, classnames=spec.classnames)
    if not listing.classnames:
        raise DataError(
            f"{spec.path} has no class names: type classnames=FILE (`classnames` in the card), or give text labels, "
            "Hugging Face's ClassLabel, or a JSON list under `classes` in the schema's metadata"
        )
    check_prompts(spec.path, listing.classnames, spec.duplicates or isinstance(reader, ImageNet))
    contents, notes = listing.contents, _notes(spec)
    return dataclasses.replace(
        listing, class_ids=distinct_ids(listing.class_ids), contents=lambda: contents().plus(notes=notes)
    )


def _notes(spec: LayoutSpec) -> list[str]:
    """Return notes on how the spec changes the splits of the files."""
    if not spec.test_split:
        return []
    return [f"the {spec.test_split} images are the test images, and nothing is left in {spec.test_split}"]


def missing(layout: str, path: str) -> tuple[str, ...]:
    """Return one line for each file or folder that this layout needs and that is missing."""
    where, needs = Path(path), READERS[layout].needs
    if not where.is_absolute():
        return (f"no folder for data sets is set: type data.root=DIR (or set FAREBOX_DATA), DIR holding {path}/",)
    if not where.exists():
        return (f"nothing at {where}{_elsewhere(where, needs)}",)
    lines = tuple(f"{where} has no {name}" for name in needs if not (where / name).exists())
    if len(lines) == len(needs) and (inside := _nested(where, needs)):
        return (f"{where} has no {needs[0]}, but {inside} has: move its content up one level",)
    return lines


def _elsewhere(where: Path, needs: tuple[str, ...]) -> str:
    """Return a hint for a message when `data.root` is one level too low or too high."""
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
